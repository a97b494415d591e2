"""Updates against the papers' algorithms in float64: unblocked, one row at a time, an inverse at every step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp_kernels.pruning.statistics import LayerStatistics
from wandapp_kernels.pruning.updates import UPDATES
from wandapp_kernels.pruning.updates.admm import admm, admm_pcg, least_squares
from wandapp_kernels.pruning.updates.obs import obs
from wandapp_kernels.sparsity import Pattern, mask_from_scores, satisfies

PATTERNS = ("2:4", "4:8", "3:5", "50%", "30%")


class Layer:
    """A random layer with correlated inputs; ``dead`` channels are zero in every token."""

    def __init__(self, rows: int, columns: int, tokens: int | None = None, seed: int = 0, dead: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(tokens or 3 * columns, columns, generator=generator)
        inputs += 0.5 * inputs.roll(1, 1) + torch.rand(columns, generator=generator)
        inputs[:, list(dead)] = 0
        self.weight = torch.randn(rows, columns, generator=generator)
        self.gram = inputs.T @ inputs
        self.statistics = LayerStatistics(self.gram.diagonal(), gram=self.gram)

    def wanda_mask(self, pattern: Pattern) -> torch.Tensor:
        return mask_from_scores(self.weight.abs() * self.gram.diagonal().sqrt(), pattern)

    def error(self, weight: torch.Tensor) -> float:
        """``‖(Ŵ - W) X‖²``, without damping."""
        difference = (weight - self.weight).double()
        return float(((difference @ self.gram.double()) * difference).sum())


def hessian_of(gram: torch.Tensor, damping: float) -> torch.Tensor:
    hessian = gram.double().clone()
    live = [hessian[j, j].item() for j in range(len(gram)) if hessian[j, j] != 0]
    mean = sum(live) / len(live) if live else 1.0
    for j in range(len(gram)):
        hessian[j, j] = (hessian[j, j] if hessian[j, j] != 0 else mean) + damping * mean
    return hessian


def smallest(scores: list[tuple[float, int, int]], count: int) -> list[tuple[int, int]]:
    """Where the ``count`` lowest scores are; of equal ones the last go first."""
    ordered = sorted(scores, key=lambda item: (item[0], -item[1], -item[2]))
    return [(i, j) for _, i, j in ordered[:count]]


def naive_obs(
    layer: Layer, pattern: Pattern, given: torch.Tensor | None = None, block: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT, algorithm 1, as stated before its Cholesky reformulation: pruning ``w_j`` moves the weights to its
    right by ``-w_j / [H_F⁻¹]_jj · [H_F⁻¹]_j`` with ``F`` the columns from j on."""
    weight, hessian = layer.weight.double().clone(), hessian_of(layer.gram, 0.01)
    weight[:, layer.gram.diagonal() == 0] = 0
    rows, columns = weight.shape
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    mask = torch.ones(rows, columns, dtype=torch.bool) if given is None else given

    def saliencies(chosen: range, among: range) -> list[tuple[float, int, int]]:
        return [(weight[i, j].item() ** 2 / inverses[j][0, 0].item(), i, j) for i in chosen for j in among]

    removed = 0
    for j in range(columns):
        if given is None and pattern.is_nm and j % pattern.m == 0:
            group = range(j, min(j + pattern.m, columns))
            for i in range(rows):
                for place in smallest(saliencies(range(i, i + 1), group), max(len(group) - pattern.n, 0)):
                    mask[place] = False
        elif given is None and not pattern.is_nm and j % block == 0:
            among = range(j, min(j + block, columns))
            due = pattern.removed_per_row(rows * among.stop) - removed
            removed += due
            for place in smallest(saliencies(range(rows), among), due):
                mask[place] = False
        for i in range(rows):
            if not mask[i, j]:
                weight[i, j:] -= weight[i, j].item() / inverses[j][0, 0] * inverses[j][0]
                weight[i, j] = 0
    return weight, mask


