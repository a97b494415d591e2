"""Pruning criteria: how important each weight is. A new criterion is one function in one file and one row below.

Every function maps ``(weight [out, in] fp32, statistics, alpha)`` to scores ``[out, in]``: the lowest are pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wandapp_kernels.pruning.criteria.gblm import gblm_l1, gblm_l2
from wandapp_kernels.pruning.criteria.magnitude import magnitude
from wandapp_kernels.pruning.criteria.obs import obs
from wandapp_kernels.pruning.criteria.pruner_zero import pruner_zero
from wandapp_kernels.pruning.criteria.rgs import rgs
from wandapp_kernels.pruning.criteria.ria import ria
from wandapp_kernels.pruning.criteria.wanda import wanda
from wandapp_kernels.pruning.statistics import (
    GRAM,
    MODEL_GRADIENT_L1,
    MODEL_GRADIENT_L2,
    NORM,
    REGIONAL_GRADIENT,
    LayerStatistics,
)

# (‖X‖, G), either of them None when the score has no such factor.
Factors = Callable[[LayerStatistics], tuple[torch.Tensor | None, torch.Tensor | None]]


@dataclass(frozen=True)
class Criterion:
    """A score function and the statistics it reads.

    Attributes:
        factors: for a score of the form ``(α · G + ‖X‖) · |W|``, which fused kernels compute: ``(‖X‖, G)``.
    """

    score: Callable[[torch.Tensor, LayerStatistics, float], torch.Tensor]
    needs: frozenset[str]
    factors: Factors | None = None


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, frozenset(), lambda _: (None, None)),
    "wanda": Criterion(wanda, frozenset({NORM}), lambda statistics: (statistics.norm(), None)),
    "ria": Criterion(ria, frozenset({NORM})),
    "gblm-l1": Criterion(
        gblm_l1,
        frozenset({NORM, MODEL_GRADIENT_L1}),
        lambda statistics: (statistics.norm("mean"), statistics.model_gradient[MODEL_GRADIENT_L1]),
    ),
    "gblm-l2": Criterion(
        gblm_l2,
        frozenset({NORM, MODEL_GRADIENT_L2}),
        lambda statistics: (statistics.norm("mean"), statistics.model_gradient[MODEL_GRADIENT_L2]),
    ),
    "pruner-zero": Criterion(pruner_zero, frozenset({MODEL_GRADIENT_L2})),
    "rgs": Criterion(
        rgs,
        frozenset({NORM, REGIONAL_GRADIENT}),
        lambda statistics: (statistics.norm(), statistics.regional_gradient),
    ),
    "obs": Criterion(obs, frozenset({GRAM})),
}

__all__ = ["CRITERIA", "Criterion"]
