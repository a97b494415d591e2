"""The state dict of a SparseLinear: written, read, and refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from pruned_models import pruned_linear
from safetensors.torch import load_file, save_file
from sparse_pairs import FORMS, close, in_every_layout, pair
from torch import nn
from torch.nn.utils import parametrize, prune

from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.runtime import SparseLinear


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip(form: str, assign: bool, tmp_path: Path) -> None:
    linear, sparse = pair(form)
    save_file(sparse.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    rest = {"weight_bitmap", "weight_row_offsets"} if form == "unstructured" else {"weight_indices"}
    assert state.keys() == {"weight_values", "bias", *rest}
    other = SparseLinear.from_linear(pruned_linear(pattern="80%" if form == "unstructured" else FORMS[form]), form)
    other.bias.data.zero_()
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other.weight, linear.weight) and torch.equal(other.bias, linear.bias)
    state["weight_values"].zero_()
    assert torch.equal(other.weight, linear.weight) is not assign


def test_loading_casts_unless_it_assigns() -> None:
    linear, sparse = pair()
    half = SparseLinear.from_linear(pruned_linear(dtype=torch.float16))
    half.load_state_dict(sparse.state_dict())
    assert half.dtype == half.weight.dtype == torch.float16 and torch.equal(half.weight, linear.weight.half())
    half.load_state_dict(sparse.state_dict(), assign=True)
    assert half.dtype == torch.float32 and torch.equal(half.weight, linear.weight)


def test_loading_without_strictness_takes_what_there_is() -> None:
    (_, sparse), other = pair(), SparseLinear.from_linear(pruned_linear(pattern="1:4"), "2:4")
    other.bias.data.zero_()
    state = other.state_dict()
    bias = state.pop("bias")
    found = sparse.load_state_dict(state, strict=False)
    assert found.missing_keys == ["bias"] and not found.unexpected_keys
    assert torch.equal(sparse.weight, other.weight) and sparse.bias.any()
    before = sparse.weight
    found = sparse.load_state_dict({"bias": bias, "weight_indices": state["weight_indices"]}, strict=False)
    assert found.missing_keys == ["weight_values"] and not sparse.bias.any() and torch.equal(sparse.weight, before)


def test_assigning_a_type_that_the_layout_cannot_hold() -> None:
    linear, canonical = pair()
    wide = copy.deepcopy(linear).double()
    state = SparseLinear.from_linear(wide, "2:4").state_dict()
    for sparse in in_every_layout(canonical):
        name = sparse.layout
        sparse.load_state_dict(state, assign=True)
        assert sparse.layout == name or get_layout(name).supports(sparse.compressed()) is not None
        assert sparse.dtype == sparse.bias.dtype == torch.float64 and torch.equal(sparse.weight, wide.weight)
        x = torch.randn(3, 16, dtype=torch.float64)
        close(sparse(x), wide(x), 1e-9)


@pytest.mark.parametrize("form", ["2:4", "unstructured"])
def test_a_bias_that_is_parametrized_or_pruned_by_torch_is_saved_and_loaded(form: str) -> None:
    def parametrized() -> SparseLinear:
        sparse = pair(form)[1]
        parametrize.register_parametrization(sparse, "bias", nn.Identity())
        return sparse

    def pruned() -> SparseLinear:
        return prune.l1_unstructured(pair(form)[1], "bias", 0.5)

    for make, keys in ((parametrized, {"parametrizations.bias.original"}), (pruned, {"bias_orig", "bias_mask"})):
        sparse, other = make(), make()
        with torch.no_grad():
            for parameter in sparse.parameters():
                if parameter.requires_grad:
                    parameter.fill_(3)
        x = torch.randn(2, 16)
        assert not torch.equal(sparse(x), other(x))
        state = sparse.state_dict()
        assert keys == {name for name in state if not name.startswith("weight_")}
        other.load_state_dict(state)
        assert torch.equal(sparse(x), other(x))
        with pytest.raises(RuntimeError, match=r"Unexpected key.*packed_0"):
            other.load_state_dict({**state, "packed_0": state["weight_values"]})


@pytest.mark.parametrize("form", FORMS)
def test_wrong_state_is_refused(form: str) -> None:
    linear, sparse = pair(form)
    before = sparse.weight
    good = sparse.state_dict()

    def refused(match: str, **changes: torch.Tensor | None) -> None:
        state = {**good, **changes}
        with pytest.raises(RuntimeError, match=match):
            sparse.load_state_dict({name: tensor for name, tensor in state.items() if tensor is not None})
        assert torch.equal(sparse.weight, before)

    refused("Missing key.*weight_values", weight_values=None)
    refused("Missing key.*bias", bias=None)
    refused("Unexpected key.*weight", weight=linear.weight)
    refused("weight", weight_values=good["weight_values"][:-1])
    refused("NaN", weight_values=torch.full_like(good["weight_values"], torch.nan))
    refused("size mismatch for bias", bias=torch.zeros(3))
    if form == "unstructured":
        refused("row_offsets", weight_row_offsets=good["weight_row_offsets"].flip(0))
        refused("bitmap", weight_bitmap=~good["weight_bitmap"])
    else:
        refused("ascend|group", weight_indices=torch.zeros_like(good["weight_indices"]))
