from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from wandapp_kernels.checkpoint import inspect as inspect_module
from wandapp_kernels.checkpoint.inspect import inspect_folder
from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.report.tables import format_inspection
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


# What is counted


def expected_patterns(weight: np.ndarray) -> list[str]:
    """Counted group by group in plain loops."""
    found = []
    for n, m in ((2, 4), (4, 8), (1, 4)):
        groups = [row[start : start + m] for row in weight for start in range(0, weight.shape[1], m)]
        if all(sum(1 for value in group if value != 0) <= n for group in groups):
            found.append(f"{n}:{m}")
    return found


VALUES = st.sampled_from([0.0, 0.0, 0.0, -0.0, -0.0, 1.5, -2.0, 1e-40])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weight=hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 19)), elements=VALUES), data=st.data())
def test_counts_agree_with_plain_loops(weight, data, tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_module, "_CHUNK", data.draw(st.sampled_from([1, 20, 40, 2**24])))
    conv1d = data.draw(st.booleans())
    stored = torch.from_numpy(weight.T.copy() if conv1d else weight)
    name = "transformer.h.0.attn.c_attn.weight" if conv1d else f"{Q}.weight"
    layer = only_layer(folder_with(tmp_path, {name: stored}, model_type="gpt2" if conv1d else "llama"))

    rows, columns = weight.shape
    kept = sum(1 for value in weight.flat if value != 0)
    zeros = [sum(1 for value in row if value == 0) for row in weight]
    assert layer["sparsity"] == pytest.approx(1 - kept / weight.size)
    assert layer["patterns"] == expected_patterns(weight)
    assert layer["zeros_per_row"] == [min(zeros), max(zeros)]
    assert layer["row_uniform"] == (len(set(zeros)) == 1)
    assert layer["input_dim"] == (0 if conv1d else 1)
    assert layer["shape"] == list(stored.shape)
    assert layer["would_take"]["bitmap"] == 4 * kept + rows * -(-columns // 8) + 8 * (rows + 1)


@pytest.mark.parametrize("columns", [341, 4, 3, 2, 1, 17])
def test_a_ragged_tail_can_be_valid(columns, tmp_path):
    layer = only_layer(folder_with(tmp_path, {f"{Q}.weight": pruned(6, columns, "2:4")}))
    assert {"2:4", "4:8"} <= set(layer["patterns"])
    assert layer["row_uniform"]


def test_one_weight_too_many_in_the_tail(tmp_path):
    weight = pruned(6, 343, "2:4")
    weight[5, 340:] = 1.0
    assert "2:4" not in only_layer(folder_with(tmp_path, {f"{Q}.weight": weight}))["patterns"]


def test_2_4_at_16_bit_would_take_nine_sixteenths(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        layer = only_layer(folder_with(tmp_path, {f"{Q}.weight": pruned(64, 128, "2:4", dtype)}))
        assert layer["bytes"] == 64 * 128 * 2
        assert layer["would_take"]["2:4"] == layer["bytes"] * 9 // 16 == layer["would_take"]["smallest"]


def test_2_4_bytes_of_a_ragged_row(tmp_path):
    # 5 columns keep 2 + 1 values, whose indices take 6 bits: one byte a row.
    layer = only_layer(folder_with(tmp_path, {f"{Q}.weight": pruned(3, 5, "2:4", torch.float16)}))
    assert layer["would_take"]["2:4"] == 3 * (3 * 2 + 1)


def test_a_dense_layer_stays_as_it_is(tmp_path):
    result = inspect_folder(folder_with(tmp_path, {f"{Q}.weight": torch.ones(16, 16)}))
    layer, totals = result["layers"][0], result["totals"]
    assert layer["patterns"] == [] and layer["would_take"]["2:4"] is None
    assert layer["would_take"]["smallest"] == layer["bytes"] == totals["would_take_bytes"] == totals["dense_bytes"]


def test_totals(tmp_path):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 8, dtype=torch.float16),
        f"{Q}.weight": pruned(8, 16, "2:4", torch.float16),
        "model.layers.0.mlp.down_proj.weight": torch.ones(8, 8),
        "model.norm.weight": torch.ones(8),
    }
    path = folder_with(tmp_path, tensors)
    totals = inspect_folder(path)["totals"]
    assert totals["parameters"] == 80 + 128 + 64 + 8
    assert totals["dense_bytes"] == 2 * 80 + 2 * 128 + 4 * 64 + 4 * 8
    assert totals["would_take_bytes"] == totals["dense_bytes"] - 2 * 128 * 7 // 16
    assert totals["bytes_on_disk"] == (path / "model.safetensors").stat().st_size
    assert totals["layer_parameters"] == 128 + 64
    assert totals["layer_sparsity"] == pytest.approx(64 / 192)


