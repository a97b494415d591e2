"""Fused score → n:m mask → compressed weight, in one pass: every input is read once, every output written once.

A program walks down a strip of columns, so the strip's norms are read once for many rows. The m scores of a group are m
registers of one thread; a weight is kept when fewer than n of its group beat it (a higher score, or an equal one at a
lower index).
"""

# ruff: noqa: RUF005 - Triton compiles the concatenation of tuples, not their unpacking.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from wandapp_kernels.kernels.groups import join_lanes, split_lanes
from wandapp_kernels.kernels.launch import on
from wandapp_kernels.kernels.score import NON_FINITE, exponent, score, score_arguments

STRIP = 256
TILE = 4096
MAX_TILES = 16
# Enough programs to fill the largest GPUs a few times over.
PROGRAMS = 512
WARPS = 4


@triton.jit
def score_nm_kernel(
    weight_ptr,
    weight_row_stride,
    weight_column_stride,
    gradient_ptr,
    gradient_row_stride,
    gradient_column_stride,
    norm_ptr,
    mask_ptr,
    values_ptr,
    indices_ptr,
    flag_ptr,
    alpha,
    samples,
    rows,
    columns,
    kept,
    index_bytes,
    N: tl.constexpr,
    M: tl.constexpr,
    LOG_N: tl.constexpr,
    LOG_LANES: tl.constexpr,
    BITS: tl.constexpr,
    GRADIENT: tl.constexpr,
    SQUARES: tl.constexpr,
    NORM: tl.constexpr,
    MASK: tl.constexpr,
    COMPRESS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One strip of ``GROUPS`` groups, ``TILES`` tiles of ``ROWS`` rows; the program's first row comes from its id.

    M is padded to ``2^LOG_LANES`` lanes. A lane beyond M or beyond the last column scores -inf, so that a ragged tail
    of t columns keeps ``min(t, n)``. ``flag`` becomes 1 when a score is NaN or infinite. COMPRESS needs N and M to be
    powers of two.
    """
    LANES: tl.constexpr = 1 << LOG_LANES
    WIDTH: tl.constexpr = GROUPS * LANES
    # Tells the compiler what these are multiples of.
    columns = columns // VECTOR * VECTOR
    weight_row_stride = weight_row_stride // VECTOR * VECTOR
    gradient_row_stride = gradient_row_stride // VECTOR * VECTOR
    strips = tl.cdiv(columns, GROUPS * M)
    strip = tl.program_id(0) % strips
    first_row = (tl.program_id(0) // strips) * (ROWS * TILES)
    element = tl.arange(0, WIDTH)
    if LANES == M:
        column = strip * WIDTH + element
        inside = column < columns
    else:
        column = strip * (GROUPS * M) + element // LANES * M + element % LANES
        inside = (element % LANES < M) & (column < columns)
    # Without the hint the bytes of the mask would make every thread take 16 columns, and its loads of weights would
    # leave half of each sector to a later load.
    column = tl.max_contiguous(column, VECTOR)
    far_column = column.to(tl.int64)
    norm = tl.zeros((1, WIDTH), tl.float32)
    if NORM:
        norm = tl.load(norm_ptr + column, mask=inside, other=0.0)[None, :]

    largest = tl.zeros((ROWS, GROUPS), tl.int32)
    for tile in range(TILES):
        row = (first_row + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        valid = (row < rows)[:, None] & inside[None, :]
        place = row[:, None] * weight_row_stride + far_column[None, :] * weight_column_stride
        weight = tl.load(weight_ptr + place, mask=valid, other=0.0)
        gradient = weight
        if GRADIENT:
            place = row[:, None] * gradient_row_stride + far_column[None, :] * gradient_column_stride
            gradient = tl.load(gradient_ptr + place, mask=valid, other=0.0)
        scores = score(weight, gradient, norm, alpha, samples, GRADIENT, SQUARES, NORM)
        exponents = split_lanes(exponent(scores), ROWS, GROUPS, LOG_LANES)
        for i in tl.static_range(LANES):
            largest = tl.maximum(largest, exponents[i])
        scores = tl.where(inside[None, :], scores, float("-inf"))
        lanes = split_lanes(scores, ROWS, GROUPS, LOG_LANES)

        keep = ()
        for i in tl.static_range(LANES):
            beaten_by = tl.zeros((ROWS, GROUPS), tl.int32)
            for j in tl.static_range(LANES):
                if j < i:
                    beaten_by += (lanes[j] >= lanes[i]).to(tl.int32)
                elif j > i:
                    beaten_by += (lanes[j] > lanes[i]).to(tl.int32)
            keep = keep + (beaten_by < N,)

        if MASK:
            mask = ()
            for i in tl.static_range(LANES):
                mask = mask + (keep[i].to(tl.int8),)
            place = row[:, None] * columns + far_column[None, :]
            tl.store(mask_ptr + place, join_lanes(mask, ROWS, GROUPS, LOG_LANES), mask=valid)

        if COMPRESS:
            _store_compressed(
                split_lanes(weight, ROWS, GROUPS, LOG_LANES),
                keep,
                values_ptr,
                indices_ptr,
                row,
                rows,
                strip,
                kept,
                index_bytes,
                N,
                LANES,
                LOG_N,
                BITS,
                ROWS,
                GROUPS,
                VECTOR,
            )
    tl.store(flag_ptr, 1, mask=tl.max(largest) == NON_FINITE)


@triton.jit
def _store_compressed(
    lanes,
    keep,
    values_ptr,
    indices_ptr,
    row,
    rows,
    strip,
    kept,
    index_bytes,
    N: tl.constexpr,
    LANES: tl.constexpr,
    LOG_N: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Store the N kept lanes of every group in ascending order, and their positions, ``8 / BITS`` to a byte."""
    FIELDS: tl.constexpr = GROUPS * N
    PER_BYTE: tl.constexpr = 8 // BITS
    before = ()
    count = tl.zeros((ROWS, GROUPS), tl.int32)
    for i in tl.static_range(LANES):
        before = before + (count,)
        count += keep[i].to(tl.int32)
    values = ()
    positions = ()
    for slot in tl.static_range(N):
        # Slot s holds one of the lanes s ... s + LANES - N.
        value = lanes[slot + LANES - N]
        position = tl.full((ROWS, GROUPS), slot + LANES - N, tl.int32)
        for i in tl.static_range(slot, slot + LANES - N):
            here = keep[i] & (before[i] == slot)
            value = tl.where(here, lanes[i], value)
            position = tl.where(here, i, position)
        values = values + (value,)
        positions = positions + (position,)

    field = tl.max_contiguous(strip * FIELDS + tl.arange(0, FIELDS), VECTOR)
    valid = (row < rows)[:, None] & (field < kept)[None, :]
    place = row[:, None] * kept + field[None, :]
    tl.store(values_ptr + place, join_lanes(values, ROWS, GROUPS, LOG_N), mask=valid)

    positions = join_lanes(positions, ROWS, GROUPS, LOG_N)
    positions = tl.where((field < kept)[None, :], positions, 0)  # the bits after the last field are zero
    shift = (tl.arange(0, PER_BYTE) * BITS)[None, None, :]
    packed = tl.sum(tl.reshape(positions, (ROWS, FIELDS // PER_BYTE, PER_BYTE)) << shift, axis=2)
    byte = tl.max_contiguous(strip * (FIELDS // PER_BYTE) + tl.arange(0, FIELDS // PER_BYTE), VECTOR)
    valid = (row < rows)[:, None] & (byte < index_bytes)[None, :]
    place = row[:, None] * index_bytes + byte[None, :]
    tl.store(indices_ptr + place, packed.to(tl.uint8), mask=valid)


def score_nm(
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    gradient: torch.Tensor | None,
    alpha: float,
    samples: int | None,
    n: int,
    m: int,
    mask: torch.Tensor | None,
    values: torch.Tensor | None,
    indices: torch.Tensor | None,
) -> torch.Tensor:
    """Launch :func:`score_nm_kernel`.

    Args:
        weight: ``[R, C]`` fp32, fp16 or bf16, any strides.
        norm: ``‖X‖``, fp32 ``[C]``, or None.
        gradient: G, or ``Σ g²`` when ``samples`` is given; fp32, fp16 or bf16 ``[R, C]``, any strides, or None.
        alpha: weight of the gradient.
        samples: how many samples ``Σ g²`` runs over, or None when ``gradient`` is G itself.
        n, m: the pattern.
        mask: bool ``[R, C]`` contiguous, to be written, or None.
        values: ``[R, kept]`` contiguous in the weight's type, to be written, or None.
        indices: uint8 ``[R, bytes]`` contiguous, to be written with ``values``; n and m are then powers of two.

    Returns:
        int32 ``[1]`` on the weight's device: 1 when a score is NaN or infinite.
    """
    flag = torch.zeros(1, dtype=torch.int32, device=weight.device)
    if not weight.numel():
        return flag
    arguments, grid = arguments_nm(weight, norm, gradient, alpha, samples, n, m, mask, values, indices, flag)
    with on(weight.device):
        score_nm_kernel[(grid,)](**arguments, num_warps=WARPS, enable_fp_fusion=False)
    return flag


def arguments_nm(
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    gradient: torch.Tensor | None,
    alpha: float,
    samples: int | None,
    n: int,
    m: int,
    mask: torch.Tensor | None,
    values: torch.Tensor | None,
    indices: torch.Tensor | None,
    flag: torch.Tensor,
) -> tuple[dict, int]:
    """The kernel's arguments and how many programs to launch."""
    rows, columns = weight.shape
    inputs, vector = score_arguments(weight, norm, gradient, alpha, samples, flag)
    log_lanes = (m - 1).bit_length()
    lanes = 1 << log_lanes
    strip = min(max(triton.next_power_of_2(triton.cdiv(columns, m) * lanes), 32), STRIP)
    tile_rows = TILE // strip
    strips = triton.cdiv(columns, strip // lanes * m)
    tiles = triton.cdiv(rows, tile_rows)
    together = min(max(strips * tiles // PROGRAMS, 1), MAX_TILES)
    arguments = {
        **inputs,
        "mask_ptr": flag if mask is None else mask.view(torch.int8),
        "values_ptr": flag if values is None else values,
        "indices_ptr": flag if indices is None else indices,
        "rows": rows,
        "columns": columns,
        "kept": 0 if values is None else values.shape[1],
        "index_bytes": 0 if indices is None else indices.shape[1],
        "N": n,
        "M": m,
        "LOG_N": n.bit_length() - 1,
        "LOG_LANES": log_lanes,
        "BITS": 1 if m <= 2 else 2 if m <= 4 else 4,
        "MASK": mask is not None,
        "COMPRESS": values is not None,
        "ROWS": tile_rows,
        "GROUPS": strip // lanes,
        "TILES": together,
        "VECTOR": vector,
    }
    return arguments, strips * triton.cdiv(tiles, together)
