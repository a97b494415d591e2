"""``wandapp prune --work``: a run that was interrupted goes on, and nothing is left of the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from wandapp_kernels.cli import main
from wandapp_kernels.cli.comparison_work import ComparisonWork
from wandapp_kernels.pruning import walk

SETTINGS = ["--method", "wanda", "--samples", "2", "--seqlen", "32"]


def test_an_interrupted_run_goes_on(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("glassllm")
    step, pruned = walk._Walk.step, []

    def interrupted(self, index: int):
        if index == 2 and pruned == [0, 1]:
            raise KeyboardInterrupt
        pruned.append(index)
        return step(self, index)

    monkeypatch.setattr(walk._Walk, "step", interrupted)
    work, out = tmp_path / "work", tmp_path / "out"
    command = ["prune", "glass-0.9m", *SETTINGS, "--out", str(out), "--work", str(work)]
    assert main(command) == 130
    assert f"wandapp: interrupted; the same command goes on from {work}\n" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command[:-2], "--out", str(tmp_path / "other"), "--seed", "1", "--work", str(work)]) == 2
    assert "is the work of another run: settings was" in capsys.readouterr().err
    pruned.append(-1)
    assert main(command) == 0
    assert pruned == [0, 1, -1, 2, 3] and not work.exists()
    assert main(["prune", "glass-0.9m", *SETTINGS, "--out", str(tmp_path / "whole")]) == 0
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("work", ["out", "out/work", "."])
def test_the_folders_are_apart(work: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "glass-0.9m", "--out", "out", "--work", work]) == 2
    assert "name two folders" in capsys.readouterr().err


@pytest.mark.parametrize("result", ["work/report.json", "work"])
def test_the_result_is_not_deleted_with_the_folder(result: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "glass-0.9m", "--out", "out", "--work", "work", "--json", result]) == 2
    assert "which is deleted at the end" in capsys.readouterr().err


def test_an_interrupted_comparison_goes_on_within_a_method(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("glassllm")
    step, pruned = walk._Walk.step, []

    def interrupted(self, index: int):
        if pruned == [0, 1, 2, 3, 0, 1]:
            raise KeyboardInterrupt
        pruned.append(index)
        return step(self, index)

    monkeypatch.setattr(walk._Walk, "step", interrupted)
    few = [*SETTINGS[2:], "--eval-tokens", "200", "--eval-seqlen", "32", "--quiet"]
    work, best = tmp_path / "work", tmp_path / "best"

    def command(name: str, *more: str) -> list[str]:
        plain = ["compare", "glass-0.9m", "--methods", "wanda,magnitude", *few, "--json", str(tmp_path / name)]
        return [*plain, *more]

    killed = command("killed.json", "--work", str(work), "--save", str(best))
    assert main(killed) == 130
    assert f"wandapp: interrupted; the same command goes on from {work}\n" in capsys.readouterr().err
    assert main([*killed, "--seed", "1"]) == 2
    assert "is the work of another run: seed was 0 and is 1" in capsys.readouterr().err
    pruned.append(-1)
    assert main(killed) == 0
    assert pruned == [0, 1, 2, 3, 0, 1, -1, 2, 3] and not work.exists()
    assert main(command("whole.json", "--save", str(tmp_path / "whole"))) == 0
    found, whole = (json.loads((tmp_path / name).read_text()) for name in ("killed.json", "whole.json"))
    assert [e["perplexities"] for e in found["methods"]] == [e["perplexities"] for e in whole["methods"]]
    assert found["dense"] == whole["dense"]
    name = "model.safetensors"
    assert (best / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_saved_model_that_is_gone_is_missed(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("glassllm")
    monkeypatch.chdir(tmp_path)
    command = ["compare", "glass-0.9m", "--methods", "wanda,magnitude", *SETTINGS[2:], "--eval-tokens", "200"]
    command += ["--eval-seqlen", "32", "--quiet", "--work", "work", "--save", "best"]
    keep = ComparisonWork.keep

    def stop(self, result: dict[str, Any]) -> None:
        keep(self, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(ComparisonWork, "keep", stop)
    assert main(command) == 130
    shutil.rmtree("best")
    assert main(command) == 2
    assert "best, which an earlier attempt saved, is gone; delete work" in capsys.readouterr().err
    for folder in ("--out", "--save"):
        assert main(["compare", "glass-0.9m", "--methods", "wanda", "--work", "work", folder, "work/x"]) == 2
        assert "name two folders" in capsys.readouterr().err
