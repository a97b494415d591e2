"""``y = x Wᵀ + b`` with W as a bitmap and the kept values row after row.

A value's place is its row's offset plus the number of set bits before its own. For few tokens the weights are
multiplied by CUDA cores; for many the expanded tile goes to the tensor cores.
"""

# ruff: noqa: RUF005 - Triton compiles the concatenation of tuples, not their unpacking.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from wandapp_kernels.kernels.launch import interpreted, on
from wandapp_kernels.kernels.nm_linear import dot_tile

FEW_ROWS = 4
FEW_COLUMNS = 512
FEW_TOKENS = 8
FEW_WARPS = 4
# More at once, and the places of the values would not fit the registers.
MANY_COLUMNS = 64


@triton.jit
def load_bitmap(
    values_ptr, bitmap_ptr, row, rows, offset, start, bitmap_bytes, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Columns ``start ... start + COLUMNS`` of ``row [ROWS]``, expanded, and the offset of the value after them."""
    byte = start // 8 + tl.arange(0, COLUMNS // 8)
    valid = (row < rows)[:, None] & (byte < bitmap_bytes)[None, :]
    packed = tl.load(bitmap_ptr + row[:, None] * bitmap_bytes + byte[None, :], mask=valid, other=0).to(tl.int32)
    bits = tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (ROWS, COLUMNS))
    upto = tl.cumsum(bits, axis=1)
    weights = tl.load(values_ptr + offset[:, None] + (upto - 1), mask=bits > 0, other=0.0)
    return weights, offset + tl.sum(bits, axis=1)


@triton.jit
def bitmap_linear_few_kernel(
    x_ptr,
    values_ptr,
    bitmap_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    bitmap_bytes,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``ROWS`` outputs of ``TOKENS`` tokens."""
    blocks = tl.cdiv(out_features, ROWS)
    row = ((tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first_token = (tl.program_id(0) // blocks) * TOKENS
    offset = tl.load(offsets_ptr + row, mask=row < out_features, other=0)
    sums = (tl.zeros((ROWS, COLUMNS), tl.float32),) * TOKENS
    for start in range(0, in_features, COLUMNS):
        weights, offset = load_bitmap(
            values_ptr, bitmap_ptr, row, out_features, offset, start, bitmap_bytes, ROWS, COLUMNS
        )
        column = start + tl.arange(0, COLUMNS)
        added = ()
        for t in tl.static_range(TOKENS):
            token = (first_token + t).to(tl.int64)
            width = tl.where(token < tokens, in_features, 0)
            x = tl.load(x_ptr + token * in_features + column, mask=column < width, other=0.0)
            added = added + (sums[t] + weights.to(tl.float32) * x.to(tl.float32)[None, :],)
        sums = added
    bias = tl.zeros((ROWS,), tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + row, mask=row < out_features, other=0.0).to(tl.float32)
    for t in tl.static_range(TOKENS):
        token = (first_token + t).to(tl.int64)
        y = (tl.sum(sums[t], axis=1) + bias).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token * out_features + row, y, mask=row < tl.where(token < tokens, out_features, 0))


@triton.jit
def bitmap_linear_many_kernel(
    x_ptr,
    values_ptr,
    bitmap_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    in_features,
    bitmap_bytes,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of ``TOKENS`` tokens × ``ROWS`` outputs."""
    blocks = tl.cdiv(tokens, TOKENS)
    token = ((tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    offset = tl.load(offsets_ptr + row, mask=row < out_features, other=0)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(0, in_features, COLUMNS):
        weights, offset = load_bitmap(
            values_ptr, bitmap_ptr, row, out_features, offset, start, bitmap_bytes, ROWS, COLUMNS
        )
        column = start + tl.arange(0, COLUMNS)
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


def bitmap_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    *,
    few: bool,
) -> torch.Tensor:
    """``x [M, K] → [M, rows]``, accumulated in fp32.

    Args:
        x: fp32, fp16 or bf16, contiguous.
        values, bitmap, offsets: the canonical bitmap weight ``[rows, K]``, contiguous; values in x's type.
        bias: ``[rows]`` contiguous, or None.
        few: which kernel.
    """
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    arguments, grid = arguments_bitmap(x, values, bitmap, offsets, bias, out, few=few)
    kernel = bitmap_linear_few_kernel if few else bitmap_linear_many_kernel
    with on(x.device):
        kernel[(grid,)](**arguments, num_warps=FEW_WARPS, enable_fp_fusion=True)
    return out


def arguments_bitmap(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    few: bool,
) -> tuple[dict, int]:
    """The kernel's arguments and how many programs to launch."""
    tokens, rows, _ = dot_tile(x)
    columns = MANY_COLUMNS
    if few:
        tokens, rows, columns = min(triton.next_power_of_2(x.shape[0]), FEW_TOKENS), FEW_ROWS, FEW_COLUMNS
    arguments = {
        "x_ptr": x,
        "values_ptr": values,
        "bitmap_ptr": bitmap,
        "offsets_ptr": offsets,
        "bias_ptr": out if bias is None else bias,
        "out_ptr": out,
        "tokens": x.shape[0],
        "out_features": out.shape[1],
        "in_features": x.shape[1],
        "bitmap_bytes": bitmap.shape[1],
        "BIAS": bias is not None,
        "TOKENS": tokens,
        "ROWS": rows,
        "COLUMNS": columns,
    }
    if not few:
        arguments["UPCAST"] = interpreted() and x.dtype == torch.bfloat16
    return arguments, triton.cdiv(x.shape[0], tokens) * triton.cdiv(out.shape[1], rows)