def naive_admm(
    layer: Layer, pattern: Pattern, given: torch.Tensor | None = None, iterations: int = 20
) -> tuple[torch.Tensor, torch.Tensor]:
    """ADMM as published, one row at a time, solving instead of inverting."""
    norm = layer.gram.double().diagonal().sqrt()
    safe = [v if v > 0 else 1.0 for v in norm.tolist()]
    columns = len(safe)
    hessian = torch.tensor(
        [[layer.gram[i, j].item() / (safe[i] * safe[j]) for j in range(columns)] for i in range(columns)]
    )
    hessian = hessian_of(hessian, 0.1)
    system = hessian + torch.eye(columns, dtype=torch.float64)
    repaired, masks = [], []
    for i, row in enumerate(layer.weight.double()):
        start = row * norm
        w, u = start.clone(), torch.zeros_like(start)
        mask = torch.ones(columns, dtype=torch.bool) if given is None else given[i]
        for t in range(1, iterations + 1):
            if given is None and t <= 15:
                mask = naive_ramp((w + u).abs().tolist(), pattern, t / 15)
            z = (w + u) * mask
            u = u + w - z
            w = torch.linalg.solve(system, hessian @ start + (z - u))
        repaired.append((w + u) * mask / torch.tensor(safe))
        masks.append(mask)
    return torch.stack(repaired), torch.stack(masks)


def naive_ramp(scores: list[float], pattern: Pattern, t: float) -> torch.Tensor:
    """Protect what the pattern will keep, remove the lowest of the rest up to ``s (1 - (1 - t)³)``."""
    columns = len(scores)
    width = pattern.m or columns
    leaving: list[tuple[int, int]] = []
    for start in range(0, columns, width):
        group = [(scores[j], 0, j) for j in range(start, min(start + width, columns))]
        leaving += smallest(group, pattern.removed_per_row(len(group)))
    count = round((1 - (1 - t) ** 3) * pattern.removed_per_row(columns))
    mask = torch.ones(columns, dtype=torch.bool)
    for _, j in smallest([(scores[j], 0, j) for _, j in leaving], count):
        mask[j] = False
    return mask


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("shape", [(4, 37), (3, 48), (1, 1), (2, 3), (5, 16)], ids=str)
@pytest.mark.parametrize("text", PATTERNS)
def test_obs_with_its_own_mask_equals_unblocked_obs(text: str, shape: tuple[int, int], block: int) -> None:
    layer, pattern = Layer(*shape), Pattern.parse(text)
    repaired = obs(layer.weight, layer.statistics, pattern, block=block)
    weight, mask = naive_obs(layer, pattern, block=block)
    assert torch.equal(repaired.mask, mask)
    assert satisfies(repaired.mask, pattern)
    torch.testing.assert_close(repaired.weight.double(), weight, rtol=1e-3, atol=1e-4)
    assert repaired.warning == ""


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("text", ["2:4", "4:8", "3:5", "50%", "none", "all", "uneven"])
def test_obs_with_a_fixed_mask_equals_unblocked_obs(text: str, block: int) -> None:
    layer = Layer(4, 37)
    special = {"none": torch.ones(4, 37), "all": torch.zeros(4, 37), "uneven": layer.weight > 0.5}
    pattern = Pattern.parse("2:4" if text in special else text)
    given = special[text].bool() if text in special else layer.wanda_mask(pattern)
    before = given.clone()
    repaired = obs(layer.weight, layer.statistics, pattern, given, block=block)
    weight, _ = naive_obs(layer, pattern, given, block)
    assert torch.equal(repaired.mask, before) and torch.equal(given, before)
    torch.testing.assert_close(repaired.weight.double(), weight, rtol=1e-3, atol=1e-4)
    if text == "none":
        assert torch.equal(repaired.weight, layer.weight)


@pytest.mark.parametrize("rows, columns", [(1, 150), (3, 150), (1, 37), (7, 129)])
@pytest.mark.parametrize("percent", [1, 29, 30, 50, 99])
def test_unstructured_obs_removes_the_exact_count_over_all_blocks(rows: int, columns: int, percent: int) -> None:
    """Rounding down in each block of columns would leave more weights than the ratio allows."""
    layer, pattern = Layer(rows, columns), Pattern.parse(f"{percent}%")
    for block in (16, 128):
        mask = obs(layer.weight, layer.statistics, pattern, block=block).mask
        assert int((~mask).sum()) == percent * rows * columns // 100
        assert satisfies(mask, pattern)


