"""GBLM-Pruner (Das et al. 2023, arXiv 2311.04902): ``S_ij = |W_ij| · (‖X_j‖₂ + α · ‖G_ij‖_p)``, α = 100.

``G`` holds the gradients of the dense model's causal-LM loss, one per calibration sample; the p-norm (p = 1 or 2) runs
over the samples and is not divided by their number. ``‖X_j‖₂`` is Wanda's: ``sqrt(Σ x² / sequences)``, whatever the
setting ``x_norm`` says, because α is only meaningful with it.
"""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.statistics import MODEL_GRADIENT_L1, MODEL_GRADIENT_L2, LayerStatistics


def gblm_l1(weight: torch.Tensor, statistics: LayerStatistics, alpha: float) -> torch.Tensor:
    return (statistics.norm("mean") + alpha * statistics.model_gradient[MODEL_GRADIENT_L1]) * weight.abs()


def gblm_l2(weight: torch.Tensor, statistics: LayerStatistics, alpha: float) -> torch.Tensor:
    return (statistics.norm("mean") + alpha * statistics.model_gradient[MODEL_GRADIENT_L2]) * weight.abs()
