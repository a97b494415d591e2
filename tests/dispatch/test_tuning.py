from __future__ import annotations

import json
import os
import stat
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import wandapp_kernels.backends as backends
from tests.fake_backends import PROBLEM, Fake, FakeLayout, add, at, remember
from wandapp_kernels import dispatch
from wandapp_kernels.backends import base
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.layouts import register_layout
from wandapp_kernels.sparsity import BitmapWeight
from wandapp_kernels.tuning import measure as measuring
from wandapp_kernels.tuning.store import Measurement, Store, key

# Tuning


def test_times_of_one_variant_of_the_cpu_kernels_are_not_used_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = pytest.importorskip("wandapp_kernels.backends.cpu").compiled
    remember(PROBLEM, {"dense": 3.0})
    monkeypatch.setattr(compiled, "_variant_name", "another")
    dispatch.forget()
    assert Store("cpu").exact(PROBLEM) is None and Store("cpu").fingerprint["cpu_kernels"] == "another"
    assert dispatch.explain(PROBLEM).measured_tokens is None
    remember(PROBLEM, {"dense": 5.0})
    assert Store("cpu").exact(PROBLEM).times_us == {"dense": 5.0}


def test_tuning_measures_everything_that_can_run_and_says_why_the_rest_cannot() -> None:
    add(
        Fake("fast-nm", "nm"),
        Fake("slow-nm", "nm", wait=2e-2),
        Fake("other-nm", "fake-nm", wait=1e-3),
        Fake("unfit-nm", "nm", reason="it needs another machine"),
        Fake("broken-nm", "nm", error="out of registers"),
        Fake("wrong-nm", "nm", factor=1.5),
    )
    found = dispatch.tune([PROBLEM], seconds=0.0)[PROBLEM]
    assert set(found.times_us) == {
        "dense", "fast-nm", "slow-nm", "other-nm", "decompress-nm", "decompress-fake-nm"
    }  # fmt: skip
    assert found.left_out["unfit-nm"] == "it needs another machine"
    assert found.left_out["broken-nm"] == "it fails with RuntimeError: out of registers"
    assert "differs from the dense one" in found.left_out["wrong-nm"]
    assert "reference" in found.left_out["reference-nm"]
    assert found.times_us["slow-nm"] > max(20_000, found.times_us["fast-nm"])
    explained = dispatch.explain(PROBLEM)
    assert explained.measured_tokens == 1 and explained.times_us[explained.chosen] <= found.times_us["dense"]
    assert dispatch.choose(PROBLEM, "fake-nm").name in ("other-nm", "decompress-fake-nm")


def test_a_slow_dense_product_is_beaten(monkeypatch: pytest.MonkeyPatch) -> None:
    add(Fake("fast-nm", "nm"))
    base.BACKENDS["dense"] = Fake("dense", "dense", wait=5e-3)
    dispatch.tune([PROBLEM], seconds=0.0)
    assert dispatch.choose_layout(PROBLEM) == "nm"


def test_tuning_keeps_what_it_knows_and_counts(tmp_path: Path) -> None:
    fake = Fake("a-nm", "nm")
    add(fake)
    seen: list[tuple[int, int]] = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    dispatch.tune([at(1), at(3), at(4)], seconds=0.0, progress=progress)
    assert seen == [(1, 2), (2, 2)]
    assert set(fake.calls) == {1, 4}
    measured = len(fake.calls)
    dispatch.forget()
    known = dispatch.tune([at(1), at(4)], seconds=0.0)
    assert len(fake.calls) == measured and set(known) == {at(1), at(4)}
    dispatch.tune([at(1)], seconds=0.0, again=True)
    assert len(fake.calls) > measured


def test_a_new_backend_makes_old_measurements_incomplete() -> None:
    old, new = Fake("a-nm", "nm"), Fake("b-nm", "nm")
    add(old)
    dispatch.tune([PROBLEM], seconds=0.0)
    base.BACKENDS["c-nm"] = Fake("c-nm", "nm", reason="it does not take this")
    calls = len(old.calls)
    dispatch.tune([PROBLEM], seconds=0.0)
    assert len(old.calls) == calls
    base.BACKENDS["b-nm"] = new
    with dispatch.frozen():
        assert "b-nm" not in dispatch.tune([PROBLEM], seconds=0.0)[PROBLEM].times_us
    assert "b-nm" in dispatch.tune([PROBLEM], seconds=0.0)[PROBLEM].times_us
    assert len(old.calls) > calls and new.calls


def test_frozen_measures_nothing_and_uses_what_is_known() -> None:
    fake = Fake("a-nm", "nm")
    add(fake)
    remember(at(4), {"dense": 2.0, "a-nm": 1.0})
    with dispatch.frozen():
        known = dispatch.tune([at(1), at(4)], again=True)
    assert not fake.calls and set(known) == {at(4)}
    with dispatch.frozen():
        assert dispatch.choose(at(4), "nm").name == "a-nm"


