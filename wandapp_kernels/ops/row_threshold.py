"""Fused score → exact k-th highest score of every row → mask and bitmap (unstructured sparsity, compared by row)."""

from __future__ import annotations

import torch

from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.score import check, scores, why_not_fused
from wandapp_kernels.sparsity.mask import mask_from_scores
from wandapp_kernels.sparsity.packing import pack_fields, packed_bytes
from wandapp_kernels.sparsity.pattern import Pattern


def score_row_mask(
    weight: torch.Tensor,
    pattern: Pattern,
    norm: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    *,
    alpha: float = 0.0,
    samples: int | None = None,
) -> torch.Tensor:
    """``mask_from_scores(scores(...), pattern)``: bool ``[R, C]``, True = kept; ties keep the lowest column.

    Args:
        pattern: a ratio of every row.
        weight, norm, gradient, alpha, samples: as in :func:`~wandapp_kernels.ops.score.scores`.

    Raises:
        NonFiniteError: a score is NaN or infinite.
        UsageError: as ``scores``; the pattern is n:m.
    """
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    if _fused(weight, pattern, norm, gradient, alpha, samples, mask, None):
        return mask
    return mask_from_scores(scores(weight, norm, gradient, alpha=alpha, samples=samples), pattern)


def score_row_bitmap(
    weight: torch.Tensor,
    pattern: Pattern,
    norm: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    *,
    alpha: float = 0.0,
    samples: int | None = None,
) -> torch.Tensor:
    """:func:`score_row_mask` as the bitmap of a ``BitmapWeight``: uint8 ``[R, ceil(C / 8)]``, little-endian bits.

    Raises:
        NonFiniteError, UsageError: as :func:`score_row_mask`.
    """
    rows, columns = weight.shape[0], weight.shape[-1]
    bitmap = torch.empty(rows, packed_bytes(columns, 1), dtype=torch.uint8, device=weight.device)
    if _fused(weight, pattern, norm, gradient, alpha, samples, None, bitmap):
        return bitmap
    found = scores(weight, norm, gradient, alpha=alpha, samples=samples)
    return pack_fields(mask_from_scores(found, pattern), 1)


def _fused(
    weight: torch.Tensor,
    pattern: Pattern,
    norm: torch.Tensor | None,
    gradient: torch.Tensor | None,
    alpha: float,
    samples: int | None,
    mask: torch.Tensor | None,
    bitmap: torch.Tensor | None,
) -> bool:
    """Write mask or bitmap by the kernel. False when it does not run here, or met a score that is not finite."""
    if pattern.is_nm:
        raise UsageError(f"pattern {pattern} is n:m: use score_nm_mask")
    check(weight, norm, gradient, samples)
    if why_not_fused(weight, norm, gradient) is not None:
        return False
    from wandapp_kernels.kernels.row_threshold import row_threshold

    keep = weight.shape[1] - pattern.removed_per_row(weight.shape[1])
    return not row_threshold(weight, norm, gradient, alpha, samples, keep, mask, bitmap).item()
