"""RGS, the regional gradient score (Wanda++, arXiv 2503.04992, section 4): ``S_ij = (α · G_ij + ‖X_j‖₂) · |W_ij|``.

``G_ij = sqrt(1/N Σ_n (∂‖f(X_n)‖₂ / ∂W_ij)²)``: the root mean square, over calibration samples, of the gradient of the
decoder block's output norm. α = 100 belongs to ``‖X_j‖₂`` over all tokens of all samples, without division.
"""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.statistics import LayerStatistics


def rgs(weight: torch.Tensor, statistics: LayerStatistics, alpha: float) -> torch.Tensor:
    assert statistics.regional_gradient is not None
    return (alpha * statistics.regional_gradient + statistics.norm()) * weight.abs()
