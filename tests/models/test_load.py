"""Loading: what is accepted comes back exactly, what is refused is refused with one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import SMALL, edit_config, edit_weights, llama, refused, same_weights, shard
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from wandapp_kernels.errors import ModelError, UsageError
from wandapp_kernels.models.load import load_model


def test_a_folder_comes_back_exactly(original: Path) -> None:
    loaded = load_model(str(original))
    assert (loaded.name, loaded.folder) == (str(original), original)
    assert loaded.model.dtype == torch.bfloat16 and loaded.model.device.type == "cpu" and not loaded.model.training
    assert same_weights(loaded.model, llama().to(torch.bfloat16))
    assert loaded.tokenizer is not None and loaded.tokenizer("two one zero").input_ids == [2, 1, 0]


def test_a_path_is_a_folder_whatever_its_name(original: Path, monkeypatch: pytest.MonkeyPatch, offline: Path) -> None:
    monkeypatch.chdir(original.parent)
    for path in (original, Path("original"), Path("other/../original")):
        loaded = load_model(path)
        assert loaded.folder == original and same_weights(loaded.model, llama().to(torch.bfloat16))
    for name in ("glass-0.9m", "nobody/nothing", "missing"):
        with pytest.raises(ModelError, match=rf"there is no folder .*{name}"):
            load_model(Path(name))


def test_the_record_is_that_of_the_folder(folder: Path) -> None:
    loaded = load_model(folder)
    assert loaded.record == {}
    (folder / "wandapp.json").write_text('{"method": "wanda"}')
    assert loaded.record == {"method": "wanda"}
    (folder / "wandapp.json").write_text("[")
    with pytest.warns(UserWarning, match=r"is left out: .*wandapp.json cannot be read"):
        assert loaded.record == {}


def test_loading_keeps_the_random_stream_and_is_silent(original: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.random.get_rng_state()
    load_model(str(original))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "float16", torch.float64])
def test_dtype(original: Path, dtype: str | torch.dtype) -> None:
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = load_model(str(original), dtype=dtype).model
    assert {weight.dtype for weight in model.parameters()} == {expected}
    assert same_weights(model, llama().to(torch.bfloat16).to(expected))


@pytest.mark.parametrize("dtype", ["int8", torch.int8, torch.float8_e4m3fn, "half", ""])
def test_dtype_refused(original: Path, dtype: str | torch.dtype) -> None:
    refused(original, "choose auto, float16, bfloat16, float32, float64", UsageError, dtype=dtype)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(str(tmp_path)).model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same_weights(loaded, model)


def test_decoders_of_encoder_families_and_neox(tmp_path: Path) -> None:
    # Both configurations have a field is_decoder, which GPT-NeoX, a decoder, leaves at False.
    GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)).save_pretrained(tmp_path / "neox")
    assert isinstance(load_model(str(tmp_path / "neox")).model, GPTNeoXForCausalLM)
    BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)).save_pretrained(tmp_path / "bert")
    assert isinstance(load_model(str(tmp_path / "bert")).model, BertLMHeadModel)


def test_encoders_are_refused(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "only decoder-only causal language models can be pruned")
    shape = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**shape, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    refused(tmp_path / "vit", r"model type vit\) is not a causal language model; only decoder-only")
    t5 = T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    refused(tmp_path / "t5", r"model type t5\) is an encoder-decoder; only decoder-only")


def test_missing_weights_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"lacks 1 weight \(model\.layers\.1\.mlp\.up_proj\.weight\)")
    edit_weights(folder, lambda weights: [weights.pop(key) for key in list(weights) if "layers.0.mlp" in key])
    refused(folder, r"lacks 4 weights \(model\.layers\.0\.mlp\.down_proj\.weight, .*, \.\.\.\)")


def test_missing_untied_head_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    refused(folder, r"lacks 1 weight \(lm_head\.weight\)")


def test_other_shapes_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(17)}))
    refused(folder, r"model\.norm\.weight of .* has shape \(17,\) where its config\.json asks for \(16,\)")


def test_unused_weights_are_reported(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"does not use 9 weights \(model\.layers\.1\."):
        assert load_model(str(folder)).model.config.num_hidden_layers == 1


@pytest.mark.parametrize("keep", [-100, 4, 0])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "cannot be loaded .*check the folder's files")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused(folder: Path, name: str) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()
    refused(folder, f"{name}, a pickle .* convert it")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no model\.safetensors or model\.safetensors\.index\.json")


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantised \(gptq\); dequantise"),
        ({"hidden_size": "wide"}, r"config\.json of .* cannot be used"),
        ({"num_attention_heads": 0}, r"config\.json of .* cannot be used"),
        ({"model_type": "a-type-nobody-has"}, r"config\.json of .* cannot be used"),
    ],
)
def test_configurations_refused(folder: Path, values: dict[str, Any], pattern: str) -> None:
    edit_config(folder, **values)
    refused(folder, pattern)


def test_configured_weights_file_outside_is_refused(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "other.safetensors")
    edit_config(folder, transformers_weights="../other.safetensors")
    refused(folder, "must reference a file inside")
    (folder.parent / "other.safetensors").rename(folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")
    assert same_weights(load_model(str(folder)).model, llama().to(torch.bfloat16))
    edit_config(folder, transformers_weights="absent.safetensors")
    refused(folder, r"has no absent\.safetensors")


def test_quantised_text_part_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = LlamaConfig(**SMALL, quantization_config={"quant_method": "fp8"})
    monkeypatch.setattr(LlamaConfig, "get_text_config", lambda self, **options: part)
    refused(folder, r"already quantised \(fp8\)")


def test_code_of_a_checkpoint_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\n")
    remote = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C", "AutoTokenizer": ["evil.C", None]}
    edit_config(folder, auto_map=remote)
    assert isinstance(load_model(str(folder)).model, LlamaForCausalLM)
    edit_config(folder, model_type="evil")
    refused(folder, "contains custom code")
    assert not (folder / "ran").exists()


def test_adapters_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "organisation/base"}))
    refused(folder, "holds an adapter; merge it")
    (folder / "config.json").unlink()
    refused(folder, "holds an adapter; merge it")


def test_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json of .* cannot be used")


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(folder: Path) -> None:
    assert len(set(shard(folder)["weight_map"].values())) > 1
    assert same_weights(load_model(str(folder)).model, llama().to(torch.bfloat16))


@pytest.mark.parametrize("how", ["absolute", "parent", "through a folder", "link", "linked folder"])
def test_index_that_leaves_the_folder(folder: Path, how: str) -> None:
    index = shard(folder)
    key, file = next(iter(index["weight_map"].items()))
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.move(folder / file, outside / file)
    target = {
        "absolute": str(outside / file),
        "parent": f"../outside/{file}",
        "through a folder": f"{folder.name}/../../outside/{file}",
        "link": file,
        "linked folder": f"inner/{file}",
    }[how]
    if how == "link":
        (folder / file).symlink_to(outside / file)
    elif how == "linked folder":
        (folder / "inner").symlink_to(outside)
    index["weight_map"] = {key: target if value == file else value for key, value in index["weight_map"].items()}
    assert index["weight_map"][key] == target
    write_index(folder, index)
    refused(folder, "points outside the folder .*refused")


def test_index_with_a_missing_shard(folder: Path) -> None:
    file = next(iter(shard(folder)["weight_map"].values()))
    (folder / file).unlink()
    refused(folder, f"names {file}, which is missing")


@pytest.mark.parametrize(
    ("index", "pattern"),
    [
        ([], "not a readable index"),
        ({}, "not a readable index"),
        ({"weight_map": []}, "not a readable index"),
        ({"weight_map": {"a": ["b"]}}, "not a readable index"),
        ({"weight_map": {}}, "not nothing"),
        ({"weight_map": {"a": 3}}, "must name safetensors files only, not 3"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, r"must name safetensors files only, not pytorch_model\.bin"),
    ],
)
def test_odd_indices(folder: Path, index: object, pattern: str) -> None:
    (folder / "model.safetensors").unlink()
    write_index(folder, index)
    refused(folder, pattern)


def test_names_that_are_no_model(tmp_path: Path, original: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no config\.json, .* bundled model \(smollm2-135m, glass-0\.9m")
    refused(tmp_path / "absent", "there is no folder .*; give a local folder")
    refused("./absent", "there is no folder")
    refused("organisation/model/more", "there is no folder")
    refused("./" + "x" * 300, "there is no folder")
    refused(original / "config.json", "is a file, not a model folder")
    refused(" ", "name is empty", UsageError)
    refused(original, "only meaningful for a model of the hub", UsageError, revision="main")
