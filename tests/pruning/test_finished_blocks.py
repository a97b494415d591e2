"""A killed run, started again with its work folder, gives the bytes of one that was not killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_ids
from transformers import PreTrainedModel

from wandapp_kernels import api
from wandapp_kernels.errors import CheckpointError, UsageError
from wandapp_kernels.pruning import walk
from wandapp_kernels.pruning.reports import PruneReport
from wandapp_kernels.pruning.walk import Progress

FEW = {"optimizer": {"rounds": 2, "samples": 2}}
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "wanda++": ("wanda++", "2:4", FEW),
    "best": ("best", "2:4", {**FEW, "self_calibration": 90}),  # a dense stream, norms, samples of the model's own
    "gblm": ("gblm", "60%", {}),  # reads gradients of the dense model
    "magnitude": ("magnitude", "4:8", {}),
}
TIMES = ("seconds", "cpu_seconds", "peak_memory_bytes")


class Killed(Exception):
    pass


def three_blocks(seed: int = 0, architecture: str = "llama") -> PreTrainedModel:
    return tiny_model(architecture, seed=seed, num_hidden_layers=3)


def prune(model: PreTrainedModel, run: str, *, after: int | None = None, **changes: Any) -> PruneReport:
    method, sparsity, settings = RUNS[run]

    def progress(where: Progress) -> None:
        if where.stage == "block" and where.done == after:
            raise Killed

    return api.prune(model, token_ids(4, 20), method, sparsity, progress=progress, **settings, **changes)


def killed(folder: Path, run: str, after: int = 2, **changes: Any) -> None:
    with pytest.raises(Killed):
        prune(three_blocks(), run, after=after, work=folder, **changes)


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in TIMES}
    return [without_times(one) for one in found] if isinstance(found, list) else found


def same_bytes(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)


@pytest.mark.parametrize("run", RUNS)
def test_it_goes_on_to_the_same_bytes(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, resumed = three_blocks(), three_blocks()
    report = prune(whole, run)
    killed(tmp_path / "work", run, after=1)
    killed(tmp_path / "work", run, after=2)
    pruned = []
    step = walk._Walk.step
    monkeypatch.setattr(walk._Walk, "step", lambda self, index: pruned.append(index) or step(self, index))
    monkeypatch.setattr(walk, "self_calibration", lambda *_, **__: pytest.fail("the samples were stored"))
    again = prune(resumed, run, work=tmp_path / "work")
    assert pruned == [2]
    assert same_bytes(whole, resumed)
    assert without_times(again.to_dict()) == without_times(report.to_dict())
    assert again.seconds > sum(block.seconds for block in again.blocks)  # those of all attempts


def test_half_precision_and_fused_experts(tmp_path: Path) -> None:
    whole, resumed = (three_blocks(architecture="mixtral").bfloat16() for _ in range(2))
    prune(whole, "wanda++")
    with pytest.raises(Killed):
        prune(three_blocks(architecture="mixtral").bfloat16(), "wanda++", after=1, work=tmp_path)
    prune(resumed, "wanda++", work=tmp_path)
    assert same_bytes(whole, resumed)


def test_a_finished_run_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, again = three_blocks(), three_blocks()
    prune(whole, "wanda++", work=tmp_path)
    monkeypatch.setattr(walk._Walk, "step", lambda *_: pytest.fail("it was pruned again"))
    prune(again, "wanda++", work=tmp_path)
    assert same_bytes(whole, again)


def test_another_run_is_refused(tmp_path: Path) -> None:
    killed(tmp_path, "wanda++")
    with pytest.raises(UsageError, match=r"work of another run: settings was .*; start it as before, or name another"):
        prune(three_blocks(), "wanda++", work=tmp_path, seed=1)
    with pytest.raises(UsageError, match="types was"):
        prune(three_blocks().bfloat16(), "wanda++", work=tmp_path)
    with pytest.raises(UsageError, match="checksum of embeddings and head was"):
        prune(three_blocks(seed=1), "wanda++", work=tmp_path)
    other = three_blocks()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(UsageError, match=r"layers\.1 is not the block that was pruned before: load the model anew"):
        prune(other, "wanda++", work=tmp_path)


def test_the_model_that_was_killed_cannot_go_on_itself(tmp_path: Path) -> None:
    model = three_blocks()
    with pytest.raises(Killed):
        prune(model, "wanda++", after=2, work=tmp_path)
    with pytest.raises(UsageError, match=r"model\.layers\.0 is not the block that was pruned before"):
        prune(model, "wanda++", work=tmp_path)


@pytest.mark.parametrize("name", ["run.json", "block-0000.safetensors"])
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    killed(tmp_path, "wanda++")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=rf"{name} is damaged .*; delete it and start again"):
        prune(three_blocks(), "wanda++", work=tmp_path)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        prune(three_blocks(), "wanda++", work=tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_gap_is_pruned_again(tmp_path: Path) -> None:
    whole, resumed = three_blocks(), three_blocks()
    prune(whole, "wanda++", work=tmp_path)
    (tmp_path / "block-0001.safetensors").unlink()
    prune(resumed, "wanda++", work=tmp_path)
    assert same_bytes(whole, resumed) and (tmp_path / "block-0001.safetensors").exists()
