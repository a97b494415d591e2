"""SparseLinear: what nn.Linear does, with a weight that is compressed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_models import pruned_linear
from sparse_pairs import FORMS, close, in_every_layout, pair
from torch import nn

from wandapp_kernels.backends import layouts_of
from wandapp_kernels.errors import SparsityError, UsageError
from wandapp_kernels.ops.layouts import LAYOUTS, get_layout
from wandapp_kernels.runtime import SparseLinear


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_dense_layer_computes(form: str, bias: bool) -> None:
    linear, sparse = pair(form, bias=bias)
    for shape in [(16,), (1, 16), (3, 16), (2, 3, 16), (0, 16)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        close(sparse(x), linear(x), 1e-5)
    assert (sparse.in_features, sparse.out_features) == (16, 12)
    assert isinstance(sparse, nn.Linear) and sparse.pattern == form
    assert (sparse.bias is None) is not bias


@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from(list(FORMS)), st.sampled_from(["f4", "f2", "bf2"]))
@settings(max_examples=40, deadline=None)
def test_linear_to_sparse_and_back_is_exact(rows: int, columns: int, form: str, kind: str) -> None:
    dtype = {"f4": torch.float32, "f2": torch.float16, "bf2": torch.bfloat16}[kind]
    linear = pruned_linear(rows, columns, FORMS[form], dtype=dtype)
    linear.weight.requires_grad_(rows % 2 == 0)
    linear.train(columns % 2 == 0)
    sparse = SparseLinear.from_linear(linear, form)
    back = sparse.to_linear()
    assert type(back) is nn.Linear and back.weight.dtype == dtype
    assert torch.equal(back.weight, linear.weight) and torch.equal(sparse.weight, linear.weight)
    assert back.weight.requires_grad == linear.weight.requires_grad and back.bias is linear.bias
    assert back.training == sparse.training == linear.training


def test_auto_takes_the_form_with_the_fewest_bytes() -> None:
    for pattern, form in (("2:4", "2:4"), ("1:4", "1:4"), ("60%", "unstructured"), ("90%", "unstructured")):
        linear = pruned_linear(32, 64, pattern)
        sparse = SparseLinear.from_linear(linear)
        assert sparse.pattern == form
        for other in ("2:4", "1:4", "4:8", "unstructured"):
            try:
                assert sparse.nbytes <= SparseLinear.from_linear(linear, other).nbytes
            except SparsityError:
                continue


def test_a_weight_that_breaks_the_pattern_is_refused() -> None:
    with pytest.raises(SparsityError):
        SparseLinear.from_linear(nn.Linear(8, 4), "2:4")


def test_a_mask_chooses_what_is_kept() -> None:
    linear = nn.Linear(8, 4)
    mask = torch.arange(8).remainder(4).lt(2).expand(4, 8)
    sparse = SparseLinear.from_linear(linear, "2:4", mask=mask)
    assert torch.equal(sparse.weight, torch.where(mask, linear.weight, 0))


@pytest.mark.parametrize("form", FORMS)
def test_the_weight_is_held_once_as_a_frozen_parameter_and_buffers(form: str) -> None:
    _, sparse = pair(form)
    values, *_ = [p for name, p in sparse.named_parameters() if name != "bias"]
    assert not values.requires_grad and values.numel() < 12 * 16
    held = sum(t.nbytes for t in (*sparse.parameters(), *sparse.buffers())) - sparse.bias.nbytes
    assert held == sparse.nbytes < 12 * 16 * 4
    assert not any(tensor.shape == (12, 16) for tensor in (*sparse.parameters(), *sparse.buffers()))


def test_the_weight_cannot_be_assigned_and_is_a_copy() -> None:
    linear, sparse = pair()
    for value in (linear.weight, linear.weight.data, None):
        with pytest.raises(UsageError, match="cannot be assigned"):
            sparse.weight = value
    assert torch.equal(sparse.weight, linear.weight)


@pytest.mark.parametrize("form", FORMS)
def test_deepcopy_is_independent(form: str) -> None:
    linear, sparse = pair(form)
    copied = copy.deepcopy(nn.Sequential(sparse, sparse))
    assert copied[0] is copied[1] and isinstance(copied[0], SparseLinear)
    assert torch.equal(copied[0].weight, linear.weight)
    with torch.no_grad():
        copied[0].bias.zero_()
        next(iter(copied[0].parameters())).zero_()
    assert torch.equal(sparse.weight, linear.weight) and torch.equal(sparse.bias, linear.bias)
    assert not copied[0].weight.any() or not copied[0].bias.any()


def test_pickling_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    _, sparse = pair()
    with pytest.raises(UsageError, match="safetensors"):
        pickle.dumps(sparse)
    with pytest.raises(UsageError, match="safetensors"):
        torch.save(nn.Sequential(sparse), tmp_path / "model.pt")
    torch.save(sparse.state_dict(), tmp_path / "state.pt")


@pytest.mark.parametrize("form", FORMS)
def test_moving_to_another_type_and_device(form: str) -> None:
    linear, sparse = pair(form)
    for dtype in (torch.bfloat16, torch.float64):
        sparse.to(dtype)
        linear.to(dtype)
        assert sparse.dtype == sparse.weight.dtype == sparse.bias.dtype == dtype
        assert torch.equal(sparse.weight, linear.weight)
        x = torch.randn(3, 16).to(dtype)
        close(sparse(x), linear(x), 2e-2 if dtype == torch.bfloat16 else 1e-9)
        assert all(not b.is_floating_point() for b in sparse.buffers())
    assert sparse.to("meta").bias.is_meta and all(t.is_meta for t in (*sparse.parameters(), *sparse.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_packed_values_have_no_memory_format(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    linear, canonical = pair(columns=64, dtype=dtype)
    x = torch.randn(1, 64, dtype=dtype)
    for sparse in in_every_layout(canonical):
        name, values = sparse.layout, next(iter(sparse.parameters()))
        expected, where = sparse(x), values.data_ptr()
        assert sparse.to(memory_format=memory_format).layout == name
        assert all(tensor.is_contiguous() for tensor in (*sparse.parameters(), *sparse.buffers()))
        assert next(iter(sparse.parameters())) is values and values.data_ptr() == where
        assert torch.equal(sparse(x), expected) and torch.equal(sparse.weight, linear.weight)
        shared = sparse.share_memory()
        assert all(tensor.is_shared() for tensor in (*shared.parameters(), *shared.buffers()))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("form", ["2:4", "unstructured"])
def test_a_layer_without_rows(form: str) -> None:
    sparse = SparseLinear.from_linear(nn.Linear(16, 0), form)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            for shape in [(16,), (3, 16), (0, 16)]:
                assert sparse(torch.randn(shape)).shape == (*shape[:-1], 0)
            torch.compiler.reset()
            compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
            assert compiled(torch.randn(3, 16)).shape == (3, 0)


class FlippedLayout(type(LAYOUTS["nm"])):
    """Rows from last to first: a layout that is not the canonical one."""

    name = "flipped"

    def pack(self, weight):
        return [tensor.flip(0).contiguous() for tensor in super().pack(weight)]

    def unpack(self, tensors, shape, pattern):
        return super().unpack([tensor.flip(0).contiguous() for tensor in tensors], shape, pattern)


def test_another_layout_computes_the_same_and_saves_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYOUTS, "flipped", FlippedLayout())
    linear, canonical = pair()
    sparse = SparseLinear.from_linear(linear, "2:4", layout="flipped")
    assert sparse.layout == "flipped" and torch.equal(sparse.weight, linear.weight)
    assert "weight_values" not in dict(sparse.named_parameters())
    x = torch.randn(3, 16)
    close(sparse(x), linear(x), 1e-5)
    state = sparse.state_dict()
    assert state.keys() == canonical.state_dict().keys()
    for name, tensor in canonical.state_dict().items():
        assert torch.equal(state[name], tensor), name
    sparse.to(torch.bfloat16)
    assert sparse.layout == "flipped" and torch.equal(sparse.weight, linear.weight.bfloat16())
    sparse.load_state_dict(state)
    assert sparse.layout == "flipped" and torch.equal(sparse.weight, linear.weight.bfloat16())
    assert torch.equal(copy.deepcopy(sparse).weight, sparse.weight)
    sparse.set_layout("nm")
    assert "weight_values" in dict(sparse.named_parameters()) and torch.equal(sparse.weight, linear.weight.bfloat16())
    for wrong in ("bitmap", "nothing"):
        with pytest.raises(UsageError, match="layout"):
            sparse.set_layout(wrong)
    assert torch.equal(sparse.weight, linear.weight.bfloat16())


@pytest.mark.parametrize("form", ["2:4", "unstructured"])
def test_every_layout_of_this_machine_behaves_alike(form: str) -> None:
    linear, canonical = pair(form)
    state, x = canonical.state_dict(), torch.randn(3, 16)
    for name in [sparse.layout for sparse in in_every_layout(canonical)]:
        sparse = SparseLinear.from_linear(linear, form, layout=name)
        assert sparse.layout == name and torch.equal(sparse.weight, linear.weight)
        close(sparse(x), linear(x), 1e-5)
        for key, tensor in sparse.state_dict().items():
            assert torch.equal(tensor, state[key]), (name, key)
        copied = copy.deepcopy(sparse).to(torch.bfloat16)
        copied.load_state_dict(state)
        assert torch.equal(copied.weight, linear.weight.bfloat16()), name
        wide = copy.deepcopy(sparse).double()
        assert torch.equal(wide.weight, linear.weight.double()), name
        assert torch.equal(sparse.to_linear().weight, linear.weight), name


def test_a_packed_layout_is_there_from_the_start() -> None:
    pytest.importorskip("wandapp_kernels.backends.cpu", reason="the compiled CPU kernels are missing")
    program = (
        "import torch; from wandapp_kernels.runtime import SparseLinear\n"
        "linear = torch.nn.Linear(8, 4); linear.weight.data[:, ::2] = 0\n"
        "assert SparseLinear.from_linear(linear, '2:4', layout='nm_pairs').layout == 'nm_pairs'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_input_and_the_bias_only(form: str) -> None:
    linear, sparse = pair(form)
    sparse.bias = nn.Parameter(linear.bias.detach().clone())
    x = torch.randn(2, 3, 16, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    sparse(x).square().sum().backward()
    linear(z).square().sum().backward()
    close(x.grad, z.grad, 1e-4)
    close(sparse.bias.grad, linear.bias.grad, 1e-4)
    assert all(p.grad is None for name, p in sparse.named_parameters() if name != "bias")


def test_a_low_rank_adapter_trains_on_top() -> None:
    torch.manual_seed(0)
    sparse = SparseLinear.from_linear(pruned_linear(16, 16, "2:4"))
    before = sparse.weight
    down, up = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
    nn.init.zeros_(up.weight)
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = torch.optim.Adam([*down.parameters(), *up.parameters()], 0.02)
    losses = []
    for _ in range(60):
        loss = (sparse(sparse(x) + up(down(x))) - target).square().mean()  # the adapter's gradient passes a layer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert torch.equal(sparse.weight, before)


def test_peft_wraps_it_as_a_linear() -> None:
    peft = pytest.importorskip("peft")
    linear, sparse = pair(bias=False)
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"], r=2), nn.Sequential(sparse))
    x = torch.randn(2, 16)
    close(wrapped(x), linear(x), 1e-5)
    wrapped(x).sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_it_compiles_whole(form: str) -> None:
    linear, sparse = pair(form)
    for gradients in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(sparse, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.set_grad_enabled(gradients):
            for tokens in (1, 5, 9):
                x = torch.randn(tokens, 16)
                close(compiled(x), linear(x), 1e-5)


def test_a_type_that_the_layout_cannot_hold_gets_the_canonical_one() -> None:
    dense = nn.Linear(32, 8, bias=False)
    with torch.no_grad():
        dense.weight.mul_(torch.tensor([True, False, False, True]).repeat(8))
    layer = SparseLinear.from_linear(dense, "2:4")
    for name in layouts_of("nm_linear"):
        if get_layout(name).supports(layer.compressed()) is not None:
            continue
        layer.set_layout(name)
        wide = copy.deepcopy(layer).double()
        assert wide.layout == "nm" or get_layout(wide.layout).supports(wide.compressed()) is None
        assert wide.weight.dtype == torch.float64 and torch.equal(wide.weight, dense.weight.double())
