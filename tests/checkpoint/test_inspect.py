from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from inspected_folders import Q, folder_with, only_layer, pruned

from wandapp_kernels.checkpoint import inspect as inspect_module
from wandapp_kernels.checkpoint.inspect import inspect_folder
from wandapp_kernels.report.tables import format_inspection
from wandapp_kernels.sparsity import Pattern, mask_from_scores

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
    assert result["written_by"] == {
        **{"method": "wanda++", "pattern": "2:4", "seed": 7, "versions": {"torch": "2"}},
        "finetuned": 0,
    }
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
