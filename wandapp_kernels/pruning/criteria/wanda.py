"""Wanda (Sun et al., ICLR 2024, arXiv 2306.11695, section 3): ``S_ij = |W_ij| · ‖X_j‖₂``."""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.statistics import LayerStatistics


def wanda(weight: torch.Tensor, statistics: LayerStatistics, alpha: float) -> torch.Tensor:
    return statistics.norm() * weight.abs()
