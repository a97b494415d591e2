"""Every criterion against its published formula, written with loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.statistics import (
    GRAM,
    MODEL_GRADIENT_L1,
    MODEL_GRADIENT_L2,
    NORM,
    REGIONAL_GRADIENT,
    LayerStatistics,
)
from wandapp_kernels.sparsity import Pattern, mask_from_scores

SHAPES = [(1, 1), (5, 7), (33, 123)]
Rows = list[list[float]]


class Layer:
    """A random layer, its statistics, and the same as Python floats."""

    def __init__(self, rows: int, columns: int, seed: int = 0, sequences: int = 3, x_norm: str = "sum"):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(4 * columns + 3, columns, generator=generator)
        self.weight = torch.randn(rows, columns, generator=generator)
        self.statistics = LayerStatistics(
            sum_squares=inputs.square().sum(0),
            gram=inputs.T @ inputs,
            regional_gradient=torch.rand(rows, columns, generator=generator),
            model_gradient={
                MODEL_GRADIENT_L1: torch.rand(rows, columns, generator=generator),
                MODEL_GRADIENT_L2: torch.rand(rows, columns, generator=generator),
            },
            tokens=len(inputs),
            sequences=sequences,
            x_norm=x_norm,
        )
        self.w: Rows = self.weight.double().tolist()
        self.x: list[float] = inputs.double().square().sum(0).tolist()  # Σ x² of each channel
        self.rows, self.columns = rows, columns

    def gradient(self, which: str) -> Rows:
        return self.statistics.model_gradient[which].double().tolist()

    def map(self, score: Callable[[int, int], float]) -> Rows:
        return [[score(i, j) for j in range(self.columns)] for i in range(self.rows)]


def magnitude(a: Layer, alpha: float) -> Rows:
    return a.map(lambda i, j: abs(a.w[i][j]))


def wanda(a: Layer, alpha: float) -> Rows:
    return a.map(lambda i, j: abs(a.w[i][j]) * math.sqrt(a.x[j]))


def ria(a: Layer, alpha: float) -> Rows:
    row = [sum(abs(v) for v in a.w[i]) for i in range(a.rows)]
    column = [sum(abs(a.w[i][j]) for i in range(a.rows)) for j in range(a.columns)]
    return a.map(lambda i, j: (abs(a.w[i][j]) / column[j] + abs(a.w[i][j]) / row[i]) * math.sqrt(a.x[j]) ** 0.5)


def gblm(which: str) -> Callable[[Layer, float], Rows]:
    def score(a: Layer, alpha: float) -> Rows:
        g = a.gradient(which)
        norm = [math.sqrt(x / a.statistics.sequences) for x in a.x]
        return a.map(lambda i, j: abs(a.w[i][j]) * norm[j] + alpha * abs(a.w[i][j]) * g[i][j])

    return score


def pruner_zero(a: Layer, alpha: float) -> Rows:
    g = a.gradient(MODEL_GRADIENT_L2)
    low, high = min(map(min, g)), max(map(max, g))
    return a.map(lambda i, j: a.w[i][j] ** 2 * ((g[i][j] - low) / (high - low) if high > low else 0.0))


def rgs(a: Layer, alpha: float) -> Rows:
    assert a.statistics.regional_gradient is not None
    g = a.statistics.regional_gradient.double().tolist()
    return a.map(lambda i, j: (alpha * g[i][j] + math.sqrt(a.x[j])) * abs(a.w[i][j]))


def obs(a: Layer, alpha: float) -> Rows:
    assert a.statistics.gram is not None
    hessian = a.statistics.gram.double()
    damping = 0.01 * sum(hessian[j, j].item() for j in range(a.columns)) / a.columns
    inverse = torch.linalg.inv(hessian + damping * torch.eye(a.columns, dtype=torch.float64))
    return a.map(lambda i, j: a.w[i][j] ** 2 / inverse[j, j].item())


PUBLISHED: dict[str, Callable[[Layer, float], Rows]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "ria": ria,
    "gblm-l1": gblm(MODEL_GRADIENT_L1),
    "gblm-l2": gblm(MODEL_GRADIENT_L2),
    "pruner-zero": pruner_zero,
    "rgs": rgs,
    "obs": obs,
}


def test_every_criterion_has_a_published_formula_here() -> None:
    assert PUBLISHED.keys() == CRITERIA.keys()


@pytest.mark.parametrize("alpha", [100.0, 0.0, 1.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_scores_equal_the_published_formula(name: str, shape: tuple[int, int], alpha: float) -> None:
    layer = Layer(*shape)
    expected = torch.tensor(PUBLISHED[name](layer, alpha), dtype=torch.float64)
    scores = CRITERIA[name].score(layer.weight, layer.statistics, alpha)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_reads_only_what_it_declares(name: str) -> None:
    layer = Layer(6, 9)
    needs, full = CRITERIA[name].needs, layer.statistics
    least = LayerStatistics(
        sum_squares=full.sum_squares if needs & {NORM, GRAM} else torch.full_like(full.sum_squares, torch.nan),
        gram=full.gram if GRAM in needs else None,
        regional_gradient=full.regional_gradient if REGIONAL_GRADIENT in needs else None,
        model_gradient={which: g for which, g in full.model_gradient.items() if which in needs},
        sequences=full.sequences,
    )
    score = CRITERIA[name].score
    assert torch.equal(score(layer.weight, least, 100.0), score(layer.weight, full, 100.0))


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_leave_weight_and_statistics_as_they_were(name: str) -> None:
    layer, untouched = Layer(6, 9), Layer(6, 9)
    CRITERIA[name].score(layer.weight, layer.statistics, 100.0)
    assert torch.equal(layer.weight, untouched.weight)
    assert torch.equal(layer.statistics.sum_squares, untouched.statistics.sum_squares)
    assert layer.statistics.gram is not None and untouched.statistics.gram is not None
    assert torch.equal(layer.statistics.gram, untouched.statistics.gram)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("what", ["zero row", "zero column", "zero weight", "dead channel", "all dead", "no gradient"])
def test_scores_are_finite_whatever_is_zero(name: str, what: str) -> None:
    layer = Layer(5, 7)
    statistics, dead = layer.statistics, {"dead channel": [3], "all dead": list(range(7))}.get(what, [])
    assert statistics.gram is not None and statistics.regional_gradient is not None
    layer.weight[{"zero row": 2, "zero weight": slice(None)}.get(what, slice(0))] = 0
    layer.weight[:, 4 if what == "zero column" else slice(0)] = 0
    statistics.sum_squares[dead] = 0
    statistics.gram[dead] = 0
    statistics.gram[:, dead] = 0
    if what == "no gradient":
        for gradient in (statistics.regional_gradient, *statistics.model_gradient.values()):
            gradient.zero_()
    scores = CRITERIA[name].score(layer.weight, statistics, 100.0)
    assert torch.isfinite(scores).all() and (scores >= 0).all()
    if what in ("zero row", "zero column", "zero weight"):
        assert torch.equal(scores[layer.weight == 0], torch.zeros(int((layer.weight == 0).sum())))
    for pattern in map(Pattern.parse, ("2:4", "50%")):
        mask_from_scores(scores, pattern)


@pytest.mark.parametrize("name", ["wanda", "ria", "obs"])
def test_a_dead_channel_scores_zero_where_only_inputs_count(name: str) -> None:
    layer = Layer(5, 7)
    statistics = layer.statistics
    assert statistics.gram is not None
    statistics.sum_squares[3] = 0
    statistics.gram[3], statistics.gram[:, 3] = 0, 0
    scores = CRITERIA[name].score(layer.weight, statistics, 100.0)
    assert (scores[:, 3] == 0).all() and (scores[:, [0, 1, 2, 4, 5, 6]] > 0).all()


@pytest.mark.parametrize("x_norm", ["sum", "mean"])
def test_rgs_without_its_gradient_is_wanda_bit_for_bit(x_norm: str) -> None:
    layer = Layer(33, 123, x_norm=x_norm)
    assert torch.equal(
        CRITERIA["rgs"].score(layer.weight, layer.statistics, 0.0),
        CRITERIA["wanda"].score(layer.weight, layer.statistics, 100.0),
    )


def test_x_norm_mean_divides_by_the_root_of_the_sequences() -> None:
    total, mean = Layer(5, 7, sequences=16), Layer(5, 7, sequences=16, x_norm="mean")
    for name in ("wanda", "rgs"):
        alone = [CRITERIA[name].score(a.weight, a.statistics, 0.0) for a in (total, mean)]
        torch.testing.assert_close(alone[0], 4 * alone[1], rtol=0, atol=0)
    both = [CRITERIA["rgs"].score(a.weight, a.statistics, 1.0) for a in (total, mean)]
    assert total.statistics.regional_gradient is not None
    difference = 0.75 * total.statistics.norm("sum") * total.weight.abs()
    torch.testing.assert_close(both[0] - both[1], difference, rtol=1e-5, atol=1e-5)


def test_gblm_always_takes_wandas_norm() -> None:
    total, mean = Layer(5, 7), Layer(5, 7, x_norm="mean")
    for name in ("gblm-l1", "gblm-l2"):
        assert torch.equal(*(CRITERIA[name].score(a.weight, a.statistics, 100.0) for a in (total, mean)))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_obs_masks_do_not_depend_on_the_scale_of_the_inputs(scale: float) -> None:
    """A dead channel, whose diagonal has to be invented, is what could break this."""
    layer = Layer(8, 12)
    statistics = layer.statistics
    assert statistics.gram is not None
    statistics.gram[5], statistics.gram[:, 5], statistics.sum_squares[5] = 0, 0, 0
    expected = CRITERIA["obs"].score(layer.weight, statistics, 0.0)
    statistics.gram, statistics.sum_squares = statistics.gram * scale, statistics.sum_squares * scale
    torch.testing.assert_close(
        CRITERIA["obs"].score(layer.weight, statistics, 0.0) / scale, expected, rtol=1e-4, atol=0
    )


def test_a_poisoned_statistic_is_refused_when_masks_are_made() -> None:
    layer = Layer(4, 8)
    layer.statistics.sum_squares[2] = torch.nan
    scores = CRITERIA["wanda"].score(layer.weight, layer.statistics, 0.0)
    with pytest.raises(NonFiniteError, match="4 of 32"):
        mask_from_scores(scores, Pattern.parse("2:4"))
