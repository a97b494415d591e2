"""The AMX backends: who registers them, what they take, and, on a processor with AMX, their results."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")

from tests.csrc_cpu.cpu_cases import Case, make_case
from wandapp_kernels import _cpu
from wandapp_kernels.backends import BACKENDS, Problem, cpu, load_backends
from wandapp_kernels.backends.cpu import amx, backends, compiled
from wandapp_kernels.backends.cpu.amx import CpuAmx
from wandapp_kernels.errors import UsageError

NM = CpuAmx(cpu.CpuLinear("cpu-nm", "nm_linear", "nm"))
BITMAP, DENSE = CpuAmx(cpu.BITMAP), CpuAmx(cpu.DENSE)
EACH = pytest.mark.parametrize("backend", [NM, BITMAP, DENSE], ids=lambda backend: backend.name)
BUILT = _cpu.has_kernel(_cpu.Variant.amx, _cpu.Format.dense, _cpu.Type.bf16)
HARDWARE = pytest.mark.skipif(not _cpu.has_amx(), reason="there is no AMX here, or the system does not allow it")

PROBLEM = Problem("nm_linear", 1, 8, 8, "2:4", 50, torch.bfloat16, "cpu", 1)
BITMAP_PROBLEM = replace(PROBLEM, operator="bitmap_linear", pattern="unstructured")
DENSE_PROBLEM = replace(PROBLEM, operator="linear", pattern="dense", density_bucket=100)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither variable of the environment says anything."""
    for variable in (amx.VARIABLE, compiled.VARIABLE):
        monkeypatch.delenv(variable, raising=False)


def test_they_are_registered_where_amx_is():
    load_backends()
    found = {name.removesuffix("-amx") for name in BACKENDS if name.endswith("-amx")}
    readable = {backend.name for backend in (cpu.NM, cpu.BITMAP, cpu.DENSE) if compiled.has_amx_kernel(backend.layout)}
    assert found == (readable if amx.is_wanted() else set())
    assert bool(readable) == _cpu.has_amx()


@pytest.mark.parametrize("available", [False, True])
def test_there_is_one_for_each_layout_that_amx_reads(unset: None, monkeypatch: pytest.MonkeyPatch, available: bool):
    if not BUILT:
        pytest.skip("the compiler that built the module does not know AMX")
    monkeypatch.setattr(_cpu, "has_amx", lambda: available)
    pairs = cpu.CpuLinear("cpu-nm", "nm_linear", "nm_pairs")
    assert amx.with_amx(pairs) == [pairs] and amx.with_amx(cpu.WINDOWS) == [cpu.WINDOWS]
    for kernel in (cpu.CpuLinear("cpu-nm", "nm_linear", "nm"), cpu.BITMAP, cpu.DENSE):
        *before, last = amx.with_amx(kernel)
        assert last is kernel
        assert [(type(one), one.name, one.layout) for one in before] == (
            [(CpuAmx, f"{kernel.name}-amx", kernel.layout)] if available else []
        )


