"""RIA, relative importance and activation (Zhang et al., ICLR 2024, "Plug-and-Play"):

``S_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^½``
"""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.statistics import LayerStatistics


def ria(weight: torch.Tensor, statistics: LayerStatistics, alpha: float) -> torch.Tensor:
    absolute = weight.abs()
    smallest = torch.finfo(absolute.dtype).tiny  # an all-zero row or column scores 0, not 0/0
    by_column = absolute / absolute.sum(0, keepdim=True).clamp_min(smallest)
    by_row = absolute / absolute.sum(1, keepdim=True).clamp_min(smallest)
    return (by_column + by_row) * statistics.norm().sqrt()
