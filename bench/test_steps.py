"""Time of the pruning steps on one matrix: ``make bench``. Timings compare within one run only."""

from __future__ import annotations

import pytest
import torch

from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.statistics import (
    MODEL_GRADIENT_L1,
    MODEL_GRADIENT_L2,
    LayerStatistics,
)
from wandapp_kernels.pruning.updates import UPDATES
from wandapp_kernels.sparsity import Pattern, mask_from_scores

SHAPES = [(576, 1536), (1536, 2048)]


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def layer(request) -> tuple[torch.Tensor, LayerStatistics]:
    rows, columns = request.param
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator)
    gradient = torch.rand(rows, columns, generator=generator)
    statistics = LayerStatistics(
        sum_squares=x.square().sum(0),
        gram=x.T @ x,
        regional_gradient=gradient,
        model_gradient={MODEL_GRADIENT_L1: gradient, MODEL_GRADIENT_L2: gradient},
        tokens=len(x),
        sequences=1,
    )
    return weight, statistics


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "50%"])
def test_mask(benchmark, layer, pattern):
    weight, _ = layer
    benchmark(mask_from_scores, weight.abs(), Pattern.parse(pattern))


@pytest.mark.parametrize("name", CRITERIA)
def test_criterion(benchmark, layer, name):
    weight, statistics = layer
    benchmark(CRITERIA[name].score, weight, statistics, 100.0)


@pytest.mark.parametrize("name", UPDATES)
def test_update(benchmark, layer, name):
    weight, statistics = layer
    benchmark.pedantic(UPDATES[name].repair, (weight, statistics, Pattern.parse("2:4"), None), rounds=3)