def test_unstructured_and_dense_problems_are_tuned_too() -> None:
    add(Fake("a-bitmap", "bitmap"), Fake("b-dense", "dense"))
    unstructured = dispatch.problem_for(40, 24, "unstructured", 2, torch.bfloat16, density=0.3)
    stays = dispatch.problem_for(40, 24, "dense", 2, torch.float32)
    known = dispatch.tune([unstructured, stays], seconds=0.0)
    assert set(known[unstructured].times_us) == {"dense", "b-dense", "a-bitmap", "decompress-bitmap"}
    assert set(known[stays].times_us) == {"dense", "b-dense"}


def test_modules_that_cannot_be_loaded_are_named_from_the_first_measurement_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MODULES", ("no_such_library",))
    monkeypatch.setattr(backends, "_loaded", False)
    known = dispatch.tune([PROBLEM], seconds=0.0)
    assert "cannot be imported" in known[PROBLEM].left_out["no_such_library"]


def test_the_sample_weight_has_the_problems_density() -> None:
    unstructured = dispatch.problem_for(200, 300, "unstructured", 2, torch.bfloat16, density=0.3)
    sample = measuring.sample_weight(unstructured)
    assert abs(sample.dense.count_nonzero() / sample.dense.numel() - 0.3) < 0.01
    assert isinstance(sample.compressed, BitmapWeight) and torch.equal(sample.compressed.decompress(), sample.dense)


def test_problems_for_other_thread_counts_are_refused() -> None:
    with pytest.raises(UsageError, match="threads"):
        dispatch.tune([replace(PROBLEM, threads=PROBLEM.threads + 1)])


def test_calls_walk_through_copies_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    places: set[int] = set()

    class Watching(Fake):
        def run(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], *rest: Any) -> torch.Tensor:
            places.add(tensors[0].data_ptr())
            return super().run(x, tensors, *rest)

    add(Watching("a-nm", "nm"))
    weight = 64 * 32 * 4 // 2 + 64 * 4
    monkeypatch.setattr(measuring, "last_level_cache", lambda device: weight)
    dispatch.tune([PROBLEM], seconds=0.0)
    assert len(places) == 3  # the weight that was checked, and two copies


class Counted(FakeLayout):
    """Counts the bytes of its packed weights that are held when one more is made."""

    def __init__(self, name: str, alive: list[tuple[weakref.ref[torch.Tensor], int]], most: list[int]):
        self.name, self.alive, self.most = name, alive, most

    def pack(self, weight: Any) -> list[torch.Tensor]:
        made = [tensor.clone() for tensor in super().pack(weight)]
        self.alive += [(weakref.ref(tensor), tensor.nbytes) for tensor in made]
        self.most.append(sum(size for tensor, size in self.alive if tensor() is not None))
        return made


