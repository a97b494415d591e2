"""``wandapp convert``: dense to compressed and back, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pruned_models import pruned_model
from safetensors.torch import load_file
from tiny_models import tiny_model

from wandapp_kernels.cli import main

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "dense"
    pruned_model("llama").save_pretrained(folder)
    (folder / "wandapp.json").write_text('{"method": "magnitude"}')
    return folder


def test_there_and_back_is_exact(dense: Path, tmp_path: Path, capsys) -> None:
    small, back, again = tmp_path / "small", tmp_path / "back", tmp_path / "again"
    assert main(["convert", str(dense), str(small), "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "11 × 2:4, 10 × unstructured" in printed or "10 × 2:4, 11 × unstructured" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bytes_after"] == (small / WEIGHTS).stat().st_size < found["bytes_before"]
    assert len(found["swapped"]) == 21 and list(found["left_dense"]) == ["lm_head"]
    assert json.loads((small / "wandapp.json").read_text()) == {"method": "magnitude"}

    assert main(["convert", str(small), str(back), "--format", "dense"]) == 0
    assert "21 layers decompressed" in capsys.readouterr().out
    assert (back / WEIGHTS).read_bytes() == (dense / WEIGHTS).read_bytes()
    assert json.loads((back / "wandapp.json").read_text()) == {"method": "magnitude"}
    assert "quantization_config" not in json.loads((back / "config.json").read_text())

    assert main(["convert", str(back), str(again)]) == 0
    for file in (WEIGHTS, "model.sha256.json", "config.json"):
        assert (again / file).read_bytes() == (small / file).read_bytes(), file


def test_options(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--pattern", "2:4", "--ignore", "down_proj", "--dtype", "bfloat16"]
    assert main(["convert", str(dense), str(out), *options]) == 0
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"]
    assert {entry["pattern"] for entry in layers.values()} == {"2:4"}
    assert {entry["dtype"] for entry in layers.values()} == {"bfloat16"}
    assert 0 < len(layers) < 11 and not any("down_proj" in name for name in layers)
    assert main(["convert", str(dense), str(out), "--min-sparsity", "0.9"]) == 1  # not empty
    assert main(["convert", str(dense), str(out), "--min-sparsity", "0.9", "--force"]) == 0
    assert not any("weight_bitmap" in name for name in load_file(out / WEIGHTS))


def test_options_of_a_compressed_folder_compress_it_anew(dense: Path, tmp_path: Path, capsys) -> None:
    small, anew, direct = tmp_path / "small", tmp_path / "anew", tmp_path / "direct"
    assert main(["convert", str(dense), str(small)]) == 0
    for options in (
        ["--pattern", "unstructured"],
        ["--ignore", "down_proj", "--ignore", "re:layers.0"],
        ["--min-sparsity", "0.9"],
        ["--pattern", "2:4", "--dtype", "bfloat16"],
    ):
        for source, out in ((small, anew), (dense, direct)):
            assert main(["convert", str(source), str(out), *options, "--force"]) == 0
        for file in (WEIGHTS, "model.sha256.json", "config.json"):
            assert (anew / file).read_bytes() == (direct / file).read_bytes(), (options, file)
        assert (anew / "config.json").read_bytes() != (small / "config.json").read_bytes()
    capsys.readouterr()
    for option in (["--pattern", "2:4"], ["--ignore", "down_proj"], ["--min-sparsity", "0"]):
        assert main(["convert", str(small), str(tmp_path / "no"), "--format", "dense", *option]) == 2
        assert f"{option[0]} cannot be used with --format dense" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_why_nothing_can_be_compressed(dense: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out"), "--pattern", "1:4"]) == 1
    printed = capsys.readouterr().err
    assert "(22 layers: it breaks the pattern 1:4)" in printed and printed.count("\n") == 1


def test_a_name_to_ignore_that_is_no_layers(dense: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out"), "--ignore", "lm_head", "--ignore", "nosuch"]) == 2
    assert "'nosuch', is that of no linear layer of the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["compressed", "dense"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_damaged_weights_are_not_written(form: str, name: str, tmp_path: Path, capsys) -> None:
    model = pruned_model("llama", ("2:4",))
    model.get_parameter(name).data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "damaged")
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "damaged"), str(tmp_path / "out"), "--format", form]) == 1
    printed = capsys.readouterr().err
    assert f"the tensor {name} of {tmp_path / 'damaged'} holds NaN or infinity" in printed
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_the_type_are_not_written(tmp_path: Path, capsys) -> None:
    model = pruned_model("llama", ("2:4",))
    model.model.embed_tokens.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    capsys.readouterr()
    for source, out in (("large", "small"), ("small", "half")):
        dtype = "float32" if out == "small" else "float16"
        code = main(["convert", str(tmp_path / source), str(tmp_path / out), "--dtype", dtype])
        assert code == (0 if out == "small" else 1)
    assert "model.embed_tokens.weight" in capsys.readouterr().err and not (tmp_path / "half").exists()


def test_the_record_does_not_stand_in_the_way(tmp_path: Path, capsys) -> None:
    plain, small, back = tmp_path / "plain", tmp_path / "small", tmp_path / "back"
    pruned_model("llama", ("2:4",), num_hidden_layers=1).save_pretrained(plain)
    assert main(["convert", str(plain), str(small)]) == 0
    assert main(["convert", str(small), str(back), "--format", "dense"]) == 0
    assert not (small / "wandapp.json").exists() and not (back / "wandapp.json").exists()
    (back / "wandapp.json").write_text("{broken")
    capsys.readouterr()
    assert main(["convert", str(back), str(small), "--force"]) == 0
    printed = capsys.readouterr().err
    assert (
        printed.startswith("warning: the record of how the model was pruned is left out") and "wandapp.json" in printed
    )
    assert not (small / "wandapp.json").exists()


def test_what_cannot_be_converted(tmp_path: Path, capsys) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "full")
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "full"), str(tmp_path / "out")]) == 1
    assert "no layer of" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["convert", str(tmp_path / "full"), str(tmp_path / "out"), "--pattern", "50%"]) == 2
    assert "names no form" in capsys.readouterr().err
