from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_model
from wandapp_kernels import dispatch
from wandapp_kernels.cli import main
from wandapp_kernels.cli.tune import LayerKind, layer_kinds
from wandapp_kernels.errors import ModelError
from wandapp_kernels.runtime.folder import save_compressed
from wandapp_kernels.runtime.swap import desparsify, sparsify
from wandapp_kernels.sparsity import Pattern, mask_from_scores
from wandapp_kernels.tuning import measure

# tiny llama: 3 blocks, hidden 32, intermediate 48, 2 of 4 heads for keys and values
SHAPES = {(32, 32): 6, (16, 32): 6, (48, 32): 6, (32, 48): 3}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "last_level_cache", lambda device: 4096)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    dispatch.forget()
    yield
    dispatch.forget()


def pruned(sparsity: str | None) -> Any:
    model = tiny_model("llama")
    if sparsity is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("proj.weight"):
                    parameter.mul_(mask_from_scores(parameter.abs(), Pattern.parse(sparsity)))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pruned("2:4").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def kinds_of(pattern: str, density: int, dtype: str = "float32") -> dict[LayerKind, int]:
    return {LayerKind(*shape, pattern, density, dtype): count for shape, count in SHAPES.items()}


def test_layers_are_counted_once_per_kind(tmp_path: Path, folder: Path) -> None:
    assert layer_kinds(folder) == kinds_of("2:4", 50)
    assert layer_kinds(folder, dtype="bfloat16") == kinds_of("2:4", 50, "bfloat16")
    pruned("60%").save_pretrained(tmp_path / "unstructured")
    assert layer_kinds(tmp_path / "unstructured") == kinds_of("unstructured", 40)


def test_dense_models_are_taken_for_pruned(tmp_path: Path) -> None:
    pruned(None).save_pretrained(tmp_path / "dense")
    assert layer_kinds(tmp_path / "dense") == kinds_of("2:4", 50)
    assert layer_kinds(tmp_path / "dense", "70%") == kinds_of("unstructured", 30)


def test_a_dense_layer_of_a_sparse_model_stays_dense(tmp_path: Path) -> None:
    model = pruned("2:4")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1.0)
    model.save_pretrained(tmp_path / "mixed")
    wanted = kinds_of("2:4", 50) | {
        LayerKind(32, 48, "2:4", 50, "float32"): 2,
        LayerKind(32, 48, "dense", 100, "float32"): 1,
    }
    assert layer_kinds(tmp_path / "mixed") == wanted
    assert main(["convert", str(tmp_path / "mixed"), str(tmp_path / "small")]) == 0
    assert layer_kinds(tmp_path / "small") == wanted
    taken = kinds_of("2:4", 50) | {
        LayerKind(32, 48, "2:4", 50, "float32"): 2,
        LayerKind(32, 48, "unstructured", 40, "float32"): 1,
    }
    assert layer_kinds(tmp_path / "mixed", "60%") == taken, "only dense layers are assumed to be pruned"


def test_a_sparsity_for_layers_that_are_all_sparse_is_refused(tmp_path: Path, folder: Path, capsys) -> None:
    assert main(["convert", str(folder), str(tmp_path / "small")]) == 0
    capsys.readouterr()
    for used in (folder, tmp_path / "small"):
        assert main(["tune", str(used), "--sparsity", "0.7", "--no-tune"]) == 2
        assert f"sparsity '0.7' is for dense layers, but all of {used} are sparse" in capsys.readouterr().err


def test_transposed_layers_are_turned(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    shapes = {(kind.out_features, kind.in_features): count for kind, count in layer_kinds(tmp_path / "gpt2").items()}
    assert shapes == {(96, 32): 3, (32, 32): 3, (48, 32): 3, (32, 48): 3}


def test_types_have_short_names(folder: Path, capsys) -> None:
    for name, layers in (("bf16", "bfloat16"), ("float16", "float16"), ("auto", "float32")):
        assert main(["tune", str(folder), "--no-tune", "--m", "1", "--dtype", name]) == 0
        assert f" {layers} " in capsys.readouterr().out


@pytest.mark.parametrize(("sparsity", "form", "density"), [("2:4", "2:4", 50), ("60%", "unstructured", 40)])
def test_compressed_folders_are_read_too(tmp_path: Path, sparsity: str, form: str, density: int) -> None:
    model = pruned(sparsity)
    sparsify(model)
    save_compressed(model, None, tmp_path / "compressed", {})
    assert layer_kinds(tmp_path / "compressed") == kinds_of(form, density)
    desparsify(model)
    sparsify(model, "unstructured")  # also where another form would be smaller
    save_compressed(model, None, tmp_path / "bitmap", {})
    assert layer_kinds(tmp_path / "bitmap") == kinds_of("unstructured", density)


def test_a_folder_without_linears_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    from safetensors.torch import save_file

    save_file({"norm.weight": torch.zeros(4)}, tmp_path / "odd" / "model.safetensors")
    with pytest.raises(ModelError, match="no linear layers"):
        layer_kinds(tmp_path / "odd")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_measures_explains_and_leaves_the_model_alone(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    report = tmp_path / "tune.json"
    words = ["tune", str(folder), "--explain", "--m", "3,1", "--seconds", "0", "--json", str(report), "--quiet"]
    words += ["--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert contents(folder) == before
    assert "32x48 2:4 float32, 3 layers, " in printed.out and "decompress-nm" in printed.out
    assert printed.out.count("reference-nm: the reference is for checking") == 1  # not once for every shape
    assert "\nleft out for every layer:\n" in printed.out
    assert "m 1" in printed.out and "m 4" in printed.out and not printed.err
    found = json.loads(report.read_text())
    assert found["threads"] == torch.get_num_threads() and found["versions"]["torch"] == torch.__version__
    assert [(row["n"], row["k"], row["m"]) for row in found["problems"] if row["n"] == 48] == [(48, 32, 1), (48, 32, 4)]
    for row in found["problems"]:
        assert row["measured_m"] == row["m"] and "dense" in row["times_us"]
    for row in found["problems"]:
        if row["m"] == 1:
            assert row["times_us"][row["chosen"]] == min(row["times_us"].values()) <= row["times_us"]["dense"]
    # Once more: nothing is measured, the same is said.
    assert main(["tune", str(folder), "--no-tune", "--m", "1"]) == 0
    again = capsys.readouterr().out
    assert "× dense" in again and again.count("32x32") == 1
    assert main(["tune", str(folder), "--no-tune", "--m", "4,8"]) == 0
    assert "8 (as m 4)" in (other := capsys.readouterr().out) and "4 (as" not in other


def test_no_tune_measures_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "measure", lambda *_: pytest.fail("something was measured"))
    assert main(["tune", str(folder), "--no-tune", "--explain", "--m", "1"]) == 0
    assert "- *" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["no/such/folder/here"], 1, "there is no folder"),
        (["FOLDER", "--m", "1,x"], 2, "not a list of token counts"),
        (["FOLDER", "--m", "0"], 2, "not a list of token counts"),
        (["FOLDER", "--sparsity", "1.5"], 2, "not understood"),
        (["FOLDER", "--again", "--no-tune"], 2, "leave one of them out"),
    ],
)
def test_wrong_usage(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    assert main(["tune", *(str(folder) if word == "FOLDER" else word for word in words)]) == code
    assert message in capsys.readouterr().err
