"""``--tasks`` of ``wandapp eval`` and ``wandapp compare``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny_tasks import needs_harness, write_tasks
from tiny_text import write_text

import wandapp_kernels as wk
from wandapp_kernels.cli import main
from wandapp_kernels.data.calibration import calibration_tokens

pytestmark = needs_harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


def test_eval_runs_the_tasks_alone_or_after_a_text(folder: Path, text: str, tmp_path: Path, capsys) -> None:
    command = ["eval", "glass-0.9m", "--tasks", "choice, second", "--task-folder", str(folder)]
    assert main([*command, "--json", str(tmp_path / "alone.json")]) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "alone.json").read_text())
    loaded = wk.load("glass-0.9m")
    expected = wk.zero_shot(loaded.model, loaded.tokenizer, "choice,second", task_folder=folder)
    assert found["tasks"] == [asdict(result) for result in expected]
    assert (found["perplexity"], found["texts"]) == (None, [])
    first, second, mean = printed.out.splitlines()
    value = 100 * expected[0].value
    assert first.startswith(f"choice: acc {value:.2f} ± ") and " %, acc_norm " in first
    assert "over 8 questions, 0 shots, version 2.5, prompts " in first and second.startswith("second: ")
    assert mean == f"mean over 2 tasks: acc {50 * sum(result.value for result in expected):.2f} %"
    assert "eval: loading tasks 2/2\n" in printed.err and "eval: choice 24/24\n" in printed.err

    options = ["--limit", "2", "--shots", "1", "--text", text, "--tokens", "200", "--quiet"]
    assert main([*command, *options, "--json", str(tmp_path / "both.json")]) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "both.json").read_text())
    assert printed.err == "" and len(printed.out.splitlines()) == 4
    assert printed.out.startswith(f"{text} (evaluation): perplexity ") and found["perplexity"] > 1
    assert [(task["samples"], task["shots"]) for task in found["tasks"]] == [(2, 1), (2, 1)]


def test_compare_measures_the_tasks_on_every_model(folder: Path, text: str, tmp_path: Path, capsys) -> None:
    few = ["--calibration", text, "--samples", "3", "--seqlen", "32", "--text", text, "--eval-tokens", "200"]
    command = ["compare", "glass-0.9m", "--methods", "magnitude,wanda", *few, "--out", str(tmp_path / "report")]
    assert main([*command, "--tasks", "choice,second", "--task-folder", str(folder), "--limit", "4"]) == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "report" / "report.json").read_text())

    loaded = wk.load("glass-0.9m")
    tokens = calibration_tokens(loaded.tokenizer, text, samples=3, seqlen=32)
    for entry, method in ((report["dense"], None), (report["methods"][1], "wanda")):
        if method is not None:
            wk.prune(loaded.model, tokens, method, "2:4")
        expected = wk.zero_shot(loaded.model, loaded.tokenizer, "choice,second", task_folder=folder, limit=4)
        assert entry["tasks"] == {
            result.task: {key: asdict(result)[key] for key in ("metric", "value", "standard_error", "metrics")}
            for result in expected
        }
    assert [task["task"] for task in report["evaluation"]["tasks"]] == ["choice", "second"]
    assert [task["samples"] for task in report["evaluation"]["tasks"]] == [4, 3]
    assert all(name in printed.out.splitlines()[0] for name in ("choice acc, %", "second acc, %", "mean acc, %"))
    assert "dense: choice 12/12\n" in printed.err and "wanda: second 9/9\n" in printed.err
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert all(f"<h2>{name} acc, %</h2>" in html for name in ("choice", "second", "mean"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shots", "1"], "--shots belongs to --tasks"),
        (["--task-folder", "here"], "--task-folder belongs to --tasks"),
        (["--tasks", "choice", "--tokens", "5"], "--tokens is of a text"),
        (["--tasks", "choice", "--split", "development"], "--split is of a text"),
        (["--tasks", "choice", "--task-folder", "nowhere"], "the task folder nowhere is not there"),
        (["--text", ""], "--text is empty"),
    ],
)
def test_options_that_have_nothing_to_act_on_are_refused(options: list[str], message: str, capsys) -> None:
    assert main(["eval", "glass-0.9m", *options]) == 2
    assert message in capsys.readouterr().err


def test_compare_finds_wrong_tasks_before_it_prunes(folder: Path, text: str, tmp_path: Path, capsys) -> None:
    command = ["compare", "glass-0.9m", "--methods", "wanda", "--quiet", "--json", str(tmp_path / "report.json")]
    assert main([*command, "--limit", "3"]) == 2
    assert "--limit belongs to --tasks" in capsys.readouterr().err
    assert main([*command, "--tasks", "absent", "--task-folder", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("wandapp: the task absent cannot be loaded") and error.count("\n") == 1
    assert not (tmp_path / "report.json").exists()
