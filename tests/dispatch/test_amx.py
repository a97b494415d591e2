"""Which kernel runs a layer where the processor has AMX, without a measurement and with one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")

from tests.fake_backends import Fake, remember
from wandapp_kernels import backends, dispatch
from wandapp_kernels.backends import Problem, base, cpu
from wandapp_kernels.backends.cpu import amx, compiled
from wandapp_kernels.ops import layouts

TWO_FOUR = dispatch.problem_for(64, 32, "2:4", 1, torch.bfloat16)
UNSTRUCTURED = dispatch.problem_for(64, 32, "unstructured", 1, torch.bfloat16, density=0.5)
STAYS_DENSE = dispatch.problem_for(64, 32, "dense", 1, torch.bfloat16)
PROBLEMS = pytest.mark.parametrize(
    ("problem", "layout", "kernel", "beyond"),
    [
        (TWO_FOUR, "nm", "cpu-nm", "cpu-nm-strips"),
        (UNSTRUCTURED, "bitmap", "cpu-bitmap", "cpu-bitmap-strips"),
        (STAYS_DENSE, "dense", "cpu-dense", "dense"),
    ],
)
COUNTS = (1, 2, 4, 5, 8, 16, 17, 512, 4096)


def register(monkeypatch: pytest.MonkeyPatch, readable: Iterable[str] = ("nm", "bitmap", "dense")) -> None:
    """What the package registers on a processor with AVX512-BF16, and AMX kernels for these layouts."""
    for variable in (amx.VARIABLE, compiled.VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(compiled, "has_fast_bf16_gemm", lambda: True)
    monkeypatch.setattr(compiled, "has_amx_kernel", lambda layout: layout in readable)
    known = layouts.LAYOUTS | {"bitmap_windows": cpu.WindowsLayout()}
    for module in (backends, layouts):
        monkeypatch.setattr(module, "LAYOUTS", known)
    for kernel in (
        cpu.CpuLinear("cpu-nm", "nm_linear", "nm"),
        cpu.CpuLinear("cpu-bitmap", "bitmap_linear", "bitmap"),
        cpu.CpuWindows("cpu-windows", "bitmap_linear", "bitmap_windows"),
        cpu.CpuDense(),
    ):
        cpu.register(kernel)


def chosen(problem: Problem, layout: str) -> list[str]:
    """Names, for each of ``COUNTS``."""
    asked = [replace(problem, tokens=tokens) for tokens in COUNTS]
    if layout == "dense":
        names = [dispatch.choose_dense(one).name for one in asked]
        assert names == [dispatch.explain(one, layout).chosen for one in asked]
        return names
    return [dispatch.choose(one, layout).name for one in asked]


@PROBLEMS
def test_beyond_a_few_tokens_they_are_the_default_in_bf16(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, layout: str, kernel: str, beyond: str
) -> None:
    register(monkeypatch)
    for family in (None, "cpu"):
        with dispatch.only(family):
            assert chosen(problem, layout) == [kernel] * 3 + [f"{kernel}-amx"] * 6
    with dispatch.only("dense"):
        assert set(chosen(problem, layout)) == {"dense" if layout == "dense" else f"decompress-{layout}"}


@PROBLEMS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_are_left_to_others(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, layout: str, kernel: str, beyond: str, dtype: torch.dtype
) -> None:
    register(monkeypatch)
    at_32_bit = layout == "dense" and dtype == torch.float32
    few = "dense" if at_32_bit else kernel
    # Strips begin beyond 64 tokens: the seventh count is 17.
    limit = 6 if layout == "dense" else 7
    assert chosen(replace(problem, dtype=dtype), layout) == [few] * limit + [beyond] * (9 - limit)
    problem = replace(problem, dtype=dtype, tokens=16)
    remember(problem, {"dense": 3.0, kernel: 2.0, f"{kernel}-amx": 1.0})
    assert dispatch.choose(problem, layout).name == kernel


@PROBLEMS
def test_without_amx_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, layout: str, kernel: str, beyond: str
) -> None:
    register(monkeypatch, readable=())
    assert not [name for name in base.BACKENDS if name.endswith("-amx")]
    assert chosen(problem, layout) == [kernel] * 6 + [beyond] * 3


def test_the_canonical_bitmap_is_held_and_windows_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    assert dispatch.choose_layout(UNSTRUCTURED) == "bitmap"
    assert dispatch.choose_layout(TWO_FOUR) == "nm"
    assert chosen(UNSTRUCTURED, "bitmap_windows") == ["cpu-windows"] * 6 + ["cpu-windows-strips"] * 3


@PROBLEMS
def test_a_measurement_goes_before_the_rule(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, layout: str, kernel: str, beyond: str
) -> None:
    register(monkeypatch)
    name = f"{kernel}-amx"
    base.BACKENDS["other"] = Fake("other", layout)
    remember(replace(problem, tokens=16), {"dense": 9.0, "other": 2.0, name: 1.0})
    for tokens in (4, 16, 64):
        asked = replace(problem, tokens=tokens)
        assert dispatch.choose(asked, layout).name == name
        assert dispatch.choose_layout(asked) == layout
    remember(replace(problem, tokens=16), {"dense": 9.0, "other": 1.0, name: 2.0})
    assert dispatch.choose(replace(problem, tokens=16), layout).name == "other"
    remember(replace(problem, tokens=1), {"dense": 9.0, kernel: 2.0, name: 1.0})
    assert dispatch.choose(problem, layout).name == name
    assert dispatch.choose_dense(replace(problem, tokens=512)).name != "other", "of so many nothing is known"
