"""Folders of a few weights to inspect."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from wandapp_kernels.checkpoint.inspect import inspect_folder
from wandapp_kernels.sparsity import Pattern, mask_from_scores

Q = "model.layers.0.self_attn.q_proj"


def folder_with(path: Path, tensors: dict[str, torch.Tensor], record: dict | None = None, **config) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if record is not None:
        (path / "wandapp.json").write_text(json.dumps(record))
    return path


def only_layer(path: Path) -> dict:
    (layer,) = inspect_folder(path)["layers"]
    return layer


def pruned(rows: int, columns: int, pattern: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) + 5
    return (weight * mask_from_scores(weight, Pattern.parse(pattern))).to(dtype)
