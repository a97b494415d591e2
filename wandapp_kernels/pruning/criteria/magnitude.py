"""Magnitude (Han et al. 2015, arXiv 1506.02626): ``S_ij = |W_ij|``."""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.statistics import LayerStatistics


def magnitude(weight: torch.Tensor, statistics: LayerStatistics, alpha: float) -> torch.Tensor:
    return weight.abs()
