"""A tiny model folder, and ways to damage it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from wandapp_kernels.errors import ModelError, WandappError
from wandapp_kernels.models.load import load_model

SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
Weights = dict[str, torch.Tensor]


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=32, **options))


def refused(name: Path | str, pattern: str, kind: type[WandappError] = ModelError, **options: Any) -> None:
    with pytest.raises(kind, match=pattern) as caught:
        load_model(str(name), **options)
    assert "\n" not in str(caught.value)


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[Weights], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def same_weights(model: PreTrainedModel, expected: PreTrainedModel) -> bool:
    theirs = expected.state_dict()
    return all(torch.equal(weight, theirs[key]) for key, weight in model.state_dict().items())


def shard(folder: Path) -> dict[str, Any]:
    """Split the model in `folder` and return its index."""
    (folder / "model.safetensors").unlink()
    llama().to(torch.bfloat16).save_pretrained(folder, max_shard_size="4KB")
    return json.loads((folder / "model.safetensors.index.json").read_text())
