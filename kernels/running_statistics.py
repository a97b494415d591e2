"""Running statistics of calibration: ``Σ x²`` of every channel over tokens, and ``Σ g²`` of every weight over samples.

The sum over tokens has a fixed order, whatever the grid: 16 consecutive tokens one after another, 16 such sums one
after another, and so on for 4096 tokens. It is the order of torch's reduction over rows on a CPU (there for all but the
last columns when their number is not a multiple of its vectors), and rounding errors grow with its depth, not with the
number of tokens.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from wandapp_kernels.kernels.launch import on

STEP = 16
# Tokens of one program: STEP sums of STEP tokens.
CHUNK = STEP * STEP
COLUMNS = 256
FLAT = 4096


@triton.jit
def channel_squares_kernel(
    x_ptr,
    row_stride,
    column_stride,
    partial_ptr,
    tokens,
    columns,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``partial[c, j]``: the sum over the full steps of chunk c; ``partial[chunks, j]``: over the tokens after them."""
    columns = columns // VECTOR * VECTOR
    row_stride = row_stride // VECTOR * VECTOR
    strips = tl.cdiv(columns, WIDTH)
    chunk = tl.program_id(0) // strips
    column = tl.max_contiguous((tl.program_id(0) % strips) * WIDTH + tl.arange(0, WIDTH), VECTOR)
    inside = column < columns
    full = tl.zeros((WIDTH,), tl.float32)
    rest = tl.zeros((WIDTH,), tl.float32)
    steps = tl.minimum(tl.cdiv(tokens - chunk * STEP * STEP, STEP), STEP)
    for step in range(0, steps):
        first = (chunk * STEP + step) * STEP
        total = tl.zeros((WIDTH,), tl.float32)
        for i in tl.static_range(STEP):
            row = (first + i).to(tl.int64)
            place = row * row_stride + column.to(tl.int64) * column_stride
            x = tl.load(x_ptr + place, mask=column < tl.where(row < tokens, columns, 0), other=0.0).to(tl.float32)
            total += x * x
        if first + STEP <= tokens:
            full += total
        else:
            rest += total
    out = partial_ptr + chunk.to(tl.int64) * columns + column
    tl.store(out, full, mask=inside)
    if chunk == tl.cdiv(tokens, STEP * STEP) - 1:
        tl.store(out + columns, rest, mask=inside)


@triton.jit
def add_partial_sums_kernel(partial_ptr, sum_ptr, tokens, columns, STEP: tl.constexpr, WIDTH: tl.constexpr):
    """``sum += partials``, STEP chunks to a sum, these sums one after another, the shorter ones at the end first."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    chunks = tl.cdiv(tokens, STEP * STEP)
    complete = tokens // (STEP * STEP)
    far_columns = tl.full((), 0, tl.int64) + columns
    level = tl.zeros((WIDTH,), tl.float32)
    top = tl.zeros((WIDTH,), tl.float32)
    for chunk in range(0, complete):
        level += tl.load(partial_ptr + chunk * far_columns + column, mask=inside, other=0.0)
        if (chunk + 1) % STEP == 0:
            top += level
            level = tl.zeros((WIDTH,), tl.float32)
    unfinished = tl.where(complete < chunks, columns, 0)
    short = tl.load(partial_ptr + complete * far_columns + column, mask=column < unfinished, other=0.0)
    rest = tl.load(partial_ptr + chunks * far_columns + column, mask=inside, other=0.0)
    before = tl.load(sum_ptr + column, mask=inside, other=0.0)
    tl.store(sum_ptr + column, before + (((rest + short) + level) + top), mask=inside)


@triton.jit
def add_squares_kernel(sum_ptr, gradient_ptr, count, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """``sum += g²``, rounded once, as a fused multiply-add rounds."""
    count = count // VECTOR * VECTOR
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.max_contiguous(tl.arange(0, WIDTH), VECTOR)
    inside = place < count
    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    before = tl.load(sum_ptr + place, mask=inside, other=0.0).to(tl.float64)
    tl.store(sum_ptr + place, (before + gradient * gradient).to(tl.float32), mask=inside)


def add_channel_squares(x: torch.Tensor, sum_squares: torch.Tensor) -> None:
    """``sum_squares += Σ_t x[t]²`` in place.

    Args:
        x: ``[tokens, channels]`` fp32, fp16 or bf16, any strides.
        sum_squares: fp32 ``[channels]``, contiguous.
    """
    tokens, columns = x.shape
    if not x.numel():
        return
    partial = torch.empty(triton.cdiv(tokens, CHUNK) + 1, columns, dtype=torch.float32, device=x.device)
    arguments, grid = arguments_squares(x, partial)
    with on(x.device):
        channel_squares_kernel[(grid,)](**arguments, num_warps=1, enable_fp_fusion=False)
        add_partial_sums_kernel[(triton.cdiv(columns, COLUMNS),)](
            partial, sum_squares, tokens, columns, STEP=STEP, WIDTH=COLUMNS, num_warps=4, enable_fp_fusion=False
        )


def arguments_squares(x: torch.Tensor, partial: torch.Tensor) -> tuple[dict, int]:
    """The first kernel's arguments and how many programs to launch: a warp takes 16 bytes a lane where it can."""
    tokens, columns = x.shape
    vector = math.gcd(16 // x.element_size(), columns, x.stride(0))
    width = 32 * vector
    arguments = {
        "x_ptr": x,
        "row_stride": x.stride(0),
        "column_stride": x.stride(1),
        "partial_ptr": partial,
        "tokens": tokens,
        "columns": columns,
        "STEP": STEP,
        "WIDTH": width,
        "VECTOR": vector,
    }
    return arguments, triton.cdiv(columns, width) * triton.cdiv(tokens, CHUNK)


def add_squares(gradient: torch.Tensor, sum_squares: torch.Tensor) -> None:
    """``sum_squares += gradient²`` in place.

    Args:
        gradient: fp32, fp16 or bf16, contiguous, any shape.
        sum_squares: fp32, contiguous, of that shape.
    """
    count = gradient.numel()
    if not count:
        return
    with on(gradient.device):
        add_squares_kernel[(triton.cdiv(count, FLAT),)](
            sum_squares, gradient, count, WIDTH=FLAT, VECTOR=math.gcd(4, count), num_warps=4, enable_fp_fusion=False
        )
