"""``wandapp convert``: dense to compressed and back, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
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


def test_what_cannot_be_converted(tmp_path: Path, capsys) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "full")
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "full"), str(tmp_path / "out")]) == 1
    assert "no layer of" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main(["convert", str(tmp_path / "full"), str(tmp_path / "out"), "--pattern", "50%"]) == 2
    assert "names no form" in capsys.readouterr().err
