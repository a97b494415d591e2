from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import wandapp_kernels.backends as backends
from tests.fake_backends import PROBLEM, Fake, add, at, remember
from wandapp_kernels import dispatch, ops
from wandapp_kernels.errors import UsageError
from wandapp_kernels.runtime.choice import fastest_layout
from wandapp_kernels.sparsity import NMWeight

# Without a measurement


def test_the_rule_takes_the_first_backend_of_the_layout_up_to_its_tokens() -> None:
    add(Fake("a-nm", "nm", reason="it needs another machine"), Fake("b-nm", "nm", default_tokens=8), Fake("c-nm", "nm"))
    assert [dispatch.choose(at(m), "nm").name for m in (1, 7, 8, 9, 16, 17, 4096)] == [
        "b-nm", "b-nm", "b-nm", "c-nm", "c-nm", "decompress-nm", "decompress-nm",
    ]  # fmt: skip
    assert dispatch.choose(at(1), "fake-nm").name == "decompress-fake-nm"
    assert dispatch.choose(at(1), "dense").name == "dense"


def test_the_rule_takes_the_first_layout_with_a_backend_of_its_own() -> None:
    assert dispatch.choose_layout(PROBLEM) == "nm"
    add(Fake("a-nm", "fake-nm", reason="it needs another machine"))
    assert dispatch.choose_layout(PROBLEM) == "nm"
    add(Fake("b-nm", "fake-nm"), Fake("c-nm", "nm"))
    assert dispatch.choose_layout(PROBLEM) == "fake-nm"
    unstructured = dispatch.problem_for(8, 8, "unstructured", 1, torch.float32, density=0.5)
    assert dispatch.choose_layout(unstructured) == "bitmap"
    assert dispatch.choose_layout(dispatch.problem_for(8, 8, "dense", 1, torch.float32)) == "dense"


def test_who_reads_a_layout_elsewhere_does_not_make_it_the_first_here() -> None:
    add(Fake("a-nm", "nm", reason="it is for another device"), Fake("b-nm", "fake-nm"), Fake("c-nm", "nm"))
    assert dispatch.choose_layout(PROBLEM) == "fake-nm"
    assert dispatch.choose(PROBLEM, "fake-nm").name == "b-nm"


def test_a_layout_is_chosen_for_who_is_meant_for_so_few_tokens() -> None:
    add(Fake("a-nm", "fake-nm", default_tokens=0), Fake("b-nm", "nm"))
    assert dispatch.choose_layout(PROBLEM) == "nm"
    assert dispatch.choose_layout(at(4096)) == "fake-nm"  # neither is meant for them


def test_backends_are_asked_about_the_largest_count_of_the_bucket() -> None:
    fake = Fake("a-nm", "nm")
    add(fake)
    dispatch.choose(at(5), "nm")
    assert {problem.tokens for problem in fake.asked} == {8}


def test_a_layout_of_another_operator_is_refused() -> None:
    with pytest.raises(UsageError, match="'bitmap' is for bitmap_linear, not for nm_linear"):
        dispatch.choose(PROBLEM, "bitmap")
    with pytest.raises(UsageError, match="'absent' is unknown"):
        dispatch.choose(PROBLEM, "absent")


def test_a_problem_needs_a_density() -> None:
    with pytest.raises(UsageError, match="needs a density"):
        dispatch.problem_for(8, 8, "unstructured", 1, torch.float32)
    assert dispatch.problem_for(8, 8, "1:4", 1, torch.float32).density_bucket in (20, 30)
    assert dispatch.problem_for(8, 8, "unstructured", 1, torch.float32, density=0.42).density_bucket == 40
    assert PROBLEM.threads == torch.get_num_threads()


# With measurements


def test_the_fastest_measured_backend_of_the_layout_is_chosen() -> None:
    add(Fake("a-nm", "nm"), Fake("b-nm", "nm"), Fake("c-nm", "fake-nm"))
    remember(PROBLEM, {"dense": 5.0, "a-nm": 4.0, "b-nm": 3.0, "c-nm": 2.0, "decompress-nm": 9.0})
    assert dispatch.choose(PROBLEM, "nm").name == "b-nm"
    assert dispatch.choose_layout(PROBLEM) == "fake-nm"


def test_dense_is_chosen_where_it_wins() -> None:
    add(Fake("a-nm", "nm"), Fake("fast-dense", "dense"))
    remember(PROBLEM, {"dense": 3.0, "fast-dense": 2.0, "a-nm": 4.0, "decompress-nm": 9.0})
    assert dispatch.choose_layout(PROBLEM) == "dense"
    assert dispatch.choose(PROBLEM, "dense").name == "fast-dense"
    assert dispatch.choose(PROBLEM, "nm").name == "a-nm"


