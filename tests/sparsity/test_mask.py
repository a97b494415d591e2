from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.sparsity import Pattern, keep_highest, mask_from_scores, satisfies, sparsity_of

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
AWKWARD = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 0.1, 1 / 3)
NM = st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def best(scores: list[float], keep: int) -> list[bool]:
    """The definition: the highest are kept, the lowest index among equals (Python's 0.0 == -0.0)."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    kept = set(order[:keep])
    return [j in kept for j in range(len(scores))]


def slow_mask(scores: torch.Tensor, pattern: Pattern, group: str = "row") -> torch.Tensor:
    rows = scores.double().tolist()
    if pattern.is_nm:
        chunks = [[row[j : j + pattern.m] for j in range(0, len(row), pattern.m)] for row in rows]
        kept = [[k for chunk in row for k in best(chunk, pattern.n)] for row in chunks]
    elif group == "row":
        kept = [best(row, len(row) - pattern.removed_per_row(len(row))) for row in rows]
    else:
        flat = [score for row in rows for score in row]
        kept = best(flat, len(flat) - pattern.removed_per_row(len(flat)))
    return torch.tensor(kept).reshape(scores.shape)


@st.composite
def score_matrices(draw: st.DrawFn) -> torch.Tensor:
    """Ties, signed zeros, denormals and huge values, or random values; some rows zero, some all equal."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 41))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        values = torch.tensor(AWKWARD)[torch.randint(len(AWKWARD), (rows, columns), generator=generator)]
    else:
        values = torch.randn(rows, columns, generator=generator)
    for row in range(rows):
        special = draw(st.sampled_from(["as drawn", "zero", "equal"]))
        if special != "as drawn":
            values[row] = 0.0 if special == "zero" else values[row, 0].item()
    limit = torch.finfo(dtype).max
    return values.double().clamp(-limit, limit).to(dtype)


@settings(deadline=None)
@given(score_matrices(), NM)
def test_nm_masks_equal_the_slow_definition(scores: torch.Tensor, nm: tuple[int, int]) -> None:
    pattern = Pattern.parse("{}:{}".format(*nm))
    mask = mask_from_scores(scores, pattern)
    assert mask.dtype == torch.bool and mask.shape == scores.shape and mask.is_contiguous()
    assert torch.equal(mask, slow_mask(scores, pattern))
    assert satisfies(mask, pattern)


@settings(deadline=None)
@given(score_matrices(), NM)
def test_every_group_and_tail_keeps_exactly_what_it_may(scores: torch.Tensor, nm: tuple[int, int]) -> None:
    n, m = nm
    mask = mask_from_scores(scores, Pattern.parse(f"{n}:{m}"))
    for start in range(0, scores.shape[1], m):
        group = mask[:, start : start + m]
        assert group.sum(1).tolist() == [min(n, group.shape[1])] * len(scores)


@settings(deadline=None)
@given(score_matrices(), st.integers(1, 99), st.sampled_from(["row", "layer"]))
def test_unstructured_masks_equal_the_slow_definition(scores: torch.Tensor, percent: int, group: str) -> None:
    pattern = Pattern.parse(f"{percent}%")
    mask = mask_from_scores(scores, pattern, group)
    assert torch.equal(mask, slow_mask(scores, pattern, group))
    assert satisfies(mask, pattern)
    if group == "row":
        assert (~mask).sum(1).tolist() == [percent * scores.shape[1] // 100] * len(scores)
    else:
        assert int((~mask).sum()) == percent * scores.numel() // 100


@settings(deadline=None)
@given(score_matrices(), st.data())
def test_keep_highest_counts_from_none_to_all(scores: torch.Tensor, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, scores.shape[1]))
    mask = keep_highest(scores, keep)
    assert mask.tolist() == [best(row, keep) for row in scores.double().tolist()]


