"""Pruner-Zero (Dong et al., ICML 2024): ``S_ij = W_ij² · minmax(G)_ij``, the best tree of its symbolic search.

``G`` is GBLM's gradient (2-norm over samples); min-max scaling runs over the whole matrix. Activations are not used.
"""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.statistics import MODEL_GRADIENT_L2, LayerStatistics


def pruner_zero(weight: torch.Tensor, statistics: LayerStatistics, alpha: float) -> torch.Tensor:
    gradient = statistics.model_gradient[MODEL_GRADIENT_L2]
    low, high = gradient.min(), gradient.max()
    scaled = (gradient - low) / (high - low).clamp_min(torch.finfo(gradient.dtype).tiny)
    return weight.square() * scaled