def test_the_environment_leaves_them_out(unset: None, monkeypatch: pytest.MonkeyPatch):
    assert amx.is_wanted()
    for value, wanted in (("", True), ("1", True), ("0", False)):
        monkeypatch.setenv(amx.VARIABLE, value)
        assert amx.is_wanted() == wanted
    monkeypatch.setattr(_cpu, "has_amx", lambda: pytest.fail("the system was asked for tiles"))
    assert amx.with_amx(cpu.DENSE) == [cpu.DENSE]


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_a_forced_variant_leaves_them_out(unset: None, monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv(amx.VARIABLE, value)
    monkeypatch.setattr(_cpu, "has_amx", lambda: pytest.fail("the system was asked for tiles"))
    for variant, _ in _cpu.variants():
        monkeypatch.setenv(compiled.VARIABLE, variant)
        assert not amx.is_wanted() and amx.with_amx(cpu.DENSE) == [cpu.DENSE]


@pytest.mark.parametrize("value", ["yes", "2", "01", " "])
def test_another_value_is_refused(unset: None, monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.setenv(amx.VARIABLE, value)
    with pytest.raises(UsageError, match=f"WANDAPP_CPU_AMX is '{value}', but must be 0 .* or 1"):
        amx.with_amx(cpu.DENSE)


LOAD = """
from wandapp_kernels import _cpu
_cpu.has_amx = lambda: True
from wandapp_kernels import backends
from wandapp_kernels.errors import UsageError
try:
    backends.load_backends()
except UsageError as error:
    print(error)
else:
    print(*[name for name in backends.BACKENDS if name.startswith("cpu-")])
"""


@pytest.mark.skipif(not BUILT, reason="the compiler that built the module does not know AMX")
@pytest.mark.parametrize("said", [{}, {"AMX": "1"}, {"AMX": "0"}, {"VARIANT": "plain", "AMX": "1"}, {"AMX": "on"}])
def test_what_a_process_registers(said: dict[str, str]):
    """In a process of its own, on a processor that seems to have AMX: the order is settled when backends are loaded."""
    others = {name: value for name, value in os.environ.items() if not name.startswith("WANDAPP_CPU_")}
    environment = others | {f"WANDAPP_CPU_{name}": value for name, value in said.items()}
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, env=environment, check=True)
    names = done.stdout.split()
    if said.get("AMX") == "on":
        assert "WANDAPP_CPU_AMX is 'on'" in done.stdout
    elif said in ({}, {"AMX": "1"}):
        for kernel in ("cpu-bitmap", "cpu-dense"):
            assert names.index(f"{kernel}-amx") + 1 == names.index(kernel)
    else:
        assert "cpu-dense" in names and not [name for name in names if name.endswith("-amx")]


def test_amx_is_not_a_variant_of_the_process():
    assert "amx" not in dict(_cpu.variants())


@pytest.mark.skipif(_cpu.has_amx(), reason="there is AMX here")
def test_without_amx_nothing_is_bound_to_it():
    case = make_case("dense", torch.bfloat16, 1, 5, 40)
    with pytest.raises(ValueError, match="cannot run the variant"):
        DENSE.run(case.x, case.tensors, None, case.shape, None)


def test_supports_says_why_not():
    assert NM.supports(PROBLEM) is None
    assert BITMAP.supports(BITMAP_PROBLEM) is None
    assert DENSE.supports(DENSE_PROBLEM) is None and DENSE.supports(PROBLEM) is None
    for dtype in (torch.float16, torch.float32):
        assert NM.supports(replace(PROBLEM, dtype=dtype)) == f"the tiles of AMX take bf16, not {dtype}"
        assert DENSE.supports(replace(DENSE_PROBLEM, dtype=dtype)) == f"the tiles of AMX take bf16, not {dtype}"
    assert "4:8" in str(NM.supports(replace(PROBLEM, pattern="4:8")))
    assert "cuda" in str(NM.supports(replace(PROBLEM, device="cuda:0")))
    assert "nm_linear" in str(BITMAP.supports(PROBLEM))


@EACH
def test_calls_of_other_kernels_are_of_another_kind(monkeypatch: pytest.MonkeyPatch, backend: CpuAmx):
    bound = []
    monkeypatch.setattr(compiled, "Bound", lambda *arguments: bound.append(arguments))
    case = make_case(backend.layout, torch.bfloat16, 1, 5, 40)
    of_variant = backends.CompiledBackend.bind
    plain = type("Plain", (backends.CpuDense,), {"layout": backend.layout})()
    assert (
        of_variant(backend, case.tensors, None, (5, 40), None).kind
        == backend.bind(case.tensors, None, (7, 40), None).kind
    )
    assert backend.bind(case.tensors, None, (5, 40), None).kind != plain.bind(case.tensors, None, (5, 40), None).kind
    assert [arguments[-1] for arguments in bound] == ["amx", "amx", "amx", None]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_the_kernels_were_compiled_to_the_instructions_meant():
    if not BUILT:
        pytest.skip("the compiler that built the module does not know AMX")
    text = subprocess.run(["objdump", "-d", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    # Sums, weights and activations are what amx_tiles.h says; objdump writes the operands from right to left.
    for sums, weights, x in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
        assert re.search(rf"tdpbf16ps\s+%tmm{x},%tmm{weights},%tmm{sums}", text)
    for instruction in ("ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored"):
        assert instruction in text


def run(backend: CpuAmx, case: Case) -> torch.Tensor:
    return backend.run(case.x, case.tensors, case.bias, case.shape, None)


def check(case: Case, out: torch.Tensor) -> None:
    error = (out.double() - case.exact()).abs()
    assert bool((error <= case.allowed()).all()), (case.layout, case.shape, case.x.shape, error.max())


@HARDWARE
@EACH
def test_matches_float64(backend: CpuAmx):
    for tokens in (1, 2, 15, 16, 17, 32, 33, 64, 100, 300):
        check(case := make_case(backend.layout, torch.bfloat16, tokens, 50, 341), run(backend, case))
    for columns in (1, 3, 31, 64, 511, 513, 1030, 4096):
        for rows in (1, 16, 33):
            check(case := make_case(backend.layout, torch.bfloat16, 3, rows, columns, bias=False), run(backend, case))


@HARDWARE
@EACH
def test_the_number_of_threads_changes_no_bit(backend: CpuAmx):
    case = make_case(backend.layout, torch.bfloat16, 21, 1100, 576)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(backend, case))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@HARDWARE
@EACH
def test_torch_s_own_tiles_are_left_alone(backend: CpuAmx):
    case = make_case(backend.layout, torch.bfloat16, 40, 640, 576)
    dense = torch.nn.functional.linear(case.x, case.dense, case.bias)
    for _ in range(20):
        check(case, run(backend, case))
        assert torch.equal(torch.nn.functional.linear(case.x, case.dense, case.bias), dense)


@HARDWARE
@EACH
def test_run_many_is_run_of_each(backend: CpuAmx):
    cases = [make_case(backend.layout, torch.bfloat16, 2, rows, 341, bias=rows != 5) for rows in (33, 5, 64)]
    matrices = [(case.tensors, case.bias, case.shape) for case in cases]
    for out, (tensors, bias, shape) in zip(backend.run_many(cases[0].x, matrices), matrices, strict=True):
        assert torch.equal(out, backend.run(cases[0].x, tensors, bias, shape, None))


@HARDWARE
@EACH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_behave_as_in_a_dense_linear(backend: CpuAmx, value: float):
    case = make_case(backend.layout, torch.bfloat16, 3, 9, 70)
    case.x[1, 33] = value
    out = run(backend, case)
    want = torch.nn.functional.linear(case.x.float(), case.dense.float(), case.bias.float())
    torch.testing.assert_close(out.float(), want, equal_nan=True, rtol=2e-2, atol=2e-2)
    assert not out[1].isfinite().any() and out[0].isfinite().all()