@pytest.mark.parametrize("text", ["2:4", "4:8", "3:5", "50%"])
def test_ties_break_to_the_lowest_index(text: str) -> None:
    mask = mask_from_scores(torch.zeros(2, 40), Pattern.parse(text))
    width, kept = {"2:4": (4, 2), "4:8": (8, 4), "3:5": (5, 3), "50%": (40, 20)}[text]
    assert mask.tolist() == [([True] * kept + [False] * (width - kept)) * (40 // width)] * 2


def test_layer_ties_break_to_the_lowest_row_first() -> None:
    mask = mask_from_scores(torch.ones(4, 6), Pattern.parse("50%"), group="layer")
    assert mask.all(1).tolist() == [True, True, False, False]


def test_signed_zeros_are_equal() -> None:
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    for text in ("2:4", "50%"):
        assert mask_from_scores(scores, Pattern.parse(text)).tolist() == [[True, True, False, False]]


def test_a_layer_of_negative_scores_keeps_the_least_negative() -> None:
    scores = -torch.arange(1.0, 10.0).reshape(1, 9) * 1e37
    assert mask_from_scores(scores, Pattern.parse("2:4")).tolist() == [[True, True, False, False] * 2 + [True]]


def test_masks_do_not_depend_on_the_memory_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(24, 24, generator=generator)
    strided = scores.repeat_interleave(2, dim=1)[:, ::2]
    for pattern in map(Pattern.parse, ("2:4", "50%")):
        expected = mask_from_scores(scores, pattern)
        assert torch.equal(mask_from_scores(scores.T.contiguous().T, pattern), expected)
        assert torch.equal(mask_from_scores(strided, pattern), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("text", ["2:4", "50%"])
def test_non_finite_scores_are_refused_with_their_count(poison: float, text: str) -> None:
    scores = torch.ones(3, 8)
    scores[0, 1] = scores[2, 7] = poison
    with pytest.raises(NonFiniteError, match="2 of 24 scores"):
        mask_from_scores(scores, Pattern.parse(text))


@settings(deadline=None)
@given(score_matrices(), NM, st.data())
def test_one_weight_too_many_violates_nm(scores: torch.Tensor, nm: tuple[int, int], data: st.DataObject) -> None:
    pattern = Pattern.parse("{}:{}".format(*nm))
    mask = mask_from_scores(scores, pattern)
    removed = (~mask).nonzero().tolist()
    if removed:  # every full or too long group is at its limit already
        row, column = data.draw(st.sampled_from(removed))
        mask[row, column] = True
        assert not satisfies(mask, pattern)
    assert satisfies(torch.zeros_like(mask), pattern)


@pytest.mark.parametrize("text", ["2:4", "50%", "0.29"])
def test_one_weight_too_many_violates_whatever_the_row(text: str) -> None:
    pattern = Pattern.parse(text)
    mask = mask_from_scores(torch.ones(3, 100), pattern)
    assert satisfies(mask, pattern)
    for row in range(3):
        spoiled = mask.clone()
        spoiled[row, int((~mask[row]).nonzero()[0])] = True
        assert not satisfies(spoiled, pattern)


def test_unstructured_is_checked_over_the_matrix_not_by_row() -> None:
    uneven = torch.tensor([[True] * 4, [False] * 4])
    assert satisfies(uneven, Pattern.parse("50%"))
    assert not satisfies(uneven, Pattern.parse("2:4"))


def test_2_of_4_is_about_aligned_groups() -> None:
    four_in_a_row = torch.tensor([[False, False, True, True, True, True, False, False]])
    assert satisfies(four_in_a_row, Pattern.parse("2:4"))
    assert not satisfies(four_in_a_row.roll(-1, 1), Pattern.parse("2:4"))


def test_a_tail_is_a_group() -> None:
    assert satisfies(torch.tensor([[True, False, False, True]]), Pattern.parse("1:3"))
    assert not satisfies(torch.tensor([[True, False, False, True, True]]), Pattern.parse("1:3"))


@pytest.mark.parametrize(
    "weight, expected",
    [([[0.0, -0.0, 1.0, 1e-45]], 0.5), ([[0.0]], 1.0), ([[1.0, 2.0]], 0.0)],
)
def test_sparsity_counts_both_zeros(weight: list[list[float]], expected: float) -> None:
    assert sparsity_of(torch.tensor(weight)) == expected
