"""The compressed checkpoint: it comes back exactly, and whatever is wrong with it is one CheckpointError."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pruned_models import pruned_model
from safetensors.torch import load_file, save_file
from tiny_models import token_ids
from transformers import AutoConfig, PreTrainedModel

import wandapp_kernels as wk
from wandapp_kernels.checkpoint.compressed import CHECKSUMS, CompressedFolder, is_compressed
from wandapp_kernels.checkpoint.files import INDEX, WEIGHTS
from wandapp_kernels.errors import CheckpointError, ModelError
from wandapp_kernels.models.load import load_model
from wandapp_kernels.runtime import SparseLinear, desparsify, sparsify
from wandapp_kernels.runtime.folder import load_compressed, save_compressed

UP = "model.layers.0.mlp.up_proj"  # unstructured
DOWN = "model.layers.0.mlp.down_proj"  # 2:4


def swapped(arch: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    model = pruned_model(arch, **config)
    for parameter in model.parameters():  # not the buffers: loading leaves rotary frequencies in fp32
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    sparsify(model)
    return model


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "original"
    save_compressed(swapped(num_hidden_layers=2), None, folder, {"method": "magnitude"})
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def load(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    return load_compressed(folder, AutoConfig.from_pretrained(folder), dtype)


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "config.json") -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], checksums: bool = False) -> None:
    """Change the tensors as somebody would who also makes the file valid again."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if not checksums:
        (folder / CHECKSUMS).unlink(missing_ok=True)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "gemma3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = swapped(arch, dtype)
    save_compressed(model, None, tmp_path / "one", {})
    loaded = load(tmp_path / "one")
    with torch.no_grad():
        assert torch.equal(loaded(token_ids(2, 7)).logits, model(token_ids(2, 7)).logits)
    save_compressed(loaded, None, tmp_path / "two", {})
    for file in (WEIGHTS, CHECKSUMS, "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert not loaded.training and loaded.dtype == dtype
    state, known = desparsified(loaded), desparsified(model)
    assert state.keys() == known.keys()
    for name, tensor in known.items():
        assert torch.equal(state[name], tensor), name
    tied = getattr(model.config, "tie_word_embeddings", False)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is bool(tied)


def test_only_what_the_config_ties_is_stored_once(tmp_path: Path) -> None:
    model = swapped(num_hidden_layers=1)
    model.lm_head.weight = model.model.embed_tokens.weight
    save_compressed(model, None, tmp_path / "untied", {})
    loaded = load(tmp_path / "untied")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(token_ids(2, 7)).logits, model(token_ids(2, 7)).logits)
    model.config.tie_word_embeddings = True
    save_compressed(model, None, tmp_path / "tied", {})
    loaded = load(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert load_file(tmp_path / "untied" / WEIGHTS).keys() - load_file(tmp_path / "tied" / WEIGHTS).keys() == {
        "lm_head.weight"
    }


def test_how_it_generates_comes_back(tmp_path: Path) -> None:
    model = swapped(num_hidden_layers=1)
    model.generation_config.eos_token_id = [2, 5]
    save_compressed(model, None, tmp_path / "model", {})
    assert load(tmp_path / "model").generation_config.eos_token_id == [2, 5]
    for content in ("{", "[]", '{"eos_token_id": [2], "do_sample": {}, "max_new_tokens": -3}'):
        (tmp_path / "model" / "generation_config.json").write_text(content)
        refused(tmp_path / "model", "generation_config.json")
    (tmp_path / "model" / "generation_config.json").unlink()
    assert load(tmp_path / "model").generation_config.eos_token_id == 2


def desparsified(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    desparsify(model)
    return model.state_dict()


def test_the_folder(original: Path) -> None:
    config = json.loads((original / "config.json").read_text())
    assert is_compressed(config)
    settings_ = config["quantization_config"]
    assert settings_.keys() == {"quant_method", "format_version", "layers"} and len(settings_["layers"]) == 14
    assert settings_["layers"][UP] == {"pattern": "unstructured", "shape": [48, 32], "dtype": "float32"}
    assert settings_["layers"][DOWN]["pattern"] == "2:4"
    tensors = load_file(original / WEIGHTS)
    assert {n for n in tensors if n.startswith(UP)} == {
        f"{UP}.{own}" for own in ("weight_values", "weight_bitmap", "weight_row_offsets")
    }
    assert {n for n in tensors if n.startswith(DOWN)} == {f"{DOWN}.weight_values", f"{DOWN}.weight_indices"}
    assert tensors[f"{DOWN}.weight_values"].shape == (32, 24) and tensors[f"{DOWN}.weight_indices"].shape == (32, 6)
    assert json.loads((original / "wandapp.json").read_text()) == {"method": "magnitude"}
    assert json.loads((original / CHECKSUMS).read_text()).keys() == tensors.keys()
    assert "sparsity_config" not in config


def test_load_model_and_save_know_the_format(original: Path, tmp_path: Path) -> None:
    loaded = load_model(str(original))
    assert sum(isinstance(module, SparseLinear) for module in loaded.model.modules()) == 14
    assert loaded.tokenizer is None and loaded.folder == original
    assert loaded.record == {"method": "magnitude"}
    wk.save(loaded.model, None, tmp_path / "again", loaded.record)
    assert (tmp_path / "again" / "wandapp.json").read_bytes() == (original / "wandapp.json").read_bytes()
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (original / WEIGHTS).read_bytes()
    half = load_model(str(original), dtype="bfloat16").model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.get_submodule(UP).weight, loaded.model.get_submodule(UP).weight.bfloat16())
    wk.desparsify(loaded.model)
    wk.save(loaded.model, None, tmp_path / "dense")
    assert not is_compressed(json.loads((tmp_path / "dense" / "config.json").read_text()))
    assert not (tmp_path / "dense" / "wandapp.json").exists()
    with pytest.raises(ModelError, match="no layer"):
        save_compressed(loaded.model, None, tmp_path / "none", {})
    assert not (tmp_path / "none").exists()


def test_shards(tmp_path: Path) -> None:
    model = swapped()
    save_compressed(model, None, tmp_path / "out", {}, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2 and (tmp_path / "out" / INDEX).exists()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(token_ids(1, 5)).logits, model(token_ids(1, 5)).logits)

    def send(where: str) -> Callable[[dict[str, Any]], None]:
        return lambda index: index["weight_map"].update({next(iter(index["weight_map"])): where})

    for where in ("../x.safetensors", "/etc/passwd", "missing.safetensors", "", 7):
        copied = shutil.copytree(tmp_path / "out", tmp_path / "copy")
        edit(copied, send(where), INDEX)
        refused(copied, "not a plain file name|missing")
        shutil.rmtree(copied)
    copied = Path(shutil.copytree(tmp_path / "out", tmp_path / "copy"))
    edit(copied, lambda index: index["weight_map"].popitem(), INDEX)
    refused(copied, "unlisted|missing")
    shutil.rmtree(copied)
    copied = Path(shutil.copytree(tmp_path / "out", tmp_path / "copy"))
    first, second = sorted(copied.glob("*.safetensors"))[:2]
    both = {**load_file(first), **load_file(second)}
    save_file(both, second, {"format": "pt"})
    edit(copied, lambda index: index["weight_map"].update({name: second.name for name in load_file(second)}), INDEX)
    extra = next(name for name in load_file(first))
    edit(copied, lambda index: index["weight_map"].update({extra: first.name}), INDEX)
    refused(copied, "unlisted|not in it|both")


def test_wrong_config(folder: Path) -> None:
    keep = (folder / "config.json").read_text()

    def wrong(match: str, change: Callable[[dict[str, Any]], Any]) -> None:
        edit(folder, lambda config: change(config["quantization_config"]))
        refused(folder, match)
        (folder / "config.json").write_text(keep)

    wrong("format version 2", lambda q: q.update(format_version=2))
    wrong("unknown key 'more'", lambda q: q.update(more=1))
    wrong("no quantization_config", lambda q: q.update(quant_method="bitsandbytes"))
    wrong("lists no layers", lambda q: q.update(layers={}))
    wrong("lists no layers", lambda q: q.update(layers=[UP]))
    wrong(f"{UP}", lambda q: q["layers"].update({UP: "2:4"}))
    wrong(f"shape and dtype of {UP}", lambda q: q["layers"][UP].pop("shape"))
    for shape in ([48], [48, -32], [48, 0], [48.0, 32], [True, 32], "48x32", [48, 31], [32, 48], [49, 32]):
        wrong(f"{UP}", lambda q, shape=shape: q["layers"][UP].update(shape=shape))
    for dtype in ("float8", 7, "float16", None):
        wrong(f"{UP}", lambda q, dtype=dtype: q["layers"][UP].update(dtype=dtype))
    for pattern in ("2:4", "50%", "02:4", "4:2", "1:99", "", None, 0.5):
        wrong(f"{UP}", lambda q, pattern=pattern: q["layers"][UP].update(pattern=pattern))
    for pattern in ("1:4", "4:8", "2:5", "unstructured"):
        wrong(f"{DOWN}", lambda q, pattern=pattern: q["layers"][DOWN].update(pattern=pattern))
    wrong(f"{DOWN}", lambda q: q["layers"].pop(DOWN))
    wrong("nowhere", lambda q: q["layers"].update(nowhere=q["layers"][UP]))
    wrong("model.norm", lambda q: q["layers"].update({"model.norm": q["layers"][UP]}))
    text = keep.replace('"quant_method"', '"quant_method": "wandapp", "quant_method"')
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="twice"):
        CompressedFolder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError):
        CompressedFolder(folder)
    with pytest.raises(CheckpointError, match="not a folder"):
        CompressedFolder(folder / "config.json")


