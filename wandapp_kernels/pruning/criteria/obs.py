"""OBS, the optimal brain surgeon saliency (Hassibi & Stork 1993; SparseGPT, arXiv 2301.00774): ``S_ij = W_ij² /
[H⁻¹]_jj``.

``H = X Xᵀ + damping``. The static form, for masks chosen before any repair; the ``obs`` update re-evaluates it
column by column on repaired weights, which is what SparseGPT does.
"""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.hessian import damped_inverse
from wandapp_kernels.pruning.statistics import LayerStatistics


def obs(weight: torch.Tensor, statistics: LayerStatistics, alpha: float) -> torch.Tensor:
    assert statistics.gram is not None
    inverse_diagonal = damped_inverse(statistics.gram).inverse.diagonal()
    scores = weight.square() / inverse_diagonal
    return torch.where(statistics.sum_squares > 0, scores, torch.zeros_like(scores))
