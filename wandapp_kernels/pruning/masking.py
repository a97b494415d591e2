"""The mask of one Linear: by a fused kernel where there is one for the score and the device, else score by score."""

from __future__ import annotations

import torch

from wandapp_kernels.ops.row_threshold import score_row_mask
from wandapp_kernels.ops.score import why_not_fused
from wandapp_kernels.ops.score_compress import score_nm_mask
from wandapp_kernels.pruning.criteria import Criterion
from wandapp_kernels.pruning.statistics import LayerStatistics
from wandapp_kernels.sparsity import Pattern, mask_from_scores


def choose_mask(
    criterion: Criterion,
    weight: torch.Tensor,
    statistics: LayerStatistics,
    pattern: Pattern,
    *,
    alpha: float = 0.0,
    group: str = "row",
) -> torch.Tensor:
    """bool ``[out, in]``, True = kept: the highest scores that the pattern allows.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    if criterion.factors is not None and (pattern.is_nm or group == "row"):
        norm, gradient = criterion.factors(statistics)
        if why_not_fused(weight, norm, gradient) is None:
            fused = score_nm_mask if pattern.is_nm else score_row_mask
            return fused(weight, pattern, norm, gradient, alpha=alpha)
    return mask_from_scores(criterion.score(weight, statistics, alpha), pattern, group)
