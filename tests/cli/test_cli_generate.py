"""``wandapp generate``: text, figures, and the same tokens from every backend."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_models import token_ids

import wandapp_kernels as wk
from wandapp_kernels.cli import generate, main
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
    assert found["threads"] == 1 and found["device"].endswith("1 thread")
    assert found["ttft_s"] > 0 and found["tokens_per_second"] > 0
    assert found["peak_bytes"] >= found["resident_bytes"] > found["weight_bytes"]
    full, small = (figures["small", "--backend", name]["weight_bytes"] for name in ("dense", "auto"))
    assert full == weight_bytes(wk.load("glass-0.9m", tokenizer=False).model) and small < 0.65 * full


def test_without_a_number_the_context_is_the_limit(tmp_path: Path, capsys) -> None:
    prompt, tokenizer = "the", wk.load("glass-0.9m").tokenizer
    while len(tokenizer(prompt)["input_ids"]) < 126:
        prompt += " the"
    length = len(tokenizer(prompt)["input_ids"])
    assert length < 128
    assert main(["generate", "glass-0.9m", "--prompt", prompt, "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["prompt_tokens"] == length and 1 <= len(found["tokens"]) <= 128 - length
    assert main(["generate", "glass-0.9m", "--prompt", prompt, "--max-new-tokens", "64"]) == 2
    assert f"must be 1 to {128 - length}" in capsys.readouterr().err


def test_on_a_gpu_the_model_goes_there_and_its_memory_is_told(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    gpu, real, asked = torch.device("cuda:0"), generate.prepare, []

    def stay(model, backend, *, tune, device):
        asked.append((backend, device))
        return real(model, backend, tune=tune)

    monkeypatch.setattr(generate, "prepare", stay)
    monkeypatch.setattr(generate.checks, "device", lambda name: torch.device("cpu") if name == "cpu" else gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Abacus 9000")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3_000)
    command = ["generate", str(folders["small"]), *PROMPT, "--json", str(tmp_path / "f.json")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "auto backend, Abacus 9000\n" in printed and "GPU memory: weights " in printed
    assert "allocated 2 kB, peak 3 kB" in printed
    found = json.loads((tmp_path / "f.json").read_text())
    assert (found["device"], found["threads"], found["peak_bytes"]) == ("Abacus 9000", 0, 3_000)
    assert main([*command, "--backend", "cpu"]) == 0
    assert asked == [("auto", gpu), ("cpu", torch.device("cpu"))]


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
        (["--prompt", "The king", "--backend", "dense", "--tune"], 2, "leave one of them out"),
    ):
        assert main(["generate", folder, *options]) == code
        assert message in capsys.readouterr().err
    wk.save(wk.load(folder).model, None, tmp_path / "mute")
    assert main(["generate", str(tmp_path / "mute"), *PROMPT]) == 1
    assert "has no tokenizer" in capsys.readouterr().err
