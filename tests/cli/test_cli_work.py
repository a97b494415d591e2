"""``wandapp prune --work``: a run that was interrupted goes on, and nothing is left of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from wandapp_kernels.cli import main
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
