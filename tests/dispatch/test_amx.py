"""The AMX backends wait for a measurement: their code has only been run through emulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")

from tests.fake_backends import Fake, remember
from wandapp_kernels import dispatch
from wandapp_kernels.backends import Problem, base, cpu
from wandapp_kernels.backends.cpu.amx import CpuAmx

TWO_FOUR = dispatch.problem_for(64, 32, "2:4", 1, torch.bfloat16)
UNSTRUCTURED = dispatch.problem_for(64, 32, "unstructured", 1, torch.bfloat16, density=0.5)
STAYS_DENSE = dispatch.problem_for(64, 32, "dense", 1, torch.bfloat16)
PROBLEMS = pytest.mark.parametrize(
    ("problem", "layout", "name"),
    [
        (TWO_FOUR, "nm", "cpu-nm-amx"),
        (UNSTRUCTURED, "bitmap", "cpu-bitmap-amx"),
        (STAYS_DENSE, "dense", "cpu-dense-amx"),
    ],
)


@pytest.fixture(autouse=True)
def registered() -> None:
    nm = cpu.CpuLinear("cpu-nm", "nm_linear", "nm")
    for kernel in (nm, cpu.BITMAP):
        base.register_backend(kernel)
        base.register_backend(cpu.CpuStrips(kernel))
    base.register_backend(cpu.DENSE)
    for kernel in (nm, cpu.BITMAP, cpu.DENSE):
        base.register_backend(CpuAmx(kernel))


@PROBLEMS
def test_without_a_measurement_they_are_never_chosen(problem: Problem, layout: str, name: str) -> None:
    for tokens in (1, 8, 16, 64, 512, 4096):
        asked = replace(problem, tokens=tokens)
        for family in (None, "cpu", "dense", "reference"):
            with dispatch.only(family):
                assert dispatch.choose(asked, layout).name != name
                assert dispatch.choose_dense(asked).name != "cpu-dense-amx"


@PROBLEMS
def test_with_a_measurement_they_are(problem: Problem, layout: str, name: str) -> None:
    base.BACKENDS["other"] = Fake("other", layout)
    remember(replace(problem, tokens=16), {"dense": 9.0, "other": 2.0, name: 1.0})
    for tokens in (4, 16, 64):
        asked = replace(problem, tokens=tokens)
        assert dispatch.choose(asked, layout).name == name
        assert dispatch.choose_layout(asked) == layout
    assert dispatch.choose(problem, layout).name != name, "of one token nothing is known"
    remember(replace(problem, tokens=16), {"dense": 9.0, "other": 1.0, name: 2.0})
    assert dispatch.choose(replace(problem, tokens=16), layout).name == "other"


def test_with_a_measurement_a_dense_layer_runs_in_tiles() -> None:
    remember(STAYS_DENSE, {"dense": 2.0, "cpu-dense-amx": 1.0})
    assert dispatch.choose_dense(STAYS_DENSE).name == "cpu-dense-amx"


def test_another_type_is_left_to_others() -> None:
    problem = replace(TWO_FOUR, dtype=torch.float16)
    remember(problem, {"dense": 2.0, "cpu-nm-amx": 1.0})
    assert dispatch.choose(problem, "nm").name != "cpu-nm-amx"
