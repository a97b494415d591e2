from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruned_models import pruned_linear

from wandapp_kernels import backends
from wandapp_kernels.backends import UnusableError, base, density_bucket, register_backend, token_bucket
from wandapp_kernels.backends.dense import DenseBackend
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops import layouts
from wandapp_kernels.sparsity import BitmapWeight, NMWeight, Pattern


@given(st.integers(1, 10**6))
def test_a_bucket_of_tokens_ends_at_a_power_of_two(tokens: int) -> None:
    bucket = token_bucket(tokens)
    assert bucket.bit_count() == 1 and bucket // 2 < tokens <= bucket


@given(st.floats(0, 1))
def test_densities_are_grouped_by_tenths(density: float) -> None:
    bucket = density_bucket(density)
    assert bucket % 10 == 0 and 10 <= bucket <= 100
    assert abs(bucket / 100 - density) <= 0.05 + 1e-9 or density < 0.1


def test_a_problem_knows_its_kind_of_device() -> None:
    problem = base.Problem("nm_linear", 1, 2, 3, "2:4", 50, torch.float32, "cuda:1", 0)
    assert problem.device_type == "cuda"
    assert hash(problem) == hash(base.Problem("nm_linear", 1, 2, 3, "2:4", 50, torch.float32, "cuda:1", 0))


def test_a_backend_is_the_default_up_to_its_tokens() -> None:
    problem = base.Problem("linear", 16, 2, 3, "dense", 100, torch.float32, "cpu", 1)

    class Few(DenseBackend):
        default_tokens = 16

    assert Few().is_default(problem) and not Few().is_default(replace(problem, tokens=32))
    assert DenseBackend().is_default(replace(problem, tokens=1 << 30))


def test_names_of_backends_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BACKENDS", dict(base.BACKENDS))

    class Impostor(DenseBackend):
        pass

    known = base.BACKENDS["dense"]
    register_backend(DenseBackend())
    assert base.BACKENDS["dense"] is known
    with pytest.raises(UsageError, match="'dense' exists already"):
        register_backend(Impostor())


def test_a_module_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "MODULES", ("no_such_library",))
    monkeypatch.setattr(backends, "UNAVAILABLE", {})
    monkeypatch.setattr(backends, "_loaded", False)
    backends.load_backends()
    assert "cannot be imported" in backends.UNAVAILABLE["no_such_library"]


@pytest.mark.parametrize("layout", ["nm", "bitmap", "dense"])
def test_a_call_of_a_backend_that_proves_unusable_is_decompressed(layout: str) -> None:
    class Unusable(base.Backend):
        name = "unusable"

        def supports(self, problem: base.Problem) -> str | None:
            return None

        def run(self, *given: Any) -> torch.Tensor:
            raise UnusableError("it was tried, and failed")

    Unusable.layout = layout
    dense = pruned_linear()
    weight = dense.weight.detach()
    compressed = {"nm": NMWeight, "bitmap": BitmapWeight}.get(layout)
    tensors = [weight] if compressed is None else layouts.get_layout(layout).pack(compressed.compress(weight))
    pattern = Pattern.parse("2:4") if layout == "nm" else None
    held = (tensors, dense.bias.detach())
    call, x = Unusable().bind(*held, (12, 16), pattern), torch.randn(2, 3, 16)
    torch.testing.assert_close(call(x, held), dense(x).detach())
    for y in call.run_together(x, [(call, held)], held):
        torch.testing.assert_close(y, dense(x).detach())


def test_every_layout_can_be_decompressed_and_checked() -> None:
    for operator, canonical in (("nm_linear", "nm"), ("bitmap_linear", "bitmap")):
        assert canonical in backends.layouts_of(operator)
        for layout in backends.layouts_of(operator):
            names = [backend.name for backend in backends.backends_of(layout)]
            assert names[-2:] == [f"decompress-{layout}", f"reference-{layout}"]
            assert len(set(names)) == len(names)
    assert backends.backends_of("dense")[0].name == "dense"
