"""Fused score → n:m mask → compressed weight. The reference computes one after the other; on a GPU that Triton serves
one kernel does it in a single pass over W and G, and gives the same bits.
"""

from __future__ import annotations

import torch

from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.score import check, scores, why_not_fused
from wandapp_kernels.sparsity.mask import mask_from_scores
from wandapp_kernels.sparsity.nm_weight import NMWeight, index_bits, kept_per_row
from wandapp_kernels.sparsity.packing import packed_bytes
from wandapp_kernels.sparsity.pattern import Pattern


def score_nm_mask(
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
        pattern: n:m.
        weight, norm, gradient, alpha, samples: as in :func:`~wandapp_kernels.ops.score.scores`.

    Raises:
        NonFiniteError: a score is NaN or infinite.
        UsageError: as ``scores``; the pattern is not n:m.
    """
    _check_nm(pattern)
    check(weight, norm, gradient, samples)
    if why_not_fused(weight, norm, gradient) is None:
        from wandapp_kernels.kernels.score_nm import score_nm

        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        flag = score_nm(weight, norm, gradient, alpha, samples, pattern.n, pattern.m, mask, None, None)
        if not flag.item():
            return mask
    return mask_from_scores(scores(weight, norm, gradient, alpha=alpha, samples=samples), pattern)


def score_compress(
    weight: torch.Tensor,
    pattern: Pattern,
    norm: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    *,
    alpha: float = 0.0,
    samples: int | None = None,
) -> NMWeight:
    """``NMWeight.compress(weight, score_nm_mask(...), pattern)``; fused when n and m are powers of two.

    Raises:
        NonFiniteError, UsageError: as :func:`score_nm_mask`.
    """
    _check_nm(pattern)
    check(weight, norm, gradient, samples)
    powers_of_two = pattern.n.bit_count() == 1 and pattern.m.bit_count() == 1
    if powers_of_two and why_not_fused(weight, norm, gradient) is None:
        from wandapp_kernels.kernels.score_nm import score_nm

        rows, columns = weight.shape
        kept = kept_per_row(columns, pattern)
        width = packed_bytes(kept, index_bits(pattern))
        values = torch.empty(rows, kept, dtype=weight.dtype, device=weight.device)
        indices = torch.empty(rows, width, dtype=torch.uint8, device=weight.device)
        flag = score_nm(weight, norm, gradient, alpha, samples, pattern.n, pattern.m, None, values, indices)
        if not flag.item():
            return NMWeight(values, indices, (rows, columns), pattern)
    mask = score_nm_mask(weight, pattern, norm, gradient, alpha=alpha, samples=samples)
    return NMWeight.compress(weight, mask, pattern)


def _check_nm(pattern: Pattern) -> None:
    if not pattern.is_nm:
        raise UsageError(f"pattern {pattern} is not n:m: use score_row_mask for unstructured sparsity")
