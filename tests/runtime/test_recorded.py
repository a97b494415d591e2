"""A plain save_pretrained of a swapped model writes what its layers are at that moment."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pruned_models import pruned_model
from tiny_models import token_ids
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import wandapp_kernels as wk
from wandapp_kernels.checkpoint.compressed import is_compressed
from wandapp_kernels.errors import ModelError
from wandapp_kernels.runtime.recorded import CompressedLayers
from wandapp_kernels.runtime.swap import sparse_layers

DOWN = "model.layers.0.mlp.down_proj"
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def half(model: PreTrainedModel) -> PreTrainedModel:
    return model.to(torch.bfloat16)


def half_of_a_copy(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).to(torch.bfloat16)


def half_of_a_copied_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(get_peft_model(model, LORA)).unload().to(torch.bfloat16)


def one_dense(model: PreTrainedModel) -> PreTrainedModel:
    model.set_submodule(DOWN, model.get_submodule(DOWN).to_linear())
    return model


def wrapped_and_unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    return get_peft_model(model, LORA).unload()


def swapped_in_a_wrapper(model: PreTrainedModel) -> PreTrainedModel:
    wk.desparsify(model)
    wrapper = get_peft_model(model, LORA)
    assert wk.sparsify(wrapper).swapped
    return wrapper.unload()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [half, half_of_a_copy, half_of_a_copied_wrapper, one_dense, wrapped_and_unwrapped, swapped_in_a_wrapper],
)
@pytest.mark.parametrize("source", ["load", "from_pretrained"])
def test_what_is_changed_after_the_swap_is_written_as_it_is(
    change: Callable[[PreTrainedModel], PreTrainedModel], source: str, tmp_path: Path
) -> None:
    model = pruned_model("llama", ("2:4",))
    wk.sparsify(model)
    wk.save(model, None, tmp_path / "first")
    if source == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    changed = change(model)
    changed.save_pretrained(tmp_path / "second")
    again = wk.load(str(tmp_path / "second")).model
    ids = token_ids(1, 6)
    assert again.dtype == changed.dtype
    # .to(bfloat16) rounds the rotary frequencies too, loading does not.
    close = 0.1 if changed.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(again(ids).logits, changed(ids).logits, rtol=close, atol=close)
    names = [name for name, _ in sparse_layers(changed)]
    assert names == [name for name, _ in sparse_layers(again)] and len(names) in (20, 21)


def test_copies_and_what_outlives_the_model_say_what_was_true_last() -> None:
    model = pruned_model("llama", ("2:4",))
    wk.sparsify(model)
    entry = model.config.quantization_config
    assert isinstance(entry, CompressedLayers) and entry == entry.to_dict() == copy.deepcopy(entry)
    layers = entry.to_dict()["layers"]
    entry.to_dict()["layers"].clear()
    assert entry.to_dict()["layers"] == layers and len(layers) == 21
    twin = copy.deepcopy(model)
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert type(config.quantization_config) is dict
    one_dense(model)
    assert DOWN not in entry.to_dict()["layers"] and DOWN in config.quantization_config["layers"]
    assert DOWN in twin.config.quantization_config.to_dict()["layers"]
    assert json.loads(model.config.to_json_string())["quantization_config"] == entry.to_dict()
    wk.desparsify(twin)
    assert not hasattr(twin.config, "quantization_config")
    del model
    assert len(entry.to_dict()["layers"]) == 20 and is_compressed({"quantization_config": entry.to_dict()})


@pytest.mark.parametrize("inner", ["model", "model.layers", "model.layers.1", "model.layers.1.mlp"])
@pytest.mark.parametrize("save", ["save_pretrained", "wk.save"])
def test_an_inner_module_is_swapped_and_the_outer_one_is_saved(inner: str, save: str, tmp_path: Path) -> None:
    model = pruned_model("llama", ("2:4",))
    assert wk.sparsify(model.get_submodule(inner)).swapped
    if save == "wk.save":
        wk.save(model, None, tmp_path / "out")
    else:
        model.save_pretrained(tmp_path / "out")
    ids, names = token_ids(1, 6), [name for name, _ in sparse_layers(model)]
    assert all(name.startswith(inner) for name in names)
    for again in (wk.load(tmp_path / "out").model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert [name for name, _ in sparse_layers(again)] == names
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_inner_model_is_swapped_again_or_saved_on_its_own(tmp_path: Path) -> None:
    model = pruned_model("llama", ("2:4",))
    wk.sparsify(model)
    wk.sparsify(model.model)
    model.model.save_pretrained(tmp_path / "inner")
    model.save_pretrained(tmp_path / "outer")
    layers = {
        part: json.loads((tmp_path / part / "config.json").read_text())["quantization_config"]["layers"]
        for part in ("inner", "outer")
    }
    assert layers["outer"] == {f"model.{name}": form for name, form in layers["inner"].items()}
    wk.load(tmp_path / "outer")
    wk.desparsify(model.model)
    model.save_pretrained(tmp_path / "dense")
    assert not any(sparse_layers(wk.load(tmp_path / "dense").model))


@pytest.mark.parametrize("swapped", [True, False])
def test_adapters_are_not_written_where_nothing_reads_them(swapped: bool, tmp_path: Path) -> None:
    model = pruned_model("llama", ("2:4",))
    if swapped:
        wk.sparsify(model)
    wrapper = get_peft_model(model, LORA)
    for one in (wrapper, model):
        with pytest.raises(ModelError, match=r"has adapters \(at .*q_proj.*unload"):
            wk.save(one, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    wk.save(wrapper.unload(), None, tmp_path / "out")
    wk.load(tmp_path / "out")


def test_a_wrapped_model_is_made_dense(tmp_path: Path) -> None:
    model = pruned_model("llama", ("2:4",))
    wk.sparsify(model)
    wk.save(model, None, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    wrapper = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    ids = token_ids(1, 6)
    with torch.no_grad():
        expected = wrapper(ids).logits
        assert len(wk.desparsify(wrapper)) == 21 and not hasattr(loaded, "hf_quantizer")
        torch.testing.assert_close(wrapper(ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged: Any = wrapper.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(sparse_layers(merged)) and type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
