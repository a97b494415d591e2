"""Fused score → exact k-th highest score of every row → mask and bitmap; each input is read once.

A program holds a row's scores in registers, as integers that sort like the floats, and finds the k-th highest by radix
select: bit after bit from the top, it counts how many scores reach a candidate. Among scores equal to the k-th the
lowest columns are kept; they are found by the same search over the column number.
"""

# ruff: noqa: RUF005 - Triton compiles the concatenation of tuples, not their unpacking.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from wandapp_kernels.kernels.launch import on
from wandapp_kernels.kernels.row_threshold_wide import row_threshold_wide
from wandapp_kernels.kernels.score import NON_FINITE, exponent, score, score_arguments, sortable

# 1024 threads have 64 registers each: room for 16 scores and, for the rows that follow, 16 norms.
PER_THREAD = 16
MAX_WARPS = 32
WIDEST = 32 * MAX_WARPS * PER_THREAD
PROGRAMS = 1056
MAX_ROWS = 16


@triton.jit
def row_threshold_kernel(
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
    rows,
    columns,
    bitmap_bytes,
    keep,
    GRADIENT: tl.constexpr,
    SQUARES: tl.constexpr,
    NORM: tl.constexpr,
    MASK: tl.constexpr,
    BITMAP: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    LOG_WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``ROWS`` rows, one after another, each as ``PARTS`` tensors of ``PART = 2^LOG_WIDTH / PARTS`` columns.

    ``flag`` becomes 1 when a score is NaN or infinite.
    """
    # Tells the compiler what these are multiples of.
    columns = columns // VECTOR * VECTOR
    weight_row_stride = weight_row_stride // VECTOR * VECTOR
    gradient_row_stride = gradient_row_stride // VECTOR * VECTOR
    lane = tl.max_contiguous(tl.arange(0, PART), VECTOR)
    norms = ()
    if NORM:
        for p in tl.static_range(PARTS):
            norms = norms + (tl.load(norm_ptr + p * PART + lane, mask=p * PART + lane < columns, other=0.0),)

    for turn in range(ROWS):
        row = (tl.program_id(0) * ROWS + turn).to(tl.int64)
        width = tl.where(row < rows, columns, 0)
        keys = ()
        largest = tl.zeros((PART,), tl.int32)
        for p in tl.static_range(PARTS):
            column = p * PART + lane
            inside = column < width
            far_column = column.to(tl.int64)
            place = row * weight_row_stride + far_column * weight_column_stride
            weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
            gradient = weight
            norm = 0.0
            if GRADIENT:
                place = row * gradient_row_stride + far_column * gradient_column_stride
                gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0)
            if NORM:
                norm = norms[p]
            scores = score(weight, gradient, norm, alpha, samples, GRADIENT, SQUARES, NORM)
            largest = tl.maximum(largest, exponent(scores))
            keys = keys + (tl.where(inside, sortable(scores), 0),)
        tl.store(flag_ptr, 1, mask=tl.max(largest) == NON_FINITE)

        threshold = tl.zeros((), tl.uint32)
        reaching = columns
        bit = 31
        while (bit >= 0) & (reaching != keep):
            candidate = threshold | (tl.full((), 1, tl.uint32) << bit)
            count = _count_reaching(keys, candidate, PARTS, PART)
            threshold = tl.where(count >= keep, candidate, threshold)
            reaching = tl.where(count >= keep, count, reaching)
            bit -= 1

        last = columns
        if reaching != keep:
            room = keep - _count_reaching(keys, threshold + 1, PARTS, PART)
            last = 0
            for step in range(LOG_WIDTH):
                candidate = last | (1 << (LOG_WIDTH - 1 - step))
                count = _count_equal_before(keys, threshold, candidate, PARTS, PART)
                last = tl.where(count < room, candidate, last)

        for p in tl.static_range(PARTS):
            column = p * PART + lane
            kept = (keys[p] > threshold) | ((keys[p] == threshold) & (column <= last))
            kept = kept & (column < width)
            if MASK:
                place = row * columns + column.to(tl.int64)
                tl.store(mask_ptr + place, kept.to(tl.int8), mask=column < width)
            if BITMAP:
                _store_bitmap(kept, bitmap_ptr, row, rows, p, bitmap_bytes, PART)


@triton.jit
def _count_reaching(keys, threshold, PARTS: tl.constexpr, PART: tl.constexpr):
    count = tl.zeros((PART,), tl.int32)
    for p in tl.static_range(PARTS):
        count += (keys[p] >= threshold).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _count_equal_before(keys, threshold, end, PARTS: tl.constexpr, PART: tl.constexpr):
    count = tl.zeros((PART,), tl.int32)
    for p in tl.static_range(PARTS):
        count += ((keys[p] == threshold) & (p * PART + tl.arange(0, PART) < end)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _store_bitmap(kept, bitmap_ptr, row, rows, part, bitmap_bytes, PART: tl.constexpr):
    """Column j of the row is bit ``j % 8`` of byte ``j // 8``; the bits after the last column are zero."""
    bits = tl.reshape(kept.to(tl.int32), (PART // 8, 8)) << tl.arange(0, 8)[None, :]
    byte = part * (PART // 8) + tl.arange(0, PART // 8)
    end = tl.where(row < rows, bitmap_bytes, 0)
    tl.store(bitmap_ptr + row * bitmap_bytes + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte < end)


def row_threshold(
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    gradient: torch.Tensor | None,
    alpha: float,
    samples: int | None,
    keep: int,
    mask: torch.Tensor | None,
    bitmap: torch.Tensor | None,
) -> torch.Tensor:
    """Launch :func:`row_threshold_kernel`, or for rows wider than ``WIDEST`` the kernel that reads them repeatedly.

    Args:
        weight: ``[R, C]`` fp32, fp16 or bf16, any strides.
        norm: ``‖X‖``, fp32 ``[C]``, or None.
        gradient: G, or ``Σ g²`` when ``samples`` is given; fp32, fp16 or bf16 ``[R, C]``, any strides, or None.
        alpha: weight of the gradient.
        samples: how many samples ``Σ g²`` runs over, or None when ``gradient`` is G itself.
        keep: how many weights of every row are kept.
        mask: bool ``[R, C]`` contiguous, to be written, or None.
        bitmap: uint8 ``[R, ceil(C / 8)]`` contiguous, to be written, or None.

    Returns:
        int32 ``[1]`` on the weight's device: 1 when a score is NaN or infinite.
    """
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    if not weight.numel():
        return flag
    if weight.shape[1] > WIDEST:
        row_threshold_wide(weight, norm, gradient, alpha, samples, keep, mask, bitmap, flag)
        return flag
    arguments, grid, warps = arguments_row(weight, norm, gradient, alpha, samples, keep, mask, bitmap, flag)
    with on(weight.device):
        row_threshold_kernel[(grid,)](**arguments, num_warps=warps, enable_fp_fusion=False)
    return flag


def arguments_row(
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    gradient: torch.Tensor | None,
    alpha: float,
    samples: int | None,
    keep: int,
    mask: torch.Tensor | None,
    bitmap: torch.Tensor | None,
    flag: torch.Tensor,
) -> tuple[dict, int, int]:
    """The kernel's arguments, how many programs to launch, and the warps of each."""
    rows, columns = weight.shape
    inputs, vector = score_arguments(weight, norm, gradient, alpha, samples, flag)
    width = max(triton.next_power_of_2(columns), 32 * vector)
    warps = max(width // (32 * PER_THREAD), 1)
    part = 32 * warps * vector
    turns = min(max(rows // PROGRAMS, 1), MAX_ROWS)
    arguments = {
        **inputs,
        "mask_ptr": flag if mask is None else mask.view(torch.int8),
        "bitmap_ptr": flag if bitmap is None else bitmap,
        "rows": rows,
        "columns": columns,
        "bitmap_bytes": -(-columns // 8),
        "keep": keep,
        "MASK": mask is not None,
        "BITMAP": bitmap is not None,
        "ROWS": turns,
        "PARTS": width // part,
        "PART": part,
        "LOG_WIDTH": width.bit_length() - 1,
        "VECTOR": vector,
    }
    return arguments, triton.cdiv(rows, turns), warps
