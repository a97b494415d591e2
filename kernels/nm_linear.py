"""``y = x Wᵀ + b`` with W kept 2:4 in the canonical layout: values, and two bits of position for each.

For few tokens the weights are expanded in registers and multiplied by CUDA cores: every weight is read once, in 16-byte
loads. For many tokens the expanded tile goes to the tensor cores.
"""

# ruff: noqa: RUF005 - Triton compiles the concatenation of tuples, not their unpacking.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from wandapp_kernels.kernels.groups import join_lanes, split_lanes
from wandapp_kernels.kernels.launch import interpreted, on

# Few tokens: rows and groups of four columns of a program, and tokens that share its loads.
FEW_ROWS = 8
FEW_GROUPS = 128
FEW_TOKENS = 8
FEW_WARPS = 4


@triton.jit
def expand_2of4(values, packed, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """``values [ROWS, 2 · GROUPS]`` and their positions ``[ROWS, GROUPS / 2]`` → four tensors ``[ROWS, GROUPS]``.

    A byte holds two groups; of a group's four bits the lower two are the position of its first value.
    """
    first, second = split_lanes(values, ROWS, GROUPS, 1)
    nibbles = tl.reshape(tl.join(packed & 15, packed >> 4), (ROWS, GROUPS))
    position = nibbles & 3
    other = nibbles >> 2
    zero = tl.zeros_like(first)
    expanded = ()
    for i in tl.static_range(4):
        expanded = expanded + (tl.where(position == i, first, tl.where(other == i, second, zero)),)
    return expanded


@triton.jit
def load_2of4(
    values_ptr, indices_ptr, row, rows, start, kept, index_bytes, ROWS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Expand groups ``start ... start + GROUPS`` of ``row [ROWS]`` (int64)."""
    slot = 2 * start + tl.arange(0, 2 * GROUPS)
    byte = start // 2 + tl.arange(0, GROUPS // 2)
    valid = (row < rows)[:, None]
    values = tl.load(values_ptr + row[:, None] * kept + slot[None, :], mask=valid & (slot < kept)[None, :], other=0.0)
    place = row[:, None] * index_bytes + byte[None, :]
    packed = tl.load(indices_ptr + place, mask=valid & (byte < index_bytes)[None, :], other=0).to(tl.int32)
    return expand_2of4(values, packed, ROWS, GROUPS)


@triton.jit
def nm_linear_few_kernel(
    x_ptr,
    values_ptr,
    indices_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    kept,
    index_bytes,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``ROWS`` outputs of ``TOKENS`` tokens."""
    blocks = tl.cdiv(out_features, ROWS)
    row = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first_token = (tl.program_id(0) // blocks) * TOKENS
    sums = (tl.zeros((ROWS, GROUPS), tl.float32),) * TOKENS
    for start in range(0, tl.cdiv(in_features, 4), GROUPS):
        weights = load_2of4(values_ptr, indices_ptr, row, out_features, start, kept, index_bytes, ROWS, GROUPS)
        column = 4 * start + tl.arange(0, 4 * GROUPS)[None, :]
        added = ()
        for t in tl.static_range(TOKENS):
            token = (first_token + t).to(tl.int64)
            width = tl.where(token < tokens, in_features, 0)
            x = tl.load(x_ptr + token * in_features + column, mask=column < width, other=0.0)
            lanes = split_lanes(x.to(tl.float32), 1, GROUPS, 2)
            total = sums[t]
            for i in tl.static_range(4):
                total += weights[i].to(tl.float32) * lanes[i]
            added = added + (total,)
        sums = added
    bias = tl.zeros((ROWS,), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=row < out_features, other=0.0).to(tl.float32)
    for t in tl.static_range(TOKENS):
        token = (first_token + t).to(tl.int64)
        y = (tl.sum(sums[t], axis=1) + bias).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * out_features + row, y, mask=row < tl.where(token < tokens, out_features, 0))


@triton.jit
def nm_linear_many_kernel(
    x_ptr,
    values_ptr,
    indices_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    kept,
    index_bytes,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A tile of ``TOKENS`` tokens × ``ROWS`` outputs."""
    blocks = tl.cdiv(tokens, TOKENS)
    token = ((tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, tl.cdiv(in_features, 4), GROUPS):
        lanes = load_2of4(values_ptr, indices_ptr, row, out_features, start, kept, index_bytes, ROWS, GROUPS)
        weights = join_lanes(lanes, ROWS, GROUPS, 2)
        column = 4 * start + tl.arange(0, 4 * GROUPS)
        valid = (token < tokens)[:, None] & (column < in_features)[None, :]
        x = tl.load(x_ptr + token[:, None] * in_features + column[None, :], mask=valid, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            weights = weights.to(tl.float32)
        total = tl.dot(x, tl.trans(weights), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias_ptr + row, mask=row < out_features, other=0.0).to(tl.float32)[None, :]
    place = token[:, None] * out_features + row[None, :]
    valid = (token < tokens)[:, None] & (row < out_features)[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=valid)


def nm_linear(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None, rows: int, *, few: bool
) -> torch.Tensor:
    """``x [M, K] → [M, rows]``, accumulated in fp32.

    Args:
        x: fp32, fp16 or bf16, contiguous.
        values, indices: the canonical 2:4 weight ``[rows, K]``, contiguous; values in x's type.
        bias: ``[rows]`` contiguous, or None.
        few: which kernel.
    """
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    arguments, grid, warps = (arguments_few if few else arguments_many)(x, values, indices, bias, out)
    kernel = nm_linear_few_kernel if few else nm_linear_many_kernel
    with on(x.device):
        kernel[(grid,)](**arguments, num_warps=warps, enable_fp_fusion=True)
    return out


def _common(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> dict:
    return {
        "x_ptr": x,
        "values_ptr": values,
        "indices_ptr": indices,
        "bias_ptr": out if bias is None else bias,
        "out_ptr": out,
        "tokens": x.shape[0],
        "out_features": out.shape[1],
        "in_features": x.shape[1],
        "kept": values.shape[1],
        "index_bytes": indices.shape[1],
        "BIAS": bias is not None,
    }


def arguments_few(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> tuple[dict, int, int]:
    """Arguments, programs and warps of :func:`nm_linear_few_kernel`."""
    together = min(triton.next_power_of_2(x.shape[0]), FEW_TOKENS)
    shape = {"TOKENS": together, "ROWS": FEW_ROWS, "GROUPS": FEW_GROUPS}
    grid = triton.cdiv(out.shape[1], FEW_ROWS) * triton.cdiv(x.shape[0], together)
    return {**_common(x, values, indices, bias, out), **shape}, grid, FEW_WARPS


def arguments_many(
    x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> tuple[dict, int, int]:
    """Arguments, programs and warps of :func:`nm_linear_many_kernel`."""
    tokens, rows, columns = dot_tile(x)
    upcast = interpreted() and x.dtype == torch.bfloat16  # the interpreter multiplies bf16 as integers
    shape = {"UPCAST": upcast, "TOKENS": tokens, "ROWS": rows, "GROUPS": columns // 4}
    grid = triton.cdiv(x.shape[0], tokens) * triton.cdiv(out.shape[1], rows)
    return {**_common(x, values, indices, bias, out), **shape}, grid, 4


def dot_tile(x: torch.Tensor) -> tuple[int, int, int]:
    """Tokens, outputs and inputs of a tile for the tensor cores; smaller in fp32, which CUDA cores multiply."""
    if x.dtype == torch.float32:
        return 16, 32, 64
    return min(max(triton.next_power_of_2(x.shape[0]), 16), 64), 64, 128