@pytest.mark.parametrize(("held", "together"), [(0, 1), (1.6, 2), (2.2, 3), (100, 4)])
def test_packed_forms_of_a_large_weight_are_not_all_held(
    held: float, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = 64 * 32 * 4
    form = dense // 2 + 64 * 4
    alive: list[tuple[weakref.ref[torch.Tensor], int]] = []
    most: list[int] = []
    for number in range(4):
        register_layout(Counted(f"counted-{number}", alive, most))
        add(Fake(f"c{number}-nm", f"counted-{number}", wait=1e-3 * number))
    monkeypatch.setattr(measuring, "HELD_BYTES", held * dense)
    monkeypatch.setattr(measuring, "last_level_cache", lambda device: dense // 4)
    rounds: list[set[str]] = []
    medians = measuring._medians
    monkeypatch.setattr(measuring, "_medians", lambda turns, *rest: rounds.append(set(turns)) or medians(turns, *rest))
    found = dispatch.tune([PROBLEM], seconds=0.0)[PROBLEM]
    assert max(most) == together * form
    assert {f"c{number}-nm" for number in range(4)} | {"dense"} <= found.times_us.keys()
    assert rounds[0] >= {"dense", "c0-nm"} and set().union(*rounds) == found.times_us.keys()
    assert len(rounds) == -(-4 // together)


def test_what_a_group_before_beats_by_far_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(*[10.0] * measuring.MAX_ROUNDS)
    monkeypatch.setattr(measuring, "_time", lambda calls, device: seen.append(1) or clock(calls, device))
    for before, rounds in ({"dense": 0.9}, 2), ({"dense": 4.0}, measuring.MIN_ROUNDS), ({}, measuring.MAX_ROUNDS):
        seen: list[int] = []
        clock.times = [10.0] * measuring.MAX_ROUNDS
        assert measuring._medians({"a-nm": cycle(["winner"])}, "cpu", 9.0, before) == {"a-nm": 10.0}  # type: ignore[dict-item]
        assert len(seen) == rounds


class Clock:
    """Stands for `measure._time`: times are given, and the copies that calls are for are noted."""

    def __init__(self, *times: float):
        self.times = list(times)

    def __call__(self, calls: Iterator[Any], device: str) -> float:
        return self.times.pop(0) if next(calls) == "winner" else 100.0


def test_one_disturbance_at_the_start_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for disturbed in ((10.0, 9000.0), (9000.0, 10.0)):
        monkeypatch.setattr(measuring, "_time", Clock(*disturbed, *[10.0] * measuring.MAX_ROUNDS))
        found = measuring._medians({"dense": cycle(["other"]), "a-nm": cycle(["winner"])}, "cpu", 0.0)  # type: ignore[list-item]
        assert found == {"dense": 100.0, "a-nm": 10.0}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was asked of a GPU, and which one was the current one."""
    current, found = ["cuda:0"], []

    @contextmanager
    def device(wanted: str) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    class Event:
        def __init__(self, enable_timing: bool): ...

        def record(self) -> None:
            found.append(("record", current[-1]))

        def elapsed_time(self, other: Event) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: found.append((name, current[-1])))
    return found


def test_a_gpu_that_is_not_the_current_one_is_timed_by_its_own_stream(used: list[tuple[str, str]]) -> None:
    measuring._time(iter([lambda: torch.ones(1)]), "cuda:1")
    assert used == [(name, "cuda:1") for name in ("synchronize", "_sleep", "record", "record", "synchronize")]


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize(("device", "calls"), [("cpu", 2), ("cuda", 1)])
def test_calls_take_the_copies_in_turn(device: str, calls: int) -> None:
    seen: list[int] = []
    copies: list[Any] = [partial(seen.append, number) for number in range(4)]
    measuring._medians({"a-nm": cycle(copies)}, device, 0.0)
    assert seen == [number % 4 for number in range(calls * measuring.MIN_ROUNDS)]


# The cache file


def file(tmp_path: Path) -> Path:
    [path] = (tmp_path / "dispatch").glob("*.json")
    return path


def test_the_file_can_be_read_by_people(tmp_path: Path) -> None:
    remember(at(3), {"dense": 2.0, "a-nm": 1.5}, {"b-nm": "it needs a GPU"})
    content = json.loads(file(tmp_path).read_text())
    assert content["fingerprint"]["torch"] == torch.__version__ and content["fingerprint"]["device"]
    name = f"nm_linear 2:4 50% 64x32 m4 float32 threads{PROBLEM.threads}"
    assert key(at(3)) == name
    assert content["problems"] == {
        name: {"times_us": {"dense": 2.0, "a-nm": 1.5}, "left_out": {"b-nm": "it needs a GPU"}}
    }


DAMAGED = {
    "not json": lambda content: "{",
    "empty": lambda content: "",
    "a list": lambda content: "[]",
    "other format": lambda content: json.dumps(content | {"format": 0}),
    "other device": lambda content: json.dumps(content | {"fingerprint": {"device": "Z80"}}),
    "no problems": lambda content: json.dumps({name: content[name] for name in ("format", "fingerprint")}),
    "negative time": lambda content: json.dumps(content).replace("2.0", "-2.0"),
    "not a number": lambda content: json.dumps(content).replace("2.0", "NaN"),
    "too large a number": lambda content: json.dumps(content).replace("2.0", "1" + "0" * 400),
    "too deep": lambda content: "[" * 100_000,
    "no times": lambda content: json.dumps(content).replace('{"dense": 2.0, "a-nm": 1.0}', "{}"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(tmp_path: Path, damage: str) -> None:
    add(Fake("b-nm", "nm"), Fake("a-nm", "nm"))
    remember(PROBLEM, {"dense": 2.0, "a-nm": 1.0})
    assert dispatch.choose(PROBLEM, "nm").name == "a-nm"
    path = file(tmp_path)
    path.write_text(DAMAGED[damage](json.loads(path.read_text())))
    dispatch.forget()
    with pytest.warns(UserWarning, match=r"the measurements in .* are ignored") as caught:
        assert dispatch.choose(PROBLEM, "nm").name == "b-nm"
        assert dispatch.choose(at(2), "nm").name == "b-nm"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.tune([PROBLEM], seconds=0.0)
        dispatch.forget()
        assert dispatch.explain(PROBLEM).measured_tokens == 1


def test_two_processes_add_to_one_file() -> None:
    first, second = Store("cpu"), Store("cpu")
    first.put({at(1): Measurement({"dense": 1.0}, {})})
    second.put({at(8): Measurement({"dense": 2.0}, {})})
    together = Store("cpu")
    assert together.exact(at(1)) == Measurement({"dense": 1.0}, {})
    assert together.exact(at(8)) == Measurement({"dense": 2.0}, {})


def test_what_another_process_measured_anew_is_not_overwritten() -> None:
    remember(at(1), {"dense": 1.0})
    first, second = Store("cpu"), Store("cpu")
    first.put({at(1): Measurement({"dense": 3.0}, {}), at(8): Measurement({"dense": 4.0}, {})})
    second.put({at(8): Measurement({"dense": 5.0}, {})})
    for store in (second, Store("cpu")):
        assert store.exact(at(1)) == Measurement({"dense": 3.0}, {})
        assert store.exact(at(8)) == Measurement({"dense": 5.0}, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="cannot be kept"):
        dispatch.tune([PROBLEM], seconds=0.0)
    assert dispatch.explain(PROBLEM).measured_tokens == 1


def test_a_cache_folder_that_is_a_file_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "dispatch").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        dispatch.tune([PROBLEM], seconds=0.0)
    assert dispatch.explain(PROBLEM).measured_tokens == 1
