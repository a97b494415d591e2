"""``wandapp finetune`` from its arguments to its files, and what reads them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_text import write_text

from wandapp_kernels.cli import commands, finetune, main
from wandapp_kernels.models.load import load_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")

WEIGHTS = "model.safetensors"
FEW = ["--samples", "24", "--seqlen", "32", "--batch", "4", "--micro-batch", "4", "--lr", "3e-3", "--warmup", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    source = write_text(tmp_path_factory.mktemp("text"))
    return ["--train", source, "--text", source, "--eval-tokens", "500"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert main(["prune", "glass-0.9m", "--method", "magnitude", "--samples", "2", "--out", str(out / "pruned")]) == 0
    assert main(["convert", str(out / "pruned"), str(out / "small")]) == 0
    return out / "pruned"


def test_merged(pruned: Path, text: list[str], tmp_path: Path, capsys) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    options = ["--merge", "--targets", "all", *FEW, *text]
    capsys.readouterr()
    assert main(["finetune", str(pruned), *options, "--out", str(out), "--json", str(report)]) == 0
    printed = capsys.readouterr()
    assert "adapters of rank 8 for 28 layers, merged under their masks; 6 steps" in printed.out
    assert "finetune: step 6/6, loss" in printed.err and "before: perplexity" in printed.err
    before, after = load_file(pruned / WEIGHTS), load_file(out / WEIGHTS)
    for name, weight in before.items():
        touched = name.endswith("_proj.weight")
        assert torch.equal(after[name] == 0, weight == 0) and torch.equal(after[name], weight) != touched, name

    record, old = json.loads((out / "wandapp.json").read_text()), json.loads((pruned / "wandapp.json").read_text())
    (entry,) = record.pop("finetuning")
    assert record == old and json.loads(report.read_text()) == entry
    (score,) = entry["perplexity"]
    assert score["after"] < score["before"] and entry["losses"][-1] < entry["losses"][0]
    assert entry["form"] == "merged" and entry["settings"]["targets"] == ["all"] and entry["command"].endswith("json")
    capsys.readouterr()
    assert main(["eval", str(out), *text[2:4], "--tokens", "500", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["perplexity"] == score["after"]

    # A compressed model is decompressed first; then again from what came out, which keeps the first record.
    for source, target in ((pruned.parent / "small", "again"), (out, "twice")):
        assert main(["finetune", str(source), *options, "--targets", "q_proj", "--out", str(tmp_path / target)]) == 0
    assert load_model(tmp_path / "again").model.model.layers[0].self_attn.q_proj.weight.count_nonzero() == 128 * 64
    entries = json.loads((tmp_path / "twice" / "wandapp.json").read_text())["finetuning"]
    assert entries[0] == entry and entries[1]["model"] == str(out)

    assert main(["convert", str(out), str(tmp_path / "small")]) == 0
    assert "28 × 2:4" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "small"), "--prompt", "The king", "--max-new-tokens", "2"]) == 0
    assert main(["inspect", str(tmp_path / "small")]) == 0
    assert "magnitude, 2:4, seed 0, fine-tuned, " in capsys.readouterr().out


def test_merging_may_replace_its_own_model_and_repeats_itself(pruned: Path, text: list[str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert main(["convert", str(pruned), str(own), "--format", "dense"]) == 0
    command = ["--merge", "--targets", "v_proj", *FEW, *text, "--quiet", "--out"]
    assert main(["finetune", str(pruned), *command, str(tmp_path / "out")]) == 0
    assert main(["finetune", str(own), *command, str(own), "--force"]) == 0
    assert (own / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()


def test_adapters(pruned: Path, text: list[str], tmp_path: Path, capsys) -> None:
    out, found = tmp_path / "out", tmp_path / "found.json"
    small = pruned.parent / "small"
    assert main(["finetune", str(small), "--targets", "all", *FEW, *text, "--quiet", "--out", str(out)]) == 0
    assert f"for 28 layers, to be loaded on top of {small}; 6 steps" in capsys.readouterr().out
    record = json.loads((out / "wandapp.json").read_text())
    assert record.keys() == {"finetuning"}
    (score,) = record["finetuning"][0]["perplexity"]
    assert record["finetuning"][0]["form"] == "adapters" and score["after"] < score["before"]
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(small)
    for model in (small, pruned):
        options = ["--adapter", str(out), *text[2:4], "--tokens", "500", "--json", str(found)]
        assert main(["eval", str(model), *options]) == 0
        assert json.loads(found.read_text())["perplexity"] == pytest.approx(score["after"], rel=1e-4)
        assert json.loads(found.read_text())["adapter"] == str(out)
        capsys.readouterr()
        options = ["--adapter", str(out), "--prompt", "The king", "--max-new-tokens", "2", "--json", str(found)]
        assert main(["generate", str(model), *options]) == 0
        assert "28 × 2:4, auto backend, adapters" in capsys.readouterr().out
        assert json.loads(found.read_text())["adapter"] == str(out)
    assert main(["eval", str(out)]) == 1
    assert "holds an adapter; merge it into its base model first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["PRUNED", "--targets", "q_proj,foo"], 2, "'foo' is no linear layer of the model; there are q_proj, k_proj,"),
        (["PRUNED", "--targets", ","], 2, "no targets are given"),
        (["PRUNED", "--samples", "600"], 2, "600 sequences in batches of 128, 1 times, are 5 steps"),
        (["PRUNED", "--samples", "0"], 2, "--samples is 0"),
        (["PRUNED", "--rank", "0"], 2, "rank is 0"),
        (["PRUNED", "--seed", "99999999999999999999"], 2, "--seed is 99999999999999999999"),
        (["PRUNED", "--seqlen", "129"], 2, "--seqlen is 129, but must be 2 to 128"),
        (["PRUNED", "--eval-seqlen", "1"], 2, "--eval-seqlen is 1, but"),
        (["PRUNED", "--text", ","], 2, "--text is empty"),
        (["PRUNED", "--dtype", "float16"], 1, "float16, in which gradients vanish"),
        (["PRUNED", "--device", "abacus"], 2, "device 'abacus' is unknown"),
        (["glass-0.9m"], 2, "prune the model first, with wandapp prune"),
        (["glass-0.9m", "--merge"], 2, "prune the model first, with wandapp prune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_refused(
    arguments: list[str], code: int, message: str, pruned: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(finetune, "score_texts", lambda *_: pytest.fail("work was done"))
    given = [argument.replace("PRUNED", str(pruned)) for argument in arguments]
    capsys.readouterr()
    assert main(["finetune", *given, "--out", str(tmp_path / "out")]) == code
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert not (tmp_path / "out").exists()


def test_folders_are_checked_before_anything_is_loaded(pruned: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(commands, "load_model", lambda *_, **__: pytest.fail("work was done"))
    assert main(["finetune", str(pruned), "--out", str(pruned)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["finetune", str(pruned), "--out", str(pruned), "--force"]) == 2
    assert f"--out {pruned} holds the model" in capsys.readouterr().err
    assert main(["finetune", str(pruned), "--merge", "--out", str(pruned.parent), "--force"]) == 2
    assert f"--out {pruned.parent} holds the model" in capsys.readouterr().err
    for command in (["eval", str(pruned)], ["generate", str(pruned), "--prompt", "The"]):
        assert main([*command, "--adapter", str(tmp_path)]) == 1
        assert "has no adapter_config.json" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "peft", None)
    for command in (["finetune", str(pruned), "--out", str(tmp_path / "out")], ["eval", "x", "--adapter", "y"]):
        assert main(command) == 2
        assert 'adapters need peft: pip install "wandapp_kernels[peft]"' in capsys.readouterr().err


def test_a_disk_that_is_full_is_found_out_first(pruned: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(finetune, "calibration_tokens", lambda *_, **__: pytest.fail("work was done"))
    monkeypatch.setattr("wandapp_kernels.checkpoint.save.shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    assert main(["finetune", str(pruned), "--merge", "--out", str(tmp_path / "out")]) == 1
    assert "GB free" in capsys.readouterr().err
