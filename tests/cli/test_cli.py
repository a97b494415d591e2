"""``wandapp`` from its arguments to its files, in this process and once in another."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from tiny_text import write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from wandapp_kernels import __version__, api
from wandapp_kernels.cli import main
from wandapp_kernels.data.calibration import calibration_tokens
from wandapp_kernels.evaluation import compare
from wandapp_kernels.models.load import load_model
from wandapp_kernels.pruning.methods import METHODS
from wandapp_kernels.sparsity import Pattern, satisfies

pytestmark = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")

VERSIONS = {"wandapp_kernels", "torch", "transformers", "python"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def few(text: str) -> list[str]:
    """Little calibration."""
    return ["--calibration", text, "--samples", "3", "--seqlen", "32"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, few: list[str]) -> Path:
    out = tmp_path_factory.mktemp("out")
    command = ["prune", "glass-0.9m", "--method", "wanda++", "--rounds", "1", "--ro-samples", "2", "--seed", "3"]
    assert main([*command, *few, "--out", str(out / "model"), "--json", str(out / "report.json")]) == 0
    return out / "model"


def test_prune_writes_a_model_that_loads_bit_for_bit(pruned: Path, text: str) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json", "wandapp.json"} <= {p.name for p in pruned.iterdir()}
    config = json.loads((pruned / "config.json").read_text())
    assert not {"sparsity_config", "quantization_config", "compression_config"} & config.keys()

    loaded = load_model("glass-0.9m")
    tokens = calibration_tokens(loaded.tokenizer, text, samples=3, seqlen=32, seed=3)
    api.prune(loaded.model, tokens, "wanda++", "2:4", seed=3, optimizer={"rounds": 1, "samples": 2})
    found = AutoModelForCausalLM.from_pretrained(pruned, dtype="auto")
    for (name, expected), parameter in zip(loaded.model.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
        if ".layers." in name and parameter.dim() == 2:
            assert satisfies(parameter != 0, Pattern.parse("2:4"))
    assert AutoTokenizer.from_pretrained(pruned)("the king")["input_ids"] == loaded.tokenizer("the king")["input_ids"]


def test_prune_records_the_run(pruned: Path, text: str) -> None:
    record = json.loads((pruned / "wandapp.json").read_text())
    assert json.loads((pruned.parent / "report.json").read_text()) == record
    assert set(record) == {
        *(
            "method",
            "sparsity",
            "settings",
            "seed",
            "text_hash",
            "samples",
            "written_samples",
            "seqlen",
            "versions",
            "device",
            "seconds",
            "cpu_seconds",
        ),
        *("peak_memory_bytes", "achieved_sparsity", "blocks", "warnings", "model", "calibration", "command"),
    }
    assert (record["method"], record["sparsity"], record["seed"], record["model"]) == (
        "wanda++",
        "2:4",
        3,
        "glass-0.9m",
    )
    assert (record["samples"], record["seqlen"], record["calibration"]) == (3, 32, text)
    assert set(record["versions"]) == VERSIONS and record["versions"]["wandapp_kernels"] == __version__
    assert record["command"].startswith("wandapp prune glass-0.9m --method wanda++ --rounds 1")
    assert len(record["blocks"]) == 4 and len(record["blocks"][0]["layers"]) == 7


def test_two_processes_write_the_same_bytes(pruned: Path, few: list[str], tmp_path: Path) -> None:
    code = "import sys, torch; torch.set_num_threads(1); from wandapp_kernels.cli import main; sys.exit(main())"
    command = ["prune", "glass-0.9m", "--method", "wanda++", "--rounds", "1", "--ro-samples", "2", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, *few, "--out", str(tmp_path / "again"), "--quiet"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "again/model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()
    assert done.stderr == ""
    assert re.fullmatch(
        r".*again: wanda\+\+ 2:4, 4\d\.\d\d % of the block Linears' weights are zero, .*\n", done.stdout
    )


def test_prune_shows_progress_unless_quiet(few: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prune", "glass-0.9m", "--method", "gblm", *few, "--sparsity", "0.6"]
    assert main([*command, "--out", str(tmp_path / "loud")]) == 0
    loud = capsys.readouterr()
    assert "gblm: gradients 3/3\n" in loud.err and "gblm: block 4/4\n" in loud.err
    assert main([*command, "--out", str(tmp_path / "quiet"), "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert quiet.out.startswith(f"{tmp_path / 'quiet'}: gblm 60%, ") and quiet.out.count("\n") == 1


def test_prune_replaces_a_folder_only_when_forced(few: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    command = ["prune", "glass-0.9m", "--method", "magnitude", *few, "--out", str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "not empty" in error and "--force" in error and error.count("\n") == 1
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    assert main([*command, "--force", "--quiet"]) == 0
    assert not (tmp_path / "out" / "mine.txt").exists()
    assert not list(tmp_path.glob(".*"))


def test_every_option_of_prune_reaches_the_settings(text: str, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    folder_of_a_tiny_llama(tiny)
    options = shlex.split(
        "--method wanda --score rgs --update sparsegpt --regional-optimizer --alpha 7 --x-norm mean "
        "--recompute-gradient --sequential --rounds 2 --ro-samples 2 --ro-batch 2 --algorithm adam --relative-lr 0.002 "
        "--schedule cosine --ro-mask regrow --zero-grad round --ro-target dense --ro-loss token --ro-norms "
        "--ignore k_proj --ignore v_proj --samples 3 --seqlen 16 --sparsity 4:8 --seed 11 --dtype bfloat16 --quiet"
    )
    assert main(["prune", str(tiny), *options, "--calibration", text, "--out", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out/wandapp.json").read_text())
    settings, optimizer = record["settings"], record["settings"].pop("optimizer")
    assert (
        settings
        | {"seed": 11, "pattern": "4:8", "method": "rgs+sparsegpt+ro", "criterion": "rgs", "update": "sparsegpt"}
        == settings
    )
    assert settings | {"alpha": 7.0, "x_norm": "mean", "recompute_gradient": True, "sequential": True} == settings
    assert settings["ignore"] == ["k_proj", "v_proj"]
    assert optimizer | {"rounds": 2, "samples": 2, "batch": 2, "algorithm": "adam", "relative_lr": 0.002} == optimizer
    assert optimizer | {"schedule": "cosine", "mask": "regrow", "zero_grad": "round", "target": "dense"} == optimizer
    assert (optimizer["loss"], optimizer["norms"]) == ("token", True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert (model.model.layers[0].self_attn.k_proj.weight != 0).all()
    command = ["prune", str(tiny), "--method", "wanda++", "--no-regional-optimizer", "--lr", "1e-5", "--samples", "2"]
    assert main([*command, "--seqlen", "16", "--calibration", text, "--out", str(tmp_path / "two")]) == 2


def folder_of_a_tiny_llama(folder: Path, **config) -> None:
    """What a user has after downloading a model: weights and tokenizer, written by transformers."""
    tokenizer = load_model("glass-0.9m").tokenizer
    tiny_model("llama", vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_folder_of_transformers_is_pruned_inspected_and_evaluated(text: str, tmp_path: Path, capsys) -> None:
    folder_of_a_tiny_llama(tmp_path / "llama", tie_word_embeddings=False)
    out = tmp_path / "pruned"
    command = ["prune", str(tmp_path / "llama"), "--method", "sparsegpt", "--calibration", text, "--samples", "3"]
    assert main([*command, "--out", str(out)]) == 0  # --seqlen is the context, 64
    assert json.loads((out / "wandapp.json").read_text())["seqlen"] == 64
    assert main(["inspect", str(out), "--json", str(tmp_path / "inspect.json"), "--layers"]) == 0
    printed = capsys.readouterr().out
    assert "sparsegpt, 2:4, seed 0" in printed and "model.layers.2.mlp.down_proj" in printed
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert {*found} == {*("folder", "model_type", "files", "layers", "totals", "written_by", "problems", "unchecked")}
    assert found["problems"] == [] and found["totals"]["layer_sparsity"] == 0.5
    assert len(found["layers"]) == 21 and all("2:4" in layer["patterns"] for layer in found["layers"])
    assert main(["eval", str(out), "--text", text, "--tokens", "300", "--quiet"]) == 0
    assert re.match(r".*text.txt \(evaluation\): perplexity [\d,.]+", capsys.readouterr().out)


def test_a_bundled_model_is_inspected(tmp_path: Path, capsys) -> None:
    assert main(["inspect", "glass-0.9m", "--json", str(tmp_path / "inspect.json")]) == 0
    assert "no wandapp.json" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "inspect.json").read_text())["layers"]) == 28


def test_eval_prints_and_writes_each_text(text: str, tmp_path: Path, capsys) -> None:
    command = ["eval", "glass-0.9m", "--text", f"{text}, wiki", "--tokens", "500", "--seqlen", "64"]
    assert main([*command, "--split", "development", "--json", str(tmp_path / "eval.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "eval.json").read_text())
    assert set(found) == {"model", "adapter", "perplexity", "texts", "versions", "device"}
    assert set(found["versions"]) == VERSIONS
    assert [entry["text"] for entry in found["texts"]] == [text, "wiki"]
    assert found["perplexity"] == found["texts"][0]["perplexity"]
    loaded = load_model("glass-0.9m")
    for entry, line in zip(found["texts"], lines, strict=True):
        expected = api.evaluate(
            loaded.model, loaded.tokenizer, entry["text"], seqlen=64, max_tokens=500, split="development"
        )
        assert entry == {
            "text": entry["text"],
            "split": "development",
            "perplexity": expected.value,
            "tokens": expected.tokens,
            "seqlen": 64,
            "text_hash": expected.text_hash,
        }
        assert line.startswith(f"{entry['text']} (development): perplexity ") and entry["text_hash"] in line


def test_compare_prints_a_table_and_writes_the_report(text: str, few: list[str], tmp_path: Path, capsys) -> None:
    methods = ("magnitude", "wanda", "wanda++")
    command = ["compare", "glass-0.9m", "--methods", ", ".join(methods), *few, "--text", text, "--eval-tokens", "400"]
    options = ["--eval-seqlen", "64", "--rounds", "1", "--ro-samples", "2", "--seed", "4"]
    out, twin = tmp_path / "report", tmp_path / "twin.json"
    assert main([*command, *options, "--out", str(out), "--json", str(twin)]) == 0
    printed = capsys.readouterr()
    rows = printed.out.splitlines()
    assert rows[0].split()[:3] == ["method", "pattern", "zeros"]
    assert [row.split()[0] for row in rows[2:6]] == ["dense", *methods]
    assert f"report: {out / 'report.html'}" in printed.out
    assert "wanda++: block 4/4" in printed.err and "wanda: perplexity" in printed.err

    report = json.loads((out / "report.json").read_text())
    assert json.loads(twin.read_text()) == report
    assert {"model", "dense", "methods", "seed", "text_hash", "versions"} <= set(report)
    assert report["dense"]["perplexity"] > 1 and report["seed"] == 4 and report["model"] == "glass-0.9m"
    assert set(report["versions"]) == VERSIONS and re.fullmatch("[0-9a-f]{16}", report["text_hash"])
    for entry, method in zip(report["methods"], methods, strict=True):
        assert {"method", "sparsity", "perplexity", "seconds", "peak_memory_bytes"} <= set(entry)
        assert entry["method"] == method and entry["perplexity"] != report["dense"]["perplexity"] > 1
    assert report["methods"][2]["settings"]["optimizer"]["samples"] == 2  # given although the others have no optimiser
    assert report["command"].startswith("wandapp compare glass-0.9m --methods 'magnitude, wanda, wanda++'")

    html = (out / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!DOCTYPE html>") and "wanda++" in html and report["text_hash"] in html
    assert not re.search(r"https?:|<script|<link|<img|src=|@import|url\(", html)


@pytest.fixture(scope="module")
def small_comparison(few: list[str], text: str) -> list[str]:
    return ["compare", "glass-0.9m", *few, "--text", text, "--eval-tokens", "100", "--quiet"]


def test_compare_saves_the_best_model_with_its_record(small_comparison: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "old.txt").write_text("old")
    files = ["--save", str(tmp_path / "best"), "--force", "--json", str(tmp_path / "report.json")]
    assert main([*small_comparison, "--methods", "magnitude,wanda", *files]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    best = min(report["methods"], key=lambda entry: entry["perplexity"])
    record = json.loads((tmp_path / "best" / "wandapp.json").read_text())
    assert f"model of {best['method']}: {tmp_path / 'best'}" in capsys.readouterr().out
    assert record["settings"] == best["settings"] and record["perplexity"] == best["perplexity"]
    assert record["text_hash"] == report["text_hash"] and record["versions"] == report["versions"]
    assert len(record["blocks"]) == 4 and record["blocks"][3]["layers"][6]["output_error"] > 0
    assert record["calibration"] == report["calibration"]["source"] and record["command"] == report["command"]
    assert record["model"] == "glass-0.9m" and not (tmp_path / "best" / "old.txt").exists()


def test_an_interrupt_says_what_is_written(
    small_comparison: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rounds = compare.prune_blocks, []

    def twice(*arguments, **options):
        rounds.append(1)
        if len(rounds) > 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(compare, "prune_blocks", twice)
    command = [*small_comparison, "--methods", "wanda,magnitude"]
    assert main([*command, "--save", str(tmp_path / "best")]) == 130
    assert capsys.readouterr().err == f"wandapp: interrupted; {tmp_path / 'best'} holds the model of wanda\n"
    assert (tmp_path / "best" / "model.safetensors").exists()
    assert main(command) == 130
    assert capsys.readouterr().err == "wandapp: interrupted; no result was written\n"


def test_compare_saves_nothing_without_a_perplexity(
    small_comparison: list[str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compare._figures
    monkeypatch.setattr(compare, "_figures", lambda measured: {**real(measured), "perplexity": math.nan})
    assert main([*small_comparison, "--methods", "magnitude", "--save", str(tmp_path / "best")]) == 0
    printed = capsys.readouterr()
    assert "no perplexity is a finite number" in printed.err and "model of" not in printed.out
    assert not (tmp_path / "best").exists()


def test_methods_are_named_and_counted_by_what_runs(
    few: list[str], small_comparison: list[str], tmp_path: Path, capsys
) -> None:
    other = ["--method", "wanda++", "--score", "magnitude", "--no-regional-optimizer", "--out", str(tmp_path / "out")]
    assert main(["prune", "glass-0.9m", *few, *other]) == 0
    printed = capsys.readouterr()
    assert ": magnitude 2:4, " in printed.out and "magnitude: block 4/4" in printed.err
    record = json.loads((tmp_path / "out/wandapp.json").read_text())
    assert record["method"] == record["settings"]["method"] == "magnitude"
    methods = ["--methods", "wanda,magnitude,wanda,ria", "--score", "wanda", "--json", str(tmp_path / "report.json")]
    assert main([*small_comparison, *methods]) == 0
    assert [entry["method"] for entry in json.loads((tmp_path / "report.json").read_text())["methods"]] == ["wanda"]


def test_help_and_version(capsys) -> None:
    for arguments, words in (
        (["--version"], [__version__]),
        (["--help"], ["prune", "eval", "compare", "inspect"]),
        (["bench", "linear", "--help"], ["powers of two"]),
        (["prune", "--help"], [*METHODS, "--regional-optimizer", "--no-regional-optimizer", "--ignore"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)
