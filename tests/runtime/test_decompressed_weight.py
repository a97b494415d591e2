"""The weight of a SparseLinear is read like any tensor; writing into it raises instead of being lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pruned_models import pruned_linear, pruned_model
from tiny_models import token_ids
from torch import nn
from torch.nn import functional

import wandapp_kernels as wk
from wandapp_kernels.errors import UsageError
from wandapp_kernels.runtime import SparseLinear


def merge(layer: SparseLinear) -> None:
    layer.weight.data += torch.ones(12, 16)


def replace(layer: SparseLinear) -> None:
    layer.weight.data = torch.ones(12, 16)


def assign(layer: SparseLinear) -> None:
    layer.weight[0] = 1


def in_place(layer: SparseLinear) -> None:
    weight = layer.weight
    weight -= 1


WRITES: dict[str, Callable[[SparseLinear], Any]] = {
    "merge": merge,
    "replace": replace,
    "assign": assign,
    "in_place": in_place,
    "zero_": lambda layer: layer.weight.zero_(),
    "copy_": lambda layer: layer.weight.detach().copy_(torch.ones(12, 16)),
    "fill_": lambda layer: layer.weight.data.detach().fill_(1),
    "out": lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    "init": lambda layer: nn.init.kaiming_uniform_(layer.weight),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("form", ["2:4", "60%"])
def test_writing_raises(write: str, form: str) -> None:
    linear = pruned_linear(pattern=form)
    layer = SparseLinear.from_linear(linear)
    with pytest.raises(UsageError, match="would be lost; make the model dense first"):
        WRITES[write](layer)
    assert torch.equal(layer.weight, linear.weight)


def test_everything_else_is_as_with_a_tensor() -> None:
    linear = pruned_linear()
    layer = SparseLinear.from_linear(linear)
    weight, dense, x = layer.weight, linear.weight.detach(), torch.randn(3, 16)
    for read in (
        lambda w: w.to(torch.float64),
        lambda w: w.T,
        lambda w: w.clone().mul_(2),
        lambda w: ~(w > 0),
        lambda w: functional.linear(x, w),
        lambda w: torch.linalg.svdvals(w.data.float()),
        lambda w: torch.from_numpy(w.numpy().copy()),
        lambda w: torch.stack([w, w]),
        lambda w: copy.deepcopy(w),
        lambda w: torch.zeros(12, 16).copy_(w),
    ):
        assert type(read(weight)) is torch.Tensor and torch.equal(read(weight), read(dense))
    assert (weight.shape, weight.dtype, weight.device, weight.is_contiguous()) == ((12, 16), *_of(dense))
    assert type(layer.to_linear().weight) is nn.Parameter and repr(weight).startswith("DecompressedWeight(")


def _of(tensor: torch.Tensor) -> tuple[torch.dtype, torch.device, bool]:
    return tensor.dtype, tensor.device, tensor.is_contiguous()


def test_a_parameter_made_of_it_is_its_makers() -> None:
    layer = SparseLinear.from_linear(pruned_linear())
    own = nn.Linear(16, 12, bias=False)
    own.weight = nn.Parameter(layer.weight)
    own.to(torch.float64)
    own(torch.ones(2, 16).double()).sum().backward()
    torch.optim.SGD(own.parameters(), lr=1.0).step()
    torch.testing.assert_close(own.weight.data, layer.weight.double() - 2)
    twin = copy.deepcopy(own)
    assert type(twin.weight) is nn.Parameter and torch.equal(twin.weight, own.weight)
    with torch.no_grad():
        own.weight.data.zero_()
        assert not own.weight.any() and twin.weight.any() and layer.weight.any()
    assert torch.equal(SparseLinear.from_linear(own, "unstructured").weight, own.weight)


@torch.no_grad()
def test_an_adapter_is_not_merged_into_nothing() -> None:
    model = pruned_model("llama", ("2:4",))
    wk.sparsify(model)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    wrapper, ids = get_peft_model(model, config).eval(), token_ids(1, 6)
    expected = wrapper(ids).logits
    for way in (
        lambda: wrapper.merge_adapter(),
        lambda: wrapper.merge_and_unload(),
        lambda: wrapper.merge_adapter(safe_merge=True),
    ):
        with pytest.raises(UsageError, match="desparsify"):
            way()
    assert torch.equal(wrapper(ids).logits, expected)
    wk.desparsify(wrapper)
    torch.testing.assert_close(wrapper.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="desparsify"):
        wk.sparsify(dense := pruned_model("llama", ("2:4",)))
        get_peft_model(dense, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
