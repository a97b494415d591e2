"""One layout serves every token count: close ones are told apart by all that were measured."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_backends import PROBLEM, Fake, add, at, remember
from wandapp_kernels import dispatch
from wandapp_kernels.tuning.best_layout import CLOSE, best_layout
from wandapp_kernels.tuning.store import Measurement, Store


def names() -> None:
    add(Fake("a-nm", "nm", default_tokens=4), Fake("b-nm", "nm"), Fake("c-nm", "fake-nm"), Fake("a-dense", "dense"))


def measured(nm: dict[int, float], fake: dict[int, float], dense: float = 9.0) -> None:
    """Times of a-nm and of c-nm by token count."""
    for tokens in sorted(nm.keys() | fake.keys()):
        times = {"a-nm": nm.get(tokens), "c-nm": fake.get(tokens), "decompress-nm": 99.0}
        remember(at(tokens), {"dense": dense} | {name: time for name, time in times.items() if time is not None})


def test_of_close_layouts_the_one_that_is_faster_on_the_whole_is_chosen() -> None:
    names()
    measured({1: 1.05, 8: 2.0}, {1: 1.0})
    assert dispatch.choose_layout(PROBLEM) == "fake-nm", "of 8 tokens only one of them is known"
    measured({8: 2.0}, {8: 8.0})
    for compressed_only in (False, True):
        assert dispatch.choose_layout(PROBLEM, compressed_only=compressed_only) == "nm"
        assert dispatch.choose_layout(at(8), compressed_only=compressed_only) == "nm"
    measured({64: 40.0}, {64: 8.0})
    assert dispatch.choose_layout(PROBLEM) == "fake-nm", "1.05 * 2 * 40 > 1 * 8 * 8"
    assert dispatch.choose_layout(at(8)) == "nm", "there they are not close"


@pytest.mark.parametrize(("time", "layout"), [(1.1, "nm"), (1.101, "fake-nm")])
def test_close_is_within_a_tenth(time: float, layout: str) -> None:
    names()
    measured({1: time, 8: 1.0}, {1: 1.0, 8: 100.0})
    assert CLOSE == 1.1 and dispatch.choose_layout(PROBLEM) == layout


def test_dense_takes_no_part_but_what_loses_to_it_is_left_out() -> None:
    names()
    measured({1: 1.05, 8: 2.0}, {1: 1.0, 8: 8.0}, dense=1.01)
    assert dispatch.choose_layout(PROBLEM) == "fake-nm", "nm is slower than dense"
    assert dispatch.choose_layout(PROBLEM, compressed_only=True) == "nm"
    remember(PROBLEM, {"a-dense": 1.06, "a-nm": 1.05, "c-nm": 1.0})
    assert dispatch.choose_layout(PROBLEM) == "nm", "that dense is fast at 8 tokens does not count"
    remember(PROBLEM, {"a-dense": 0.99, "a-nm": 1.05, "c-nm": 1.0})
    assert dispatch.choose_layout(PROBLEM) == "dense"
    assert dispatch.choose_layout(PROBLEM, compressed_only=True) == "nm"


def test_only_backends_that_would_run_count() -> None:
    names()
    measured({1: 1.05, 8: 2.0}, {1: 1.0, 8: 8.0})
    add(Fake("a-nm", "nm", reason="it was built for another machine"))
    assert dispatch.choose_layout(PROBLEM) == "fake-nm"
    names()
    remember(at(8), {"dense": 9.0, "a-nm": 2.0, "b-nm": 50.0, "c-nm": 8.0})
    remember(at(1), {"dense": 9.0, "a-nm": 1.05, "b-nm": 1.06, "c-nm": 1.0})
    assert dispatch.choose_layout(PROBLEM) == "nm"
    with dispatch.only("b"):
        assert dispatch.choose_layout(PROBLEM) == "nm"
    with dispatch.only("c"):
        assert dispatch.choose_layout(PROBLEM) == "fake-nm"


def test_other_problems_do_not_count() -> None:
    names()
    measured({1: 1.05}, {1: 1.0})
    for change in ({"out_features": 65}, {"dtype": torch.bfloat16}, {"threads": 99}):
        remember(replace(at(8), **change), {"dense": 9.0, "a-nm": 1.0, "c-nm": 8.0})
    assert dispatch.choose_layout(PROBLEM) == "fake-nm"


def test_a_neighbour_s_times_are_told_apart_by_the_problem_s_own() -> None:
    names()
    remember(at(4), {"dense": 9.0, "a-nm": 1.05, "c-nm": 1.0})
    remember(at(512), {"dense": 9.0, "a-nm": 1.0, "c-nm": 1.2})
    assert dispatch.choose_layout(PROBLEM) == "nm"
    assert dispatch.explain(PROBLEM).chosen == "a-nm"


def test_the_store_lists_the_counts_of_one_problem() -> None:
    for problem in (at(512), at(3), at(1), replace(at(1), density_bucket=60), replace(at(16), threads=99)):
        Store("cpu").put({problem: Measurement({"dense": float(problem.tokens)}, {})})
    found = Store("cpu").counts(at(77))
    assert list(found) == [at(1), at(4), at(512)]
    assert [measurement.times_us["dense"] for measurement in found.values()] == [1.0, 3.0, 512.0]


TIMES = st.dictionaries(st.sampled_from(["dense", "a", "b", "c"]), st.floats(0.9, 1.3), min_size=1)


@given(asked=TIMES, others=st.lists(TIMES, max_size=4), order=st.randoms(use_true_random=False))
def test_the_rule_holds_for_any_times(asked: dict[str, float], others: list[dict[str, float]], order: Random) -> None:
    counts = [asked, *others]
    chosen = best_layout(asked, iter(counts))
    fastest = min(asked.values())
    assert asked[chosen] <= CLOSE * fastest
    assert asked[chosen] <= asked.get("dense", math.inf)
    assert chosen != "dense" or asked["dense"] == fastest
    shuffled = list(counts)
    order.shuffle(shuffled)
    assert best_layout(asked, shuffled) == chosen
    # Dense plays no part elsewhere, and what is true of one count alone is the old rule.
    assert (
        best_layout(asked, [{name: time for name, time in each.items() if name != "dense"} for each in counts])
        == chosen
    )
    assert asked[best_layout(asked, [asked])] == asked[best_layout(asked, [])] == fastest
    if chosen == "dense":
        return
    close = [
        name
        for name, time in asked.items()
        if name != "dense" and time <= min(CLOSE * fastest, asked.get("dense", math.inf))
    ]
    shared = [each for each in counts if all(name in each for name in close)]
    means = {name: math.prod(each[name] for each in shared) for name in close}
    assert means[chosen] <= min(means.values()) * (1 + 1e-12)


@given(others=st.lists(TIMES, max_size=4), asked=TIMES)
def test_a_layout_that_is_slower_everywhere_is_never_chosen(
    asked: dict[str, float], others: list[dict[str, float]]
) -> None:
    asked = {"a": 1.0} | asked
    slower = asked["a"] * 1.01
    counts = [each | {"z": each["a"] * 1.01} for each in [asked, *others] if "a" in each]
    assert best_layout({"z": slower} | asked, counts) != "z"