def test_only_linears_of_decoder_blocks_are_listed(tmp_path):
    listed = [
        "model.layers.0.self_attn.q_proj.weight",
        "h.1.mlp.c_fc.weight",
        "gpt_neox.layers.2.attention.dense.weight",
        "model.layers.3.mlp.experts.0.up_proj.weight",
    ]
    others = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "transformer.wpe.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.some_embedding.weight",
        "model.layers.0.mlp.experts.down_proj_bias",
        "vision_tower.encoder.layers.0.fc1.weight",
    ]
    path = folder_with(tmp_path, {name: torch.ones(4, 4) for name in listed + others})
    assert sorted(layer["name"] for layer in inspect_folder(path)["layers"]) == sorted(listed)


@pytest.mark.parametrize(("model_type", "input_dim"), [("qwen3_moe", 2), ("gpt_oss", 1)])
def test_fused_experts_are_one_entry(tmp_path, model_type, input_dim, monkeypatch):
    monkeypatch.setattr(inspect_module, "_CHUNK", 20)
    experts = torch.stack([pruned(6, 12, "2:4"), pruned(6, 12, "1:4"), pruned(6, 12, "2:4")]).half()
    stored = experts if input_dim == 2 else experts.transpose(1, 2)
    layer = only_layer(
        folder_with(tmp_path, {"model.layers.0.mlp.experts.gate_up_proj": stored}, model_type=model_type)
    )
    assert layer["shape"] == list(stored.shape) and layer["input_dim"] == input_dim
    assert layer["patterns"] == ["2:4", "4:8"]
    assert layer["zeros_per_row"] == [6, 9] and not layer["row_uniform"]
    kept = 2 * 36 + 18
    assert layer["would_take"]["bitmap"] == kept * 2 + 18 * 2 + 3 * 8 * 7
    assert layer["sparsity"] == pytest.approx(1 - kept / 216)
    totals = inspect_module.inspect_folder(tmp_path)["totals"]
    assert totals["would_take_bytes"] == totals["dense_bytes"]  # convert leaves experts dense


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (1, 1)])
def test_empty_and_single_weights(tmp_path, shape):
    layer = only_layer(folder_with(tmp_path, {f"{Q}.weight": torch.zeros(shape)}))
    assert layer["patterns"] == ["2:4", "4:8", "1:4"] and layer["row_uniform"]
    assert layer["sparsity"] == (1.0 if shape == (1, 1) else 0.0)


def test_an_empty_weight_with_endless_experts_takes_no_time(tmp_path):
    path = folder_with(tmp_path, {"model.layers.0.experts.up_proj": torch.zeros(10, 0, 4)})
    header = (path / "model.safetensors").read_bytes()
    wide = header[8:].replace(b"[10,0,4]", b"[%d,0,4]" % 10**12).rstrip()
    (path / "model.safetensors").write_bytes(len(wide).to_bytes(8, "little") + wide)
    assert only_layer(path)["shape"] == [10**12, 0, 4]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.int8, torch.bfloat16])
def test_every_type_is_counted(tmp_path, dtype):
    weight = torch.tensor([[0.0, 1.0, -0.0, 3.0]] * 3).to(dtype)
    if dtype == torch.float64:
        weight[0, 1] = 1e-300  # would vanish in fp32
    layer = only_layer(folder_with(tmp_path, {f"{Q}.weight": weight}))
    assert layer["sparsity"] == 0.5 and layer["patterns"] == ["2:4", "4:8"]
    assert layer["bytes"] == 12 * weight.element_size()


# wandapp.json


def record(pattern: str, *layers: object) -> dict:
    blocks = [{"name": "model.layers.0", "layers": [x if isinstance(x, dict) else {"name": x} for x in layers]}]
    return {"method": "wanda++", "sparsity": pattern, "seed": 7, "versions": {"torch": "2"}, "blocks": blocks}


def test_who_wrote_it(tmp_path):
    tensors = {f"{Q}.weight": pruned(4, 8, "2:4")}
    assert inspect_folder(folder_with(tmp_path / "a", tensors))["written_by"] is None
    result = inspect_folder(folder_with(tmp_path / "b", tensors, record("2:4", Q)))
    assert result["written_by"] == {"method": "wanda++", "pattern": "2:4", "seed": 7, "versions": {"torch": "2"}}
    assert result["problems"] == [] and result["unchecked"] == []
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("claim", "made", "holds"), [
    ("2:4", "2:4", True), ("2:4", "1:4", True), ("2:4", "4:8", False), ("1:4", "2:4", False), ("3:7", "3:7", True),
    ("3:7", "50%", False), ("50%", "50%", True), ("50%", "2:4", True), ("60%", "50%", False), ("odd", "2:4", False),
])  # fmt: skip
def test_a_claim_is_held_against_the_weights(tmp_path, claim, made, holds):
    weight = torch.randn(16, 56, generator=torch.Generator().manual_seed(0))
    weight *= mask_from_scores(weight.abs(), Pattern.parse(made))
    result = inspect_folder(folder_with(tmp_path, {f"{Q}.weight": weight}, record(claim, Q)))
    assert [Q in problem and claim in problem for problem in result["problems"]] == ([] if holds else [True])


