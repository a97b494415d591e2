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


@dataclass(frozen=True)
class Criterion:
    """A score function and the statistics it reads."""

    score: Callable[[torch.Tensor, LayerStatistics, float], torch.Tensor]
    needs: frozenset[str]


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, frozenset()),
    "wanda": Criterion(wanda, frozenset({NORM})),
    "ria": Criterion(ria, frozenset({NORM})),
    "gblm-l1": Criterion(gblm_l1, frozenset({NORM, MODEL_GRADIENT_L1})),
    "gblm-l2": Criterion(gblm_l2, frozenset({NORM, MODEL_GRADIENT_L2})),
    "pruner-zero": Criterion(pruner_zero, frozenset({MODEL_GRADIENT_L2})),
    "rgs": Criterion(rgs, frozenset({NORM, REGIONAL_GRADIENT})),
    "obs": Criterion(obs, frozenset({GRAM})),
}

__all__ = ["CRITERIA", "Criterion"]
