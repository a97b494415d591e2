"""transformers reads a compressed folder itself: the same model as `wandapp_kernels.load`, and as strictly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned_models import pruned_model
from safetensors.torch import load_file, save_file
from tiny_models import token_ids
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import wandapp_kernels as wk
from wandapp_kernels.checkpoint.compressed import CHECKSUMS, METHOD
from wandapp_kernels.checkpoint.files import WEIGHTS
from wandapp_kernels.errors import CheckpointError, ModelError, UsageError
from wandapp_kernels.integrations.hf import WandappConfig, WandappQuantizer, register
from wandapp_kernels.runtime.swap import sparse_layers

DOWN = "model.layers.0.mlp.down_proj"  # 2:4
UP = "model.layers.0.mlp.up_proj"  # unstructured


def saved(folder: Path, arch: str = "llama", **config: Any) -> Path:
    model = pruned_model(arch, **config)
    wk.sparsify(model)
    wk.save(model, None, folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("hf") / "model", num_hidden_layers=1)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def load(folder: Path, **how: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **how)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(token_ids(2, 9)).logits


def same(one: PreTrainedModel, two: PreTrainedModel) -> None:
    assert torch.equal(logits(one), logits(two))
    states = one.state_dict(), two.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]) and tensor.dtype == states[1][name].dtype, name
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (one, two)]
    assert kinds[0] == kinds[1]
    assert one.generation_config.to_diff_dict() == two.generation_config.to_diff_dict()
    assert {n: layer.layout for n, layer in sparse_layers(one)} == {n: layer.layout for n, layer in sparse_layers(two)}


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "mixtral", "qwen3_moe"])
def test_the_model_is_the_one_that_load_gives(arch: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path / "model", arch)
    model = load(folder)
    assert any(sparse_layers(model)) and not model.training
    same(model, wk.load(str(folder)).model)
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert "UNEXPECTED" not in caplog.text and "MISSING" not in caplog.text


@pytest.mark.parametrize("how", [{"dtype": torch.bfloat16}, {"dtype": "float16"}, {"device_map": "cpu"}])
def test_types_and_devices(original: Path, how: dict[str, Any]) -> None:
    if "device_map" in how:
        pytest.importorskip("accelerate")
    model = load(original, **how)
    same(model, wk.load(str(original), dtype=how.get("dtype", "auto")).model)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {model.dtype}


def test_it_generates_is_saved_and_comes_back(original: Path, tmp_path: Path) -> None:
    model = load(original)
    ids = token_ids(1, 5)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = wk.load(str(original)).model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    model.save_pretrained(tmp_path / "again")
    same(load(tmp_path / "again"), model)
    same(wk.load(str(tmp_path / "again")).model, model)
    wk.save(model, None, tmp_path / "saved")
    for file in (WEIGHTS, CHECKSUMS, "config.json"):
        assert (tmp_path / "saved" / file).read_bytes() == (original / file).read_bytes(), file


def test_dense_again(original: Path, tmp_path: Path) -> None:
    model, other = load(original), load(original)
    expected = logits(model)
    wk.desparsify(model)
    assert not hasattr(model, "hf_quantizer")
    wk.save(model, None, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path / "dense")), expected, rtol=1e-4, atol=1e-4)
    assert other.is_quantized
    other.dequantize()
    assert not any(sparse_layers(other)) and not other.is_quantized
    assert not hasattr(other.config, "quantization_config")
    assert torch.equal(logits(other), logits(model))
    model.half()


def edit(change: Callable[[dict[str, torch.Tensor]], Any], checksums: bool = False) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        if not checksums:
            (folder / CHECKSUMS).unlink()

    return damage


def config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return damage


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a changed value": (f"{DOWN}.weight_values.*SHA-256", edit(lambda t: t[f"{DOWN}.weight_values"].mul_(2), True)),
    "a changed dense value": ("model.norm.weight.*SHA-256", edit(lambda t: t["model.norm.weight"].add_(1), True)),
    "indices": (f"{DOWN}.weight ", edit(lambda t: t[f"{DOWN}.weight_indices"].fill_(0))),
    "popcount": (f"{UP}.weight ", edit(lambda t: t[f"{UP}.weight_bitmap"].fill_(255))),
    "NaN": (f"{UP}.weight ", edit(lambda t: t[f"{UP}.weight_values"].fill_(torch.nan))),
    "NaN elsewhere": ("model.norm.weight.*NaN", edit(lambda t: t["model.norm.weight"].fill_(torch.nan))),
    "a compressed tensor missing": (f"{UP}.weight_bitmap.*missing", edit(lambda t: t.pop(f"{UP}.weight_bitmap"))),
    "a dense tensor missing": ("model.norm.weight.*missing", edit(lambda t: t.pop("model.norm.weight"))),
    "one more": ("extra.*no place", edit(lambda t: t.update(extra=torch.zeros(2)))),
    "a dense weight too": (f"{UP}.weight ", edit(lambda t: t.update({f"{UP}.weight": torch.zeros(48, 32)}))),
    "a shape": ("model.norm.weight.*31", edit(lambda t: t.update({"model.norm.weight": torch.zeros(31)}))),
    "a compressed shape": (
        f"{DOWN}.weight_values",
        edit(lambda t: t.update({f"{DOWN}.weight_values": torch.zeros(32, 23)})),
    ),
    "a layer that is none": (
        "extra.*no linear layer",
        lambda folder: (
            config(lambda c: c["quantization_config"]["layers"].update(extra=c["quantization_config"]["layers"][DOWN]))(
                folder
            ),
            edit(lambda t: t.update({n.replace(DOWN, "extra"): v.clone() for n, v in t.items() if n.startswith(DOWN)}))(
                folder
            ),
        ),
    ),
    "another format": ("format version 2", config(lambda c: c["quantization_config"].update(format_version=2))),
    "an unknown key": ("unknown key", config(lambda c: c["quantization_config"].update(other=1))),
    "no layers": ("no layers", config(lambda c: c["quantization_config"].update(layers={}))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_as_load_refuses_it(folder: Path, damage: str) -> None:
    words, act = DAMAGES[damage]
    act(folder)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError) as known:
        wk.load(str(folder))
    assert str(caught.value) == str(known.value)


def test_a_value_that_overflows_the_type_asked_for_is_refused(folder: Path) -> None:
    edit(lambda tensors: tensors["model.embed_tokens.weight"][0].fill_(1e30))(folder)
    load(folder)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight of .* as torch\.float16"):
        load(folder, dtype=torch.float16)


def test_what_is_not_supported_is_one_sentence(original: Path, tmp_path: Path) -> None:
    pruned_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    refusals: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (UsageError, "wandapp_kernels.sparsify", lambda: load(tmp_path / "dense", quantization_config=WandappConfig())),
        (ModelError, "AutoModelForCausalLM", lambda: AutoModel.from_pretrained(original)),
        (UsageError, "int8", lambda: load(original, dtype=torch.int8)),
        (UsageError, "one device", lambda: load(original, device_map={"model": "cpu", "lm_head": "disk"})),
    ]
    for kind, words, act in refusals:
        with pytest.raises(kind, match=words) as caught:
            act()
        assert "\n" not in str(caught.value)


def test_training_needs_an_adapter(original: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="adapters"):
        Trainer(load(original), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_lora_trains_on_top(original: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(original)
    expected = logits(model)
    frozen = {name: layer.weight for name, layer in sparse_layers(model)}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    assert torch.equal(logits(wrapped), expected)  # adapters start at zero
    ids = token_ids(4, 8)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(15):
        loss = wrapped(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    unwrapped = wrapped.unload()
    assert torch.equal(logits(unwrapped), expected)
    assert all(torch.equal(layer.weight, frozen[name]) for name, layer in sparse_layers(unwrapped))


def test_registering_twice_changes_nothing() -> None:
    register()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is WandappQuantizer


def test_importing_this_package_is_enough_and_imports_no_other(original: Path) -> None:
    program = (
        "import sys, wandapp_kernels\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(original)], capture_output=True, text=True, check=False)
    assert done.stdout == "SparseLinear\n", done.stderr