def test_zeros_shared_out_over_the_layer_keep_a_ratio(tmp_path):
    weight = torch.ones(4, 10)
    weight[:2] = 0
    assert inspect_folder(folder_with(tmp_path, {f"{Q}.weight": weight}, record("50%", Q)))["problems"] == []


def test_a_layer_recorded_as_dense_is_not_held_to_the_pattern(tmp_path):
    dense = {"name": Q, "sparsity": 0.0, "note": "left dense"}
    result = inspect_folder(folder_with(tmp_path, {f"{Q}.weight": torch.ones(4, 8)}, record("2:4", dense)))
    assert result["problems"] == []


def test_names_that_are_not_stored_are_told(tmp_path):
    result = inspect_folder(folder_with(tmp_path, {f"{Q}.weight": pruned(4, 8, "2:4")}, record("2:4", Q, "elsewhere")))
    assert result["unchecked"] == ["elsewhere"]


def test_weights_that_are_not_finite_are_a_problem(tmp_path):
    weight = pruned(4, 8, "2:4")
    weight[0, 0], weight[1, 1] = torch.nan, torch.inf
    (problem,) = inspect_folder(folder_with(tmp_path, {f"{Q}.weight": weight}))["problems"]
    assert f"{Q}.weight has 2 values" in problem


def test_the_retired_compressed_format_is_named(tmp_path):
    tensors = {f"{Q}.compressed": torch.ones(4, 4), f"{Q}.bitmask": torch.ones(4, 1, dtype=torch.uint8)}
    (problem,) = inspect_folder(folder_with(tmp_path, tensors))["problems"]
    assert "random values" in problem


def test_experts_are_checked_under_the_names_they_are_pruned_by(tmp_path):
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.0.gate_proj.weight": pruned(4, 8, "2:4"),
        f"{experts}.0.up_proj.weight": torch.ones(4, 8),
        f"{experts}.down_proj": torch.stack([pruned(4, 8, "2:4"), torch.ones(4, 8)]),
    }
    names = [f"{experts}.0.gate_up_proj", f"{experts}.0.down_proj", f"{experts}.1.down_proj"]
    result = inspect_folder(folder_with(tmp_path, tensors, record("2:4", *names)))
    assert result["unchecked"] == []
    first, second = sorted(result["problems"])
    assert f"{experts}.0.up_proj" in first and f"{experts}.down_proj" in second


def test_a_claimed_layer_is_looked_at_wherever_it_is(tmp_path):
    result = inspect_folder(folder_with(tmp_path, {"lm_head.weight": torch.ones(4, 8)}, record("2:4", "lm_head")))
    assert [layer["name"] for layer in result["layers"]] == ["lm_head.weight"]
    assert "lm_head" in result["problems"][0]


def test_a_model_type_that_is_no_text(tmp_path):
    assert only_layer(folder_with(tmp_path, {f"{Q}.weight": torch.ones(4, 8)}, model_type=[1]))["input_dim"] == 1


# Files


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


def test_the_formatted_inspection(tmp_path):
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": pruned(8, 16, "2:4", torch.float16) for i in range(12)}
    tensors[f"{Q}.weight"] = torch.ones(8, 16)
    path = folder_with(tmp_path, tensors, record("2:4", Q, "elsewhere"))
    result = inspect_folder(path)
    text = format_inspection(result)
    (row,) = [line for line in text.splitlines() if "model.layers.*.mlp.up_proj" in line]
    assert " ".join(row.split()) == "model.layers.*.mlp.up_proj 12 8×16 F16 50.00 % 2:4 4:8 yes 3.07 kB 1.73 kB"
    assert "wanda++, 2:4, seed 7, torch 2" in text
    assert "would take compressed" in text
    empty = inspect_folder(folder_with(tmp_path, tensors, {}))
    assert "None" not in format_inspection(empty) and "does not say" in format_inspection(empty)
    assert f"- wandapp.json claims 2:4 for {Q}.weight" in text and "elsewhere" in text
    assert "model.layers.11.mlp.up_proj " in format_inspection(result, every_layer=True)
    assert "| model.layers.\\*.mlp.up_proj " in format_inspection(result, markdown=True)
