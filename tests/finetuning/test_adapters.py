"""PEFT folders: what is written, who reads it, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from pruned_models import pruned_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model, token_ids
from torch import nn

import wandapp_kernels as wk
from wandapp_kernels.errors import CheckpointError, ModelError, UsageError
from wandapp_kernels.finetuning import adapters
from wandapp_kernels.finetuning.masked_lora import masked_lora
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.finetuning.training import train

IDS = token_ids(2, 9)


def tuned_model(arch: str = "llama", **changes: Any) -> PeftModel:
    recipe = {"targets": "all", "rank": 2, "alpha": 4, "lr": 1e-2, "batch": 2, "warmup": 1, **changes}
    tuned, _ = wk.finetune(pruned_model(arch), token_ids(6, 8), **recipe)
    return tuned


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_folder_loads_on_the_pruned_model_dense_and_compressed(arch: str, tmp_path: Path) -> None:
    tuned = tuned_model(arch)
    adapters.save_adapters(tuned, tmp_path / "out", {"finetuning": []}, base="pruned")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "wandapp.json"]
    modes = {(tmp_path / "out" / name).stat().st_mode for name in files}
    config = json.loads((tmp_path / "out" / files[0]).read_text())
    assert len(modes) == 1 and config["base_model_name_or_path"] == "pruned" and config["inference_mode"]
    assert config["r"] == 2 and config["lora_alpha"] == 4 and config["fan_in_fan_out"] == (arch == "gpt2")
    with torch.no_grad():
        expected = tuned(IDS).logits
        assert not torch.allclose(expected, pruned_model(arch)(IDS).logits, atol=1e-2)
        plain = PeftModel.from_pretrained(pruned_model(arch), str(tmp_path / "out")).eval()
        assert torch.equal(plain(IDS).logits, expected)
        compressed = pruned_model(arch)
        wk.sparsify(compressed)
        adapters.add_adapters(compressed, tmp_path / "out")
        torch.testing.assert_close(compressed(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert not compressed.training


def test_a_layer_without_zeros_trains_as_pefts_does() -> None:
    """Without a mask both forms are one function: two implementations, the same losses step by step."""
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    settings = FinetuneSettings(rank=3, dropout=0, lr=1e-2, batch=2, warmup=1, epochs=2)
    merged, beside, ids = tiny_model("llama"), tiny_model("llama"), token_ids(6, 8)
    tuned = adapters.attach(beside, layers, settings)
    theirs = [own for own in tuned.parameters() if own.requires_grad]  # A and B of each layer, as ours
    with masked_lora(merged, layers, settings) as ours:
        with torch.no_grad():
            for own, other in zip(ours, theirs, strict=True):
                other.copy_(own)
        losses = train(merged, ours, ids, settings, lambda _: None)
    expected = train(tuned, theirs, ids, settings, lambda _: None)
    assert losses[-1] != losses[0]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, tuned(IDS).logits, rtol=1e-3, atol=1e-3)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        adapters.save_adapters(tuned_model(), tmp_path / name, {})
    one, two = tmp_path / "one", tmp_path / "two"
    for file in (adapters.CONFIG, adapters.WEIGHTS):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    names = json.loads((one / adapters.CONFIG).read_text())["target_modules"]
    assert len(names) == 7 and names == sorted(names)  # a set in PEFT, whose order changes from process to process


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        adapters.add_adapters(pruned_model("llama"), tmp_path)
    adapters.save_adapters(tuned_model(), folder, {})
    with pytest.raises(CheckpointError, match="not empty"):
        adapters.save_adapters(tuned_model(), folder, {})
    with pytest.raises(ModelError, match="do not fit the model"):
        adapters.add_adapters(pruned_model("gpt2"), folder)
    with pytest.raises(ModelError, match="do not fit the model"):
        adapters.add_adapters(pruned_model("llama", intermediate_size=64), folder)
    weights = load_file(folder / adapters.WEIGHTS)
    dropped = next(iter(weights))
    save_file({name: tensor for name, tensor in weights.items() if name != dropped}, folder / adapters.WEIGHTS)
    with pytest.raises(ModelError, match="Found missing adapter keys"):
        adapters.add_adapters(pruned_model("llama"), folder)
    (folder / adapters.WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        adapters.add_adapters(pruned_model("llama"), folder)
    with pytest.raises(UsageError, match="has adapters already"):
        save_file(weights, folder / adapters.WEIGHTS)
        adapters.add_adapters(tuned_model().get_base_model(), folder)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapters.require_peft() is peft
    monkeypatch.setitem(sys.modules, "peft", None)
    model, ids = pruned_model("llama"), token_ids(4, 8)
    flags = [own.requires_grad for own in model.parameters()]
    with pytest.raises(UsageError, match=r"wandapp_kernels\[peft\]"):
        wk.finetune(model, ids, batch=2, warmup=1)
    assert [own.requires_grad for own in model.parameters()] == flags and isinstance(model, nn.Module)
    wk.finetune(model, ids, batch=2, warmup=1, merge=True)
