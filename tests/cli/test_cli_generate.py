"""``wandapp generate``: text, figures, and the same tokens from every backend."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_models import token_ids

import wandapp_kernels as wk
from wandapp_kernels.cli import main
from wandapp_kernels.cli.generate import _Printer
from wandapp_kernels.runtime.prepare import weight_bytes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")

PROMPT = ["--prompt", "The king", "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned glass-0.9m, dense and compressed."""
    folder = tmp_path_factory.mktemp("generate")
    loaded = wk.load("glass-0.9m")
    wk.prune(loaded.model, token_ids(2, 32), "magnitude", "2:4", device="cpu")
    wk.save(loaded.model, loaded.tokenizer, folder / "dense")
    wk.sparsify(loaded.model)
    wk.save(loaded.model, loaded.tokenizer, folder / "small")
    return {"dense": folder / "dense", "small": folder / "small"}


def test_every_backend_writes_the_same_text(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    texts, figures = {}, {}
    for source, options in (
        *(("dense", ["--backend", name]) for name in ("dense", "auto", "reference")),
        *(("small", ["--backend", name]) for name in ("dense", "auto")),
        ("small", ["--cache", "static"]),
    ):
        key = source, *options
        assert main(["generate", str(folders[source]), *PROMPT, *options, "--json", str(tmp_path / "f.json")]) == 0
        printed = capsys.readouterr()
        texts[key] = printed.out.partition("\n\nfloat32, ")[0]
        figures[key] = json.loads((tmp_path / "f.json").read_text())
        assert printed.err == "" and "tokens/s" in printed.out and "resident" in printed.out
    assert len(set(texts.values())) == 1 and len({str(f["tokens"]) for f in figures.values()}) == 1
    assert main(["generate", str(folders["small"]), *PROMPT, "--compile", "--json", str(tmp_path / "f.json")]) == 0
    printed, compiled = capsys.readouterr(), json.loads((tmp_path / "f.json").read_text())
    assert printed.err == "compiling the decode step\n" and "auto backend, compiled, " in printed.out
    assert compiled["compiled"] and compiled["tokens"] == figures["small", "--backend", "auto"]["tokens"]
    assert not any(found["compiled"] for found in figures.values())
    tokenizer = wk.load("glass-0.9m").tokenizer
    found = figures["dense", "--backend", "auto"]
    assert texts["small", "--cache", "static"] == tokenizer.decode(found["tokens"], skip_special_tokens=True)
    assert len(found["tokens"]) == 12 and found["prompt_tokens"] == 3 and found["layers"] == "28 × 2:4"
    assert found["ttft_s"] > 0 and found["tokens_per_second"] > 0
    assert found["peak_bytes"] >= found["resident_bytes"] > found["weight_bytes"]
    full, small = (figures["small", "--backend", name]["weight_bytes"] for name in ("dense", "auto"))
    assert full == weight_bytes(wk.load("glass-0.9m", tokenizer=False).model) and small < 0.65 * full


def test_text_appears_when_a_character_is_complete(capsys) -> None:
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    printer = _Printer(Bytes())
    seen = []
    for byte in "aé€b".encode():
        printer(torch.tensor([byte]))
        seen.append(capsys.readouterr().out)
    assert seen == ["a", "", "é", "", "", "€", "b"]
    printer(torch.tensor([0xE2]))
    printer.close()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_wrong_requests(folders: dict[str, Path], tmp_path: Path, capsys) -> None:
    folder = str(folders["small"])
    for options, code, message in (
        (["--prompt", ""], 2, "--prompt is empty"),
        (["--prompt", "The king", "--max-new-tokens", "0"], 2, "must be 1"),
        (["--prompt", "The king", "--max-new-tokens", "500"], 2, "must be 1 to 125"),
        (["--prompt", "The king", "--cache", "dynamic", "--compile"], 2, "needs a cache of fixed size"),
    ):
        assert main(["generate", folder, *options]) == code
        assert message in capsys.readouterr().err
    wk.save(wk.load(folder).model, None, tmp_path / "mute")
    assert main(["generate", str(tmp_path / "mute"), *PROMPT]) == 1
    assert "has no tokenizer" in capsys.readouterr().err
