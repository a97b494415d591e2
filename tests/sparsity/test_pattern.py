from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wandapp_kernels.errors import UsageError
from wandapp_kernels.sparsity import Pattern, mask_from_scores
from wandapp_kernels.sparsity.pattern import MAX_GROUP

NM = [(n, m) for m in range(2, MAX_GROUP + 1) for n in range(1, m)]


@pytest.mark.parametrize("n, m", NM)
def test_every_possible_nm_is_read_and_printed(n: int, m: int) -> None:
    pattern = Pattern.parse(f"{n}:{m}")
    assert (pattern.n, pattern.m, pattern.is_nm) == (n, m, True)
    assert pattern.ratio == pytest.approx((m - n) / m)
    assert str(pattern) == f"{n}:{m}"


@pytest.mark.parametrize("text", ["50%", "0.5", 0.5, ".5", " 50 % ", "50.0%"])
def test_spellings_of_one_half(text: str | float) -> None:
    assert Pattern.parse(text) == Pattern(ratio=0.5)


@pytest.mark.parametrize("percent", range(1, 100))
def test_percentages_survive_printing(percent: int) -> None:
    pattern = Pattern.parse(f"{percent}%")
    assert str(pattern) == f"{percent}%"
    assert Pattern.parse(str(pattern)) == pattern == Pattern.parse(percent / 100)


@pytest.mark.parametrize("ratio", [0.6666666, 0.1234567, 1 / 3, 2 / 3, 5 / 7])
def test_what_is_printed_asks_for_the_same_zeros(ratio: float) -> None:
    pattern = Pattern(ratio)
    read = Pattern.parse(str(pattern))
    assert all(read.removed_per_row(columns) == pattern.removed_per_row(columns) for columns in range(1, 8192))


def test_a_pattern_is_its_own_parse() -> None:
    pattern = Pattern.parse("2:4")
    assert Pattern.parse(pattern) is pattern


@pytest.mark.parametrize(
    "text",
    [
        *(0, 1, 1.5, -0.5, True, None, float("nan"), float("inf")),
        *("0", "0%", "0.0", "100%", "1", "1.0", "150%", "-0.5", "-50%", "", "%", "abc", "half", "2:4:8", "0.5:4"),
        *("4:4", "5:4", "0:4", "0:0", "3:20", "1:17", "-2:4", "2:-4", "2/4", ":4", "2:", "nan", "50%%", "5 0%"),
    ],
)
def test_what_is_not_a_sparsity_is_refused_by_name(text: object) -> None:
    with pytest.raises(UsageError, match="sparsity") as error:
        Pattern.parse(text)  # type: ignore[arg-type]
    assert repr(str(text).strip()) in str(error.value)


@given(st.integers(1, 99), st.integers(0, 300_000_000))
def test_percentages_remove_the_exact_floor(percent: int, columns: int) -> None:
    assert Pattern.parse(f"{percent}%").removed_per_row(columns) == percent * columns // 100


@given(st.integers(1, 999), st.integers(0, 10_000))
def test_thousandths_remove_the_exact_floor(thousandths: int, columns: int) -> None:
    assert Pattern.parse(f"0.{thousandths:03}").removed_per_row(columns) == thousandths * columns // 1000


@pytest.mark.parametrize(
    "columns, removed", [(100, 29), (200, 58), (1, 0), (3, 0), (4, 1), (0, 0), (10**8, 29 * 10**6)]
)
def test_29_percent_where_binary_falls_short(columns: int, removed: int) -> None:
    assert Pattern.parse("29%").removed_per_row(columns) == removed


@given(st.sampled_from(NM), st.integers(1, 70))
def test_nm_removes_what_its_masks_remove(nm: tuple[int, int], columns: int) -> None:
    pattern = Pattern.parse("{}:{}".format(*nm))
    mask = mask_from_scores(torch.arange(2.0 * columns).reshape(2, columns), pattern)
    assert (~mask).sum(1).tolist() == [pattern.removed_per_row(columns)] * 2


@pytest.mark.parametrize("text, columns, removed", [("2:4", 37, 18), ("2:4", 39, 19), ("3:5", 4, 1), ("15:16", 15, 0)])
def test_a_ragged_tail_loses_only_what_exceeds_n(text: str, columns: int, removed: int) -> None:
    assert Pattern.parse(text).removed_per_row(columns) == removed
