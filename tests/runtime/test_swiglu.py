"""swiglu: one launch where the kernel is, the plain product elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wandapp_kernels as wk
from wandapp_kernels.errors import UsageError
from wandapp_kernels.runtime import SparseLinear


def layers(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    pair = nn.Linear(64, 48, bias=bias, dtype=dtype), nn.Linear(64, 48, bias=bias, dtype=dtype)
    for layer in pair:
        with torch.no_grad():
            layer.weight.view(48, -1, 4)[..., :2] = 0
    return pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_on_dense_and_sparse_layers(dtype: torch.dtype, bias: bool) -> None:
    gate, up = layers(dtype, bias)
    sparse = [SparseLinear.from_linear(layer, "2:4") for layer in (gate, up)]
    x = torch.randn(2, 3, 64, dtype=dtype)
    with torch.no_grad():
        expected = nn.functional.silu(gate(x)) * up(x)
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(wk.swiglu(x, gate, up), expected, rtol=0, atol=0)
        torch.testing.assert_close(wk.swiglu(x, *sparse), expected, **tolerance)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(wk.swiglu(x, *sparse).sum(), x)
    (wanted,) = torch.autograd.grad((nn.functional.silu(gate(x)) * up(x)).sum(), x)
    torch.testing.assert_close(gradient, wanted, **tolerance)


def test_layers_of_two_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="one shape"):
        wk.swiglu(torch.randn(1, 64), nn.Linear(64, 8), nn.Linear(64, 9))


def test_the_kernel_runs_where_it_takes_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandapp_kernels.backends.cuda import nm

    gate, up = (SparseLinear.from_linear(layer, "2:4", layout="nm-mma") for layer in layers(torch.bfloat16))
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    seen = []

    def kernel(x, gate_tensors, up_tensors, gate_bias, up_bias, shape):
        seen.append((gate_tensors, up_tensors, gate_bias, up_bias, shape))
        return torch.full((3, 48), 7.0, dtype=x.dtype)

    monkeypatch.setattr(nm, "nm_swiglu", kernel)
    with torch.no_grad():
        assert not bool((wk.swiglu(x, gate, up) == 7).any()) and not seen  # these tensors are on no GPU
        monkeypatch.setattr(nm, "nm_swiglu_refusal", lambda *_: None)
        assert bool((wk.swiglu(x, gate, up) == 7).all())
        ((gate_tensors, up_tensors, gate_bias, up_bias, shape),) = seen
        assert gate_tensors[0] is gate._tensors()[0] and up_tensors[0] is up._tensors()[0]
        assert gate_bias is gate.bias and up_bias is up.bias and shape == (48, 64)
        canonical = SparseLinear.from_linear(gate.to_linear(), "2:4")
        assert not bool((wk.swiglu(x, canonical, up) == 7).any())
        with torch.autocast("cpu", torch.bfloat16):
            wk.swiglu(x, gate, up)
        gate.register_forward_hook(lambda *_: None)
        wk.swiglu(x, gate, up)
    wk.swiglu(x.requires_grad_(), gate, up)
    assert len(seen) == 1
