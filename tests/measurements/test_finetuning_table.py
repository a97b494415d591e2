"""The table of what LoRA wins back, and that a row is not measured twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import finetuning, tables


def row(method: str, form: str) -> dict:
    return {
        "method": method,
        "form": form,
        "before": {"wiki": 160.0, "sotu": 200.0},
        "after": {"wiki": 90.5, "sotu": 120.0},
        "settings": {"targets": ["all"], "rank": 8, "alpha": 16, "dropout": 0.05, "lr": 1e-3, "batch": 4, "seed": 7},
        "losses": [5.0, 4.0],
        "samples": 6,
        "seqlen": 9,
        "text_hash": "abc",
        "cpu_seconds": 33.3,
        "peak_memory_bytes": 2e9,
        "versions": {"torch": "2"},
        "device": "a CPU",
    }


def test_the_table_holds_the_rows_and_says_what_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    assert finetuning.finetuning_table(path) == "not measured yet"
    path.write_text(json.dumps({"eval_tokens": 77, "rows": [row("wanda", "merged"), row("wanda", "adapters")]}))
    lines = finetuning.finetuning_table(path).split("\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| wanda")]
    assert cells[0] == ["wanda", "merged", "160", "90.50", "200", "120", "33", "2 GB"]
    assert cells[1][1] == "adapters" and len(cells) == 2
    for fact in ("a CPU", "hash abc", "6 × 9 tokens", "2 steps", "seed 7", "torch 2", "lr 0.001", "on 77 held-out"):
        assert fact in lines[-1]
    monkeypatch.setattr(tables.finetuning, "finetuning_table", lambda: "ours")
    assert tables.any_table("finetuning") == "ours"


def test_only_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [row("wanda", "merged")]}))
    measured = []

    def measure(method: str, form: str, work: Path, samples: int, tokens: int, before: dict | None) -> dict:
        measured.append((method, form, before))
        return row(method, form)

    monkeypatch.setattr(finetuning, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["bench.finetuning", "--out", str(path)])
    finetuning.main()
    known = {"wiki": 160.0, "sotu": 200.0}
    assert measured == [("wanda", "adapters", known), ("wanda++", "merged", None), ("wanda++", "adapters", known)]
    assert len(json.loads(path.read_text())["rows"]) == 4
    finetuning.main()
    assert len(measured) == 3
    monkeypatch.setattr(sys, "argv", ["bench.finetuning", "--samples", "3"])
    with pytest.raises(SystemExit):
        finetuning.main()
    assert "a trial needs an --out of its own" in capsys.readouterr().err
