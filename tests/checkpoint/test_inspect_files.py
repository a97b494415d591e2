"""Inspection of files that are split, linked, missing or damaged."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from inspected_folders import Q, folder_with, only_layer, pruned
from safetensors.torch import save_file

from wandapp_kernels.checkpoint.inspect import inspect_folder
from wandapp_kernels.errors import CheckpointError


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with one layer each, and their index."""
    for i in (1, 2):
        save_file({f"model.layers.{i}.mlp.up_proj.weight": pruned(4, 8, "2:4")}, tmp_path / f"part-{i}.safetensors")
    write_index(tmp_path, {f"model.layers.{i}.mlp.up_proj.weight": f"part-{i}.safetensors" for i in (1, 2)})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(sharded):
    result = inspect_folder(sharded)
    assert [layer["name"] for layer in result["layers"]] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2)]
    assert [file["name"] for file in result["files"]] == ["part-1.safetensors", "part-2.safetensors"]


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../secret.safetensors", "..", ".", "", "sub/part.safetensors", "a\\b", "a\0b", 3, None, ["x"],
])  # fmt: skip
def test_an_index_that_points_elsewhere(sharded, name):
    save_file({"x": torch.ones(1)}, sharded.parent / "secret.safetensors")
    write_index(sharded, {"x": name})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        inspect_folder(sharded)


@pytest.mark.parametrize("name", ["part-1.safetensors", "model.safetensors"])
def test_a_link_that_leaves_the_folder(sharded, name):
    (sharded / name).unlink(missing_ok=True)
    outside = sharded.parent / f"{sharded.name}-outside.safetensors"
    save_file({"model.layers.1.mlp.up_proj.weight": torch.ones(4, 8)}, outside)
    (sharded / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leaves the folder"):
        inspect_folder(sharded)


def test_a_link_to_itself(sharded):
    (sharded / "part-1.safetensors").unlink()
    (sharded / "part-1.safetensors").symlink_to("part-1.safetensors")
    with pytest.raises(CheckpointError, match=r"part-1.safetensors is missing"):
        inspect_folder(sharded)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folder_with(snapshot, {f"{Q}.weight": pruned(4, 8, "2:4")})
    blobs.mkdir()
    os.rename(snapshot / "model.safetensors", blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert only_layer(snapshot)["patterns"][0] == "2:4"


def test_missing_and_contradicting_shards(sharded):
    first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 2))
    write_index(sharded, {first: "part-1.safetensors", second: "part-1.safetensors"})
    with pytest.raises(CheckpointError, match=f"part-1.safetensors .* lacks {second}"):
        inspect_folder(sharded)
    save_file({first: torch.ones(4, 8), second: torch.ones(4, 8)}, sharded / "part-2.safetensors")
    write_index(sharded, {first: "part-1.safetensors", second: "part-2.safetensors"})
    with pytest.raises(CheckpointError, match=f"{first} is in both part-1.safetensors and part-2.safetensors"):
        inspect_folder(sharded)
    (sharded / "part-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-2.safetensors is missing"):
        inspect_folder(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_an_index_without_a_map(sharded, weight_map):
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match="no weight_map"):
        inspect_folder(sharded)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"x"', "[" * 100_000, b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", ["config.json", "wandapp.json", "model.safetensors.index.json"])
def test_broken_json(sharded, name, content):
    (sharded / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CheckpointError, match=name):
        inspect_folder(sharded)


def test_nothing_to_inspect(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        inspect_folder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a folder"):
        inspect_folder("x" * 300)
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        inspect_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        inspect_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin but no model.safetensors"):
        inspect_folder(tmp_path)


def test_damaged_weights_are_one_sentence(tmp_path):
    path = folder_with(tmp_path, {f"{Q}.weight": pruned(16, 16, "2:4")})
    whole = (path / "model.safetensors").read_bytes()
    generator = random.Random(0)
    damaged = [whole[:cut] for cut in (0, 1, 7, 8, 40, len(whole) - 1)] + [whole + b"x", b"\xff" * 8 + whole[8:]]
    for _ in range(60):
        changed = bytearray(whole)
        changed[generator.randrange(8, 110)] = generator.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for content in damaged:
        (path / "model.safetensors").write_bytes(content)
        try:
            json.dumps(inspect_folder(path), allow_nan=False)
        except CheckpointError as error:
            refused += 1
            assert "model.safetensors" in str(error)
    assert refused > 40


# For reading
