"""``inspect_folder`` says of a compressed folder what it says of the dense one, but for the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pruned_models import pruned_model

from wandapp_kernels.checkpoint.inspect import inspect_folder
from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.runtime import sparsify
from wandapp_kernels.runtime.folder import save_compressed


def test_the_same_layers(tmp_path: Path) -> None:
    model = pruned_model("llama")
    model.save_pretrained(tmp_path / "dense")
    record = {"method": "x", "pattern": "2:4", "layers": ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]}
    sparsify(model)
    save_compressed(model, None, tmp_path / "small", record)
    dense, small = inspect_folder(tmp_path / "dense"), inspect_folder(tmp_path / "small")
    for key in ("parameters", "dense_bytes", "would_take_bytes", "layer_parameters", "layer_sparsity"):
        assert small["totals"][key] == pytest.approx(dense["totals"][key]), key
    assert small["totals"]["bytes_on_disk"] < dense["totals"]["bytes_on_disk"]
    known = {layer["name"]: layer for layer in dense["layers"]}
    assert {layer["name"] for layer in small["layers"]} == known.keys() and len(known) == 21
    for layer in small["layers"]:
        same = known[layer["name"]]
        assert layer["bytes"] == same["would_take"]["smallest"] < same["bytes"] == layer["dense_bytes"]
        assert layer["stored"] == ("2:4" if "2:4" in same["patterns"] else "unstructured")
        assert {**layer, "bytes": 0, "stored": 0} == {**same, "bytes": 0, "stored": 0}
    (problem,) = small["problems"]  # up_proj is unstructured
    assert "claims 2:4 for model.layers.0.mlp.up_proj.weight" in problem and small["unchecked"] == []


def test_a_lie_is_found(tmp_path: Path) -> None:
    model = pruned_model("llama")
    sparsify(model)
    save_compressed(model, None, tmp_path / "small", {})
    raw = bytearray((tmp_path / "small/model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "small/model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError):
        inspect_folder(tmp_path / "small")