def test_a_weight_that_stays_compressed_gets_the_fastest_layout_all_the_same() -> None:
    add(Fake("a-dense", "dense"), Fake("b-nm", "nm"), Fake("a-nm", "nm"), Fake("a-fake", "fake-nm"))
    weight = NMWeight.compress(torch.eye(64, 32))
    assert dispatch.choose_layout(PROBLEM, compressed_only=True) == fastest_layout(weight) == "nm"
    remember(PROBLEM, {"a-dense": 1.0, "b-nm": 50.0, "a-nm": 4.0, "a-fake": 2.0})
    assert dispatch.choose_layout(PROBLEM) == "dense"
    assert dispatch.choose_layout(PROBLEM, compressed_only=True) == fastest_layout(weight) == "fake-nm"
    remember(PROBLEM, {"a-dense": 1.0, "b-nm": 2.0, "a-nm": 4.0, "a-fake": 3.0})
    assert fastest_layout(weight) == "nm"
    with dispatch.only("a"):
        assert dispatch.choose_layout(PROBLEM) == "dense"
        assert fastest_layout(weight) == "fake-nm"
    with dispatch.only("b"):
        assert fastest_layout(weight) == "nm"
    remember(PROBLEM, {"a-dense": 1.0})
    with dispatch.only("dense"):
        assert fastest_layout(weight) == "nm"
    dense = dispatch.problem_for(8, 8, "dense", 1, torch.float32)
    assert dispatch.choose_layout(dense, compressed_only=True) == "dense"


@pytest.mark.parametrize("seed", range(20))
def test_what_is_chosen_is_never_slower_than_dense_in_its_measurement(seed: int) -> None:
    add(Fake("a-nm", "nm"), Fake("b-nm", "fake-nm"), Fake("c-dense", "dense"))
    generator = torch.Generator().manual_seed(seed)
    names = ["dense", "c-dense", "a-nm", "decompress-nm", "b-nm", "decompress-fake-nm"]
    times = dict(zip(names, torch.rand(len(names), generator=generator).add(0.1).tolist(), strict=True))
    remember(PROBLEM, times)
    explained = dispatch.explain(PROBLEM)
    assert explained.measured_tokens == 1 and times[explained.chosen] == min(times.values()) <= times["dense"]
    assert list(explained.times_us.values()) == sorted(times.values())


def test_a_measurement_stands_for_near_counts_only() -> None:
    add(Fake("a-nm", "nm", default_tokens=10**6), Fake("b-nm", "nm"))
    remember(at(16), {"dense": 2.0, "a-nm": 3.0, "b-nm": 1.0})
    near = {m: dispatch.choose(at(m), "nm").name for m in (1, 2, 3, 4, 16, 17, 64, 65)}
    assert near == {1: "a-nm", 2: "a-nm", 3: "b-nm", 4: "b-nm", 16: "b-nm", 17: "b-nm", 64: "b-nm", 65: "a-nm"}
    remember(at(64), {"dense": 2.0, "a-nm": 1.0, "b-nm": 3.0})
    assert dispatch.choose(at(16), "nm").name == "b-nm"
    assert dispatch.choose(at(32), "nm").name == "a-nm"


def test_an_unstructured_measurement_stands_for_the_next_densities() -> None:
    add(Fake("a-bitmap", "bitmap"), Fake("b-bitmap", "bitmap"))
    problem = dispatch.problem_for(64, 32, "unstructured", 1, torch.float32, density=0.5)
    remember(problem, {"dense": 9.0, "a-bitmap": 3.0, "b-bitmap": 2.0})
    names = {d: dispatch.choose(replace(problem, density_bucket=d), "bitmap").name for d in (30, 40, 50, 60, 70)}
    assert names == {30: "a-bitmap", 40: "b-bitmap", 50: "b-bitmap", 60: "b-bitmap", 70: "a-bitmap"}


def test_what_was_measured_but_is_gone_or_refuses_now_is_passed_over() -> None:
    add(Fake("a-nm", "nm"), Fake("b-nm", "nm", reason="it was built for another machine"))
    remember(PROBLEM, {"dense": 9.0, "a-nm": 3.0, "b-nm": 2.0, "gone-nm": 1.0})
    assert dispatch.choose(PROBLEM, "nm").name == "a-nm"
    assert dispatch.choose_layout(PROBLEM) == "nm"