def test_a_block_is_cut_to_whole_groups() -> None:
    layer, pattern = Layer(4, 60), Pattern.parse("3:5")
    repaired = [obs(layer.weight, layer.statistics, pattern, block=block) for block in (3, 16, 128)]
    for other in repaired[1:]:
        assert torch.equal(other.mask, repaired[0].mask)
        torch.testing.assert_close(other.weight, repaired[0].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", PATTERNS)
def test_admm_equals_the_published_iteration(text: str) -> None:
    layer, pattern = Layer(3, 22), Pattern.parse(text)
    repaired = admm(layer.weight, layer.statistics, pattern)
    weight, mask = naive_admm(layer, pattern)
    assert torch.equal(repaired.mask, mask)
    assert satisfies(repaired.mask, pattern)
    torch.testing.assert_close(repaired.weight.double(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 2, 5, 20])
def test_admm_with_a_fixed_mask_equals_the_published_iteration(iterations: int) -> None:
    layer, pattern = Layer(3, 22, dead=(4, 9)), Pattern.parse("2:4")
    given = layer.wanda_mask(pattern)
    repaired = admm(layer.weight, layer.statistics, pattern, given, iterations=iterations)
    weight, _ = naive_admm(layer, pattern, given, iterations)
    assert torch.equal(repaired.mask, given)
    torch.testing.assert_close(repaired.weight.double(), weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("iterations", [1, 4, 15, 16])
def test_admm_reaches_the_pattern_however_few_iterations(text: str, iterations: int) -> None:
    layer, pattern = Layer(3, 37), Pattern.parse(text)
    mask = admm(layer.weight, layer.statistics, pattern, iterations=iterations).mask
    assert (~mask).sum(1).tolist() == [pattern.removed_per_row(37)] * 3 and satisfies(mask, pattern)


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("damping", [0.01, 1e-3])
def test_least_squares_converges_to_the_normal_equations(text: str, damping: float) -> None:
    """As many steps as there are columns are enough, which steepest descent would not manage."""
    layer = Layer(5, 24)
    mask = layer.wanda_mask(Pattern.parse(text))
    found = least_squares(layer.weight, layer.statistics, mask, layer.weight * mask, steps=24, damping=damping)
    hessian, target = hessian_of(layer.gram, damping), layer.weight.double()
    expected = torch.zeros_like(target)
    for i, support in enumerate(mask):
        right = hessian[support] @ target[i]
        expected[i, support] = torch.linalg.solve(hessian[support][:, support], right)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 60), st.sampled_from(PATTERNS), st.integers(0, 2**31))
def test_no_step_of_least_squares_raises_the_error(rows: int, columns: int, tokens: int, text: str, seed: int) -> None:
    layer = Layer(rows, columns, tokens, seed)
    mask = layer.wanda_mask(Pattern.parse(text))
    hessian = hessian_of(layer.gram, 0.01)
    plain = layer.weight * mask
    errors = []
    for steps in (0, 1, 2, 5, 10, 40):
        found = least_squares(layer.weight, layer.statistics, mask, plain, steps=steps)
        difference = (found - layer.weight).double()
        errors.append(float(((difference @ hessian) * difference).sum()))
    slack = 1e-5 * errors[0] + 1e-6 * float(hessian.diagonal().sum())
    assert all(later <= earlier + slack for earlier, later in pairwise(errors))


def test_least_squares_stays_at_the_solution() -> None:
    """Residuals of exactly zero must not divide zero by zero."""
    layer = Layer(3, 8)
    everything = torch.ones(3, 8, dtype=torch.bool)
    assert torch.equal(least_squares(layer.weight, layer.statistics, everything, layer.weight), layer.weight)
    nothing = torch.zeros(3, 8, dtype=torch.bool)
    assert not least_squares(layer.weight, layer.statistics, nothing, torch.zeros(3, 8)).any()


def test_admm_pcg_is_admm_then_least_squares_on_its_support() -> None:
    layer, pattern = Layer(6, 40), Pattern.parse("2:4")
    first, polished = (update(layer.weight, layer.statistics, pattern) for update in (admm, admm_pcg))
    assert torch.equal(polished.mask, first.mask)
    expected = least_squares(layer.weight, layer.statistics, first.mask, first.weight)
    assert torch.equal(polished.weight, expected)
    assert layer.error(polished.weight) < layer.error(first.weight)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Layer, Pattern, torch.Tensor | None]:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    dead = draw(st.sets(st.integers(0, columns - 1), max_size=columns))
    tokens = draw(st.integers(1, 3 * columns))
    layer = Layer(rows, columns, tokens, draw(st.integers(0, 2**31)), tuple(dead) if draw(st.booleans()) else ())
    pattern = Pattern.parse(draw(st.sampled_from([*PATTERNS, "1:16", "15:16", "90%", "1%"])))
    return layer, pattern, layer.wanda_mask(pattern) if draw(st.booleans()) else None


