"""Compressed weights by pattern name, and the names of their tensors in a state dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from wandapp_kernels.ops.layouts import CompressedWeight
from wandapp_kernels.sparsity import BitmapWeight, NMWeight, Pattern, satisfies
from wandapp_kernels.sparsity.nm_weight import check_weight, index_bits, kept_per_row
from wandapp_kernels.sparsity.packing import packed_bytes
from wandapp_kernels.sparsity.pattern import UNSTRUCTURED as UNSTRUCTURED

# Types a saved weight may have, by the name the checkpoint uses.
DTYPE_NAMES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
DTYPES = tuple(DTYPE_NAMES.values())

# n:m patterns worth a try, in this order: of two that take the same bytes the first is used.
NM_PATTERNS = ("2:4", "1:4", "4:8")


def pattern_of(weight: CompressedWeight) -> str:
    """``"2:4"``, … or ``"unstructured"``."""
    return str(weight.pattern) if isinstance(weight, NMWeight) else UNSTRUCTURED


def tensor_names(pattern: str) -> tuple[str, ...]:
    """The canonical tensors of a weight, values first."""
    if pattern == UNSTRUCTURED:
        return "weight_values", "weight_bitmap", "weight_row_offsets"
    return "weight_values", "weight_indices"


def tensor_shapes(shape: tuple[int, int], pattern: str, stored: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape, for a dense weight ``shape``; ``stored`` values are kept where the pattern is free."""
    rows, columns = shape
    if pattern == UNSTRUCTURED:
        shapes: tuple[tuple[int, ...], ...] = ((stored,), (rows, packed_bytes(columns, 1)), (rows + 1,))
    else:
        parsed = Pattern.parse(pattern)
        kept = kept_per_row(columns, parsed)
        shapes = ((rows, kept), (rows, packed_bytes(kept, index_bits(parsed))))
    return dict(zip(tensor_names(pattern), shapes, strict=True))


def to_tensors(weight: CompressedWeight) -> dict[str, torch.Tensor]:
    """Canonical name -> tensor."""
    if isinstance(weight, BitmapWeight):
        tensors: tuple[torch.Tensor, ...] = (weight.values, weight.bitmap, weight.row_offsets)
    else:
        tensors = (weight.values, weight.indices)
    return dict(zip(tensor_names(pattern_of(weight)), tensors, strict=True))


def from_tensors(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], pattern: str) -> CompressedWeight:
    """The inverse of `to_tensors`; nothing is checked (``validate()`` does that)."""
    values, *rest = (tensors[name] for name in tensor_names(pattern))
    if pattern == UNSTRUCTURED:
        bitmap, row_offsets = rest
        return BitmapWeight(values, bitmap, row_offsets, shape)
    (indices,) = rest
    return NMWeight(values, indices, shape, Pattern.parse(pattern))


def compressed_bytes(pattern: str, rows: int, columns: int, kept: int, element_size: int) -> int:
    """Bytes of the canonical form of a weight ``[rows, columns]`` with ``kept`` non-zeros."""
    if pattern == UNSTRUCTURED:
        return kept * element_size + rows * packed_bytes(columns, 1) + 8 * (rows + 1)
    parsed = Pattern.parse(pattern)
    per_row = kept_per_row(columns, parsed)
    return rows * (per_row * element_size + packed_bytes(per_row, index_bits(parsed)))


def smallest_pattern(mask: torch.Tensor, element_size: int) -> str:
    """The form that takes the fewest bytes, of `NM_PATTERNS` where they hold and ``"unstructured"``, which always does.

    Args:
        mask: bool ``[out, in]``, True = kept.
    """
    rows, columns = mask.shape
    kept = int(mask.sum())
    candidates = [name for name in NM_PATTERNS if satisfies(mask, Pattern.parse(name))] + [UNSTRUCTURED]
    return min(candidates, key=lambda name: compressed_bytes(name, rows, columns, kept, element_size))


def compress(weight: torch.Tensor, pattern: str = "auto", mask: torch.Tensor | None = None) -> CompressedWeight:
    """Compress ``weight [out, in]`` as n:m, as ``"unstructured"``, or (``"auto"``) as `smallest_pattern`.

    Raises:
        SparsityError, NonFiniteError: see ``NMWeight.compress`` and ``BitmapWeight.compress``.
        UsageError: ``pattern`` is none of these.
    """
    if pattern == "auto":
        check_weight(weight, mask)
        pattern = smallest_pattern(weight != 0 if mask is None else mask, weight.element_size())
    if pattern == UNSTRUCTURED:
        return BitmapWeight.compress(weight, mask)
    return NMWeight.compress(weight, mask, pattern)
