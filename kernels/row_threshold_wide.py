"""The row threshold for rows that no multiprocessor's registers hold.

Radix select, eight bits a pass: a histogram of the next digit over the scores that share the digits found so far. A row
is read five times (four digits, then the mask); between the passes it is found in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from wandapp_kernels.kernels.launch import on
from wandapp_kernels.kernels.score import NON_FINITE, exponent, score, score_arguments, sortable

CHUNK = 4096
WARPS = 16


@triton.jit
def row_threshold_wide_kernel(
    weight_ptr,
    weight_row_stride,
    weight_column_stride,
    gradient_ptr,
    gradient_row_stride,
    gradient_column_stride,
    norm_ptr,
    mask_ptr,
    bitmap_ptr,
    flag_ptr,
    alpha,
    samples,
    columns,
    bitmap_bytes,
    keep,
    GRADIENT: tl.constexpr,
    SQUARES: tl.constexpr,
    NORM: tl.constexpr,
    MASK: tl.constexpr,
    BITMAP: tl.constexpr,
    CHUNK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Row ``program_id(0)``. ``flag`` becomes 1 when a score is NaN or infinite."""
    # Tells the compiler what these are multiples of.
    columns = columns // VECTOR * VECTOR
    weight_row_stride = weight_row_stride // VECTOR * VECTOR
    gradient_row_stride = gradient_row_stride // VECTOR * VECTOR
    row = tl.program_id(0).to(tl.int64)
    lane = tl.max_contiguous(tl.arange(0, CHUNK), VECTOR)
    weights = weight_ptr + row * weight_row_stride
    gradients = gradient_ptr + row * gradient_row_stride
    digit = tl.arange(0, 512)
    threshold = tl.zeros((), tl.uint32)
    above = 0
    equal = 0
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros((512,), tl.int32)
        for start in range(0, columns, CHUNK):
            column = start + lane
            inside = column < columns
            scores = _scores(
                weights, weight_column_stride, gradients, gradient_column_stride, norm_ptr, alpha, samples,
                column, inside, GRADIENT, SQUARES, NORM,
            )  # fmt: skip
            keys = sortable(scores)
            # Shifting in two steps: by 32 at once is undefined.
            candidate = inside & ((keys >> shift) >> 8 == (threshold >> shift) >> 8)
            # The others go to bins of their own, spread out so that their atomics do not queue.
            digits = tl.where(candidate, ((keys >> shift) & 255).to(tl.int32), 256 + lane % 256)
            counts += tl.histogram(digits, 512)
        counts = tl.where(digit < 256, counts, 0)
        reaching = above + tl.cumsum(counts, 0, reverse=True)
        found = tl.maximum(tl.sum(((reaching >= keep) & (digit < 256)).to(tl.int32)) - 1, 0)
        above += tl.sum(tl.where(digit > found, counts, 0))
        equal = tl.sum(tl.where(digit == found, counts, 0))
        threshold = threshold | (found.to(tl.uint32) << shift)

    room = tl.minimum(keep - above, equal)
    largest = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, columns, CHUNK):
        column = start + lane
        inside = column < columns
        scores = _scores(
            weights, weight_column_stride, gradients, gradient_column_stride, norm_ptr, alpha, samples,
            column, inside, GRADIENT, SQUARES, NORM,
        )  # fmt: skip
        largest = tl.maximum(largest, exponent(scores))
        keys = sortable(scores)
        ties = ((keys == threshold) & inside).to(tl.int32)
        kept = inside & ((keys > threshold) | ((ties > 0) & (tl.cumsum(ties, 0) <= room)))
        room -= tl.sum(ties)
        if MASK:
            tl.store(mask_ptr + row * columns + column, kept.to(tl.int8), mask=inside)
        if BITMAP:
            bits = tl.reshape(kept.to(tl.int32), (CHUNK // 8, 8)) << tl.arange(0, 8)[None, :]
            byte = start // 8 + tl.max_contiguous(tl.arange(0, CHUNK // 8), VECTOR)
            packed = tl.sum(bits, axis=1).to(tl.uint8)
            tl.store(bitmap_ptr + row * bitmap_bytes + byte, packed, mask=byte < bitmap_bytes)
    tl.store(flag_ptr, 1, mask=tl.max(largest) == NON_FINITE)


@triton.jit
def _scores(
    weights,
    weight_column_stride,
    gradients,
    gradient_column_stride,
    norm_ptr,
    alpha,
    samples,
    column,
    inside,
    GRADIENT: tl.constexpr,
    SQUARES: tl.constexpr,
    NORM: tl.constexpr,
):
    far_column = column.to(tl.int64)
    weight = tl.load(weights + far_column * weight_column_stride, mask=inside, other=0.0)
    gradient = weight
    norm = 0.0
    if GRADIENT:
        gradient = tl.load(gradients + far_column * gradient_column_stride, mask=inside, other=0.0)
    if NORM:
        norm = tl.load(norm_ptr + column, mask=inside, other=0.0)
    return score(weight, gradient, norm, alpha, samples, GRADIENT, SQUARES, NORM)


def row_threshold_wide(
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    gradient: torch.Tensor | None,
    alpha: float,
    samples: int | None,
    keep: int,
    mask: torch.Tensor | None,
    bitmap: torch.Tensor | None,
    flag: torch.Tensor,
) -> None:
    """Launch :func:`row_threshold_wide_kernel`; arguments as in ``row_threshold``, ``flag`` is written."""
    arguments, grid = arguments_wide(weight, norm, gradient, alpha, samples, keep, mask, bitmap, flag)
    with on(weight.device):
        row_threshold_wide_kernel[(grid,)](**arguments, num_warps=WARPS, enable_fp_fusion=False)


def arguments_wide(
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    gradient: torch.Tensor | None,
    alpha: float,
    samples: int | None,
    keep: int,
    mask: torch.Tensor | None,
    bitmap: torch.Tensor | None,
    flag: torch.Tensor,
) -> tuple[dict, int]:
    """The kernel's arguments and how many programs to launch."""
    rows, columns = weight.shape
    inputs, vector = score_arguments(weight, norm, gradient, alpha, samples, flag)
    arguments = {
        **inputs,
        "mask_ptr": flag if mask is None else mask.view(torch.int8),
        "bitmap_ptr": flag if bitmap is None else bitmap,
        "columns": columns,
        "bitmap_bytes": -(-columns // 8),
        "keep": keep,
        "MASK": mask is not None,
        "BITMAP": bitmap is not None,
        "CHUNK": CHUNK,
        "VECTOR": vector,
    }
    return arguments, rows