def test_other_problems_do_not_share_a_measurement() -> None:
    add(Fake("a-nm", "nm"), Fake("b-nm", "nm"))
    remember(PROBLEM, {"dense": 9.0, "a-nm": 3.0, "b-nm": 2.0})
    for change in (
        {"out_features": 65}, {"in_features": 33}, {"dtype": torch.bfloat16}, {"threads": 99}, {"pattern": "1:4"},
        {"density_bucket": 30},
    ):  # fmt: skip
        assert dispatch.choose(replace(PROBLEM, **change), "nm").name == "a-nm"


# Under the operators


def call(tokens: int, **changes: Any) -> torch.Tensor:
    weight = NMWeight.compress(torch.eye(8, 16))
    x = torch.arange(tokens * 16.0).reshape(tokens, 16).to(changes.get("dtype", torch.float32))
    return ops.nm_linear(x, [weight.values, weight.indices], None, 8, 16)


def test_operators_run_the_chosen_backend_and_ask_once_per_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("a-nm", "nm", default_tokens=4)
    add(fake)
    asked: list[int] = []
    choose = dispatch.choose
    monkeypatch.setattr(
        dispatch, "choose", lambda problem, layout: asked.append(problem.tokens) or choose(problem, layout)
    )
    for tokens in (1, 1, 3, 4, 3, 5, 8):
        assert torch.equal(call(tokens), torch.arange(tokens * 16.0).reshape(tokens, 16)[:, :8])
    assert fake.calls == [1, 1, 3, 4, 3]
    assert asked == [1, 3, 5]


def test_operators_read_no_file_once_they_are_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    call(2)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("a file was read"))
    call(2)


def test_other_types_are_decompressed_and_cast() -> None:
    fake = Fake("a-nm", "nm")
    add(fake)
    assert call(1, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not fake.calls


def test_choices_follow_a_new_measurement() -> None:
    slow, fast = Fake("slow-nm", "nm", wait=3e-3), Fake("fast-nm", "nm")
    add(slow, fast)
    call(1)
    assert slow.calls and not fast.calls
    dispatch.tune([dispatch.problem_for(8, 16, "2:4", 1, torch.float32)], seconds=0.0)
    slow.calls.clear()
    call(1)
    assert not slow.calls


def test_only_one_family_runs() -> None:
    first, second = Fake("a-nm", "nm"), Fake("b-nm", "nm")
    add(first, second, Fake("b-fake", "fake-nm"))
    with dispatch.only("b"):
        call(1)
        assert second.calls and not first.calls
        assert dispatch.choose_layout(PROBLEM) == "nm"
        assert dispatch.choose(PROBLEM, "fake-nm").name == "b-fake"
    call(1)
    assert first.calls == [1], "what was chosen within is forgotten after"
    with dispatch.only("reference"):
        assert dispatch.choose(PROBLEM, "nm").name == "reference-nm"
        assert dispatch.choose(at(4096), "nm").name == "reference-nm"
    with dispatch.only("dense"):
        assert dispatch.choose(PROBLEM, "nm").name == "decompress-nm"
        assert dispatch.choose_layout(PROBLEM) == "dense"
    call(1)
    assert first.calls == [1, 1]
    with (
        pytest.raises(UsageError, match="there is no backend 'z': choose one of a, b, decompress, dense"),
        dispatch.only("z"),
    ):
        pass


def test_the_measured_best_of_a_family() -> None:
    add(Fake("a-nm", "nm"), Fake("a-fake", "fake-nm"), Fake("b-nm", "nm"))
    remember(PROBLEM, {"dense": 1.0, "b-nm": 2.0, "a-fake": 3.0, "a-nm": 4.0})
    with dispatch.only("a"):
        assert dispatch.choose_layout(PROBLEM) == "fake-nm"
        assert dispatch.choose(PROBLEM, "nm").name == "a-nm"


def test_explain_without_a_measurement_names_the_rule_and_the_reasons() -> None:
    add(Fake("a-nm", "nm"), Fake("b-nm", "fake-nm", reason="it needs a GPU"))
    backends.UNAVAILABLE["triton"] = "it cannot be imported: no module"
    explained = dispatch.explain(at(3))
    assert explained.problem.tokens == 4
    assert (explained.layout, explained.chosen, explained.measured_tokens) == ("nm", "a-nm", None)
    assert not explained.times_us
    assert explained.left_out["b-nm"] == "it needs a GPU"
    assert "no module" in explained.left_out["triton"]