@pytest.mark.parametrize("name", UPDATES)
@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_every_update_obeys_pattern_and_mask(name: str, problem: tuple[Layer, Pattern, torch.Tensor | None]) -> None:
    layer, pattern, given_mask = problem
    weight, gram = layer.weight.clone(), layer.gram.clone()
    repaired = UPDATES[name].repair(layer.weight, layer.statistics, pattern, given_mask)
    assert repaired.weight.dtype == torch.float32 and torch.isfinite(repaired.weight).all()
    assert repaired.mask.dtype == torch.bool and repaired.mask.shape == repaired.weight.shape
    assert not repaired.weight[~repaired.mask].any()
    assert satisfies(repaired.mask, pattern)
    assert given_mask is None or torch.equal(repaired.mask, given_mask)
    assert not repaired.weight[:, layer.gram.diagonal() == 0].any()
    assert torch.equal(layer.weight, weight) and torch.equal(layer.gram, gram)


@pytest.mark.parametrize("name", ["admm", "admm-pcg"])
@settings(deadline=None, max_examples=60)
@given(problem=problems())
def test_admm_is_never_worse_than_plain_masking(name: str, problem: tuple[Layer, Pattern, torch.Tensor | None]) -> None:
    layer, pattern, given_mask = problem
    repaired = UPDATES[name].repair(layer.weight, layer.statistics, pattern, given_mask)
    plain = layer.error(layer.weight * repaired.mask)
    assert layer.error(repaired.weight) <= 1.02 * plain + 1e-6 * float(layer.gram.diagonal().sum())


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("seed", range(4))
def test_obs_beats_plain_masking_over_a_layer(text: str, seed: int) -> None:
    """Over a layer, not in every row: a kept column is frozen before the columns to its right are pruned."""
    layer, pattern = Layer(32, 48, seed=seed), Pattern.parse(text)
    for given_mask in (None, layer.wanda_mask(pattern)):
        repaired = obs(layer.weight, layer.statistics, pattern, given_mask)
        assert layer.error(repaired.weight) < 0.9 * layer.error(layer.weight * repaired.mask)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("dead", [(0,), (3, 4, 5, 6), tuple(range(11)), tuple(range(12))], ids=len)
def test_dead_channels_end_as_zero_weights(name: str, dead: tuple[int, ...]) -> None:
    """A mask may keep a dead channel: its weight is zero all the same, and the live ones are as without it."""
    layer, pattern = Layer(4, 12, dead=dead), Pattern.parse("2:4")
    live = [j for j in range(12) if j not in dead]
    for given_mask in (None, torch.ones(4, 12, dtype=torch.bool), layer.weight > 0):
        repaired = UPDATES[name].repair(layer.weight, layer.statistics, pattern, given_mask)
        assert torch.isfinite(repaired.weight).all()
        assert not repaired.weight[:, list(dead)].any()
        if given_mask is not None and live:
            gram = layer.gram[live][:, live]
            alone = LayerStatistics(gram.diagonal(), gram=gram)
            expected = UPDATES[name].repair(layer.weight[:, live], alone, pattern, given_mask[:, live])
            torch.testing.assert_close(repaired.weight[:, live], expected.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_repairs_do_not_depend_on_the_scale_of_the_inputs(name: str, scale: float) -> None:
    layer, pattern = Layer(4, 20, dead=(7,)), Pattern.parse("2:4")
    scaled = LayerStatistics(layer.gram.diagonal() * scale, gram=layer.gram * scale)
    expected = UPDATES[name].repair(layer.weight, layer.statistics, pattern, None)
    repaired = UPDATES[name].repair(layer.weight, scaled, pattern, None)
    assert torch.equal(repaired.mask, expected.mask)
    torch.testing.assert_close(repaired.weight, expected.weight, rtol=1e-3, atol=1e-4)


def test_raised_damping_is_told() -> None:
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    statistics = LayerStatistics(gram.diagonal(), gram=gram)
    repaired = obs(torch.tensor([[2.0, 1.0]]), statistics, Pattern.parse("1:2"))
    assert "damping was raised from 0.01 to 0.1" in repaired.warning
    assert torch.isfinite(repaired.weight).all() and repaired.mask.sum() == 1


def test_every_update_names_a_known_criterion() -> None:
    from wandapp_kernels.pruning.criteria import CRITERIA

    for update in UPDATES.values():
        assert update.joint_criterion in CRITERIA