def test_wrong_tensors(original: Path, tmp_path: Path) -> None:
    def wrong(match: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        copied = Path(shutil.copytree(original, tmp_path / "copy"))
        retensor(copied, change)
        refused(copied, match)
        shutil.rmtree(copied)

    def scale(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
        return lambda tensors: tensors.update({name: to(tensors[name]).contiguous()})

    for layer in (UP, DOWN):
        values = f"{layer}.weight_values"
        wrong(f"{values} .* is missing", lambda tensors, name=values: tensors.pop(name))
        wrong(values, scale(values, lambda t: t.half()))
        wrong(layer, scale(values, lambda t: t[:-1]))
        wrong(f"{layer}.*NaN", scale(values, lambda t: t * torch.nan))
        wrong(f"{layer}.weight ", lambda tensors, layer=layer: tensors.update({f"{layer}.weight": torch.zeros(48, 32)}))
    wrong("weight_indices", scale(f"{DOWN}.weight_indices", lambda t: t[:, :-1]))
    wrong("weight_indices", scale(f"{DOWN}.weight_indices", lambda t: t.to(torch.int8)))
    wrong("ascend", scale(f"{DOWN}.weight_indices", lambda t: t * 0))
    wrong("weight_bitmap", scale(f"{UP}.weight_bitmap", lambda t: t.long()))
    wrong("bitmap", scale(f"{UP}.weight_bitmap", lambda t: t ^ 1))
    wrong("row_offsets", scale(f"{UP}.weight_row_offsets", lambda t: t + 1))
    wrong("row_offsets", scale(f"{UP}.weight_row_offsets", lambda t: t.flip(0)))
    wrong("weight_row_offsets", scale(f"{UP}.weight_row_offsets", lambda t: t.int()))
    wrong("weight_other", lambda tensors: tensors.update({f"{UP}.weight_other": torch.zeros(1)}))
    wrong("has no place", lambda tensors: tensors.update({"model.more": torch.zeros(1)}))
    wrong("model.norm.weight .* is missing", lambda tensors: tensors.pop("model.norm.weight"))
    wrong("model.norm.weight", scale("model.norm.weight", lambda t: t[:-1]))
    wrong("model.norm.weight", scale("model.norm.weight", lambda t: t.long()))
    wrong("model.norm.weight.*NaN", scale("model.norm.weight", lambda t: t * torch.inf))
    wrong("complex|cannot be used|not used", scale("model.norm.weight", lambda t: t.to(torch.float8_e5m2)))


def test_wrong_checksums(folder: Path) -> None:
    retensor(folder, lambda tensors: tensors["model.norm.weight"].add_(1), checksums=True)
    refused(folder, "model.norm.weight .* SHA-256")
    retensor(folder, lambda tensors: None)  # without checksums the content alone is checked
    load(folder)
    (folder / CHECKSUMS).write_text('{"a": 1}')
    refused(folder, CHECKSUMS)


@pytest.mark.parametrize("name", [f"{DOWN}.weight_values", "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [1e30, -1e30])
def test_values_that_overflow_the_type_asked_for(folder: Path, name: str, value: float) -> None:
    retensor(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    load(folder)
    load(folder, torch.bfloat16)
    with pytest.raises(CheckpointError, match=rf"{name.removesuffix('.weight_values')} of .* as torch.float16"):
        load(folder, torch.float16)


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "leaves the folder")


@given(
    seed=st.integers(0, 2**32), edits=st.integers(1, 4), cut=st.booleans(), target=st.sampled_from(["header", "any"])
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_never_silent(
    original: Path, tmp_path: Path, seed: int, edits: int, cut: bool, target: str
) -> None:
    """Bytes are changed, or the end is cut off: the model is refused, or (in unused header text) still the same."""
    chance = random.Random(seed)
    copied = tmp_path / "damaged"
    shutil.copytree(original, copied, dirs_exist_ok=True)
    raw = bytearray((original / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(edits):
        raw[chance.randrange(header if target == "header" else len(raw))] ^= chance.randrange(1, 256)
    if cut:
        del raw[chance.randrange(len(raw)) :]
    (copied / WEIGHTS).write_bytes(raw)
    try:
        checkpoint = CompressedFolder(copied)
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.other}
        weights = {name: checkpoint.weight(name) for name in checkpoint.layers}
    except CheckpointError as error:
        assert "\n" not in str(error)
        return
    known = CompressedFolder(original)
    assert all(torch.equal(tensor, known.tensor(name)) for name, tensor in tensors.items())
    assert all(torch.equal(w.decompress(), known.weight(name).decompress()) for name, w in weights.items())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats(allow_nan=False) | st.sampled_from(["2:4", "", UP]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["shape", "x", UP]), inner, max_size=2),
    max_leaves=4,
)


@given(path=st.sampled_from([(), ("layers",), ("layers", UP), ("layers", UP, "shape")]), value=JSON, key=st.text())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_in_the_config_is_refused_or_right(
    original: Path, tmp_path: Path, path: tuple[str, ...], value: Any, key: str
) -> None:
    copied = tmp_path / "odd"
    shutil.copytree(original, copied, dirs_exist_ok=True)
    config = json.loads((original / "config.json").read_text())
    place: Any = config["quantization_config"]
    for step in path:
        place = place[step]
    if isinstance(place, list):
        place[len(key) % 2] = value
    else:
        place[key if len(key) % 2 else sorted(place)[len(key) % len(place)]] = value
    (copied / "config.json").write_text(json.dumps(config))
    try:
        checkpoint = CompressedFolder(copied)
    except CheckpointError:
        return
    assert checkpoint.layers == CompressedFolder(original).layers
