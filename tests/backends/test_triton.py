"""When the Triton backends run; that they compute correctly is tested under ``tests/kernels``."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from wandapp_kernels.kernels import launch

from wandapp_kernels import backends
from wandapp_kernels.backends import BACKENDS, Problem

NAMES = ("triton-nm", "triton-nm-dot", "triton-bitmap", "triton-bitmap-dot")


def refusal(name: str, **changes: object) -> str | None:
    backends.load_backends()
    backend = BACKENDS[name]
    given: dict = {
        "operator": f"{backend.layout}_linear",
        "tokens": 1,
        "out_features": 64,
        "in_features": 64,
        "pattern": "2:4" if backend.layout == "nm" else "unstructured",
        "density_bucket": 50,
        "dtype": torch.float16,
        "device": "cuda:0",
        "threads": 0,
    }
    return backend.supports(Problem(**{**given, **changes}))


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    import triton

    cached = (launch.why_not, launch._cannot_launch, launch._too_old)
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 0))
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: "cuda:80"))
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_runs_them_and_a_cpu_does_not(name: str, ampere: None) -> None:
    assert refusal(name) is None
    assert "needs a GPU" in (refusal(name, device="cpu") or "")
    assert "mps" in (refusal(name, device="mps") or "")
    assert "float64" in (refusal(name, dtype=torch.float64) or "")


def test_the_kernel_for_few_tokens_says_how_many(ampere: None) -> None:
    for layout in ("nm", "bitmap"):
        assert refusal(f"triton-{layout}", tokens=16) is None
        assert "at most 16 tokens" in (refusal(f"triton-{layout}", tokens=32) or "")
        assert refusal(f"triton-{layout}-dot", tokens=4096) is None


def test_other_patterns_are_refused(ampere: None) -> None:
    assert "for 2:4, not 4:8" in (refusal("triton-nm", pattern="4:8") or "")


def test_an_old_gpu_is_named(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Some T4")
    monkeypatch.setattr(torch.version, "hip", None)
    assert "Some T4 has 7.5" in (refusal("triton-nm") or "")


def test_without_triton_the_extra_to_install_is_named(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    for name in NAMES:
        assert 'pip install "wandapp_kernels[triton]"' in (refusal(name) or "")


def test_a_triton_that_cannot_launch_is_a_reason(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles its launcher on the machine: images without a compiler are common."""
    import triton

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=fail))
    for name in NAMES:
        reason = refusal(name) or ""
        assert "Failed to find C compiler. Please specify via CC" in reason and "gcc" in reason


def test_a_triton_that_cannot_be_imported_is_a_reason(ampere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    assert "Triton cannot launch kernels here (ModuleNotFoundError" in (refusal("triton-nm") or "")


def test_only_the_kernel_for_few_tokens_is_taken_unmeasured() -> None:
    backends.load_backends()
    assert [BACKENDS[name].default_tokens for name in NAMES] == [16, 0, 16, 0]
