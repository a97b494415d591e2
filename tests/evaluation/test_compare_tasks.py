"""A comparison that was begun goes on with the same tasks only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_tasks import needs_harness, write_tasks

from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.data.calibration import TokenSet, calibration_tokens, evaluation_tokens
from wandapp_kernels.errors import UsageError
from wandapp_kernels.evaluation.compare import EvaluationText, compare
from wandapp_kernels.evaluation.tasks import TaskSet, load_tasks
from wandapp_kernels.models.load import LoadedModel, load_model

pytestmark = needs_harness


def load() -> LoadedModel:
    return load_model("glass-0.9m")


@pytest.fixture(scope="module")
def calibration() -> TokenSet:
    return calibration_tokens(load().tokenizer, "wiki", samples=2, seqlen=32)


@pytest.fixture(scope="module")
def texts() -> list[EvaluationText]:
    return [EvaluationText("wiki", "evaluation", evaluation_tokens(load().tokenizer, "wiki", "evaluation", 100)[0])]


def run(calibration, texts, tasks: TaskSet | None, methods: tuple[str, ...], known: dict | None = None) -> dict:
    found = compare(
        load,
        methods,
        "2:4",
        calibration,
        texts,
        eval_seqlen=32,
        tasks=tasks,
        device=torch.device("cpu"),
        known=known,
    )
    return json.loads(to_json(found))


def test_an_earlier_result_is_gone_on_with_and_one_of_other_tasks_refused(
    calibration: TokenSet, texts: list[EvaluationText], tmp_path: Path
) -> None:
    folder = write_tasks(tmp_path)
    tasks = load_tasks("second", task_folder=folder)
    known = run(calibration, texts, tasks, ("magnitude",))
    known["methods"][0]["tasks"]["second"]["value"] = -1.0  # to see that it is not measured again
    whole = run(calibration, texts, tasks, ("magnitude", "wanda"), known)
    assert [entry["tasks"]["second"]["value"] >= 0 for entry in whole["methods"]] == [False, True]
    assert set(whole["methods"][1]["tasks"]["second"]) == {"metric", "value", "standard_error", "metrics"}

    for others in (
        None,
        load_tasks("second,choice", task_folder=folder),
        load_tasks("second", shots=1, task_folder=folder),
        load_tasks("second", limit=2, task_folder=folder),
    ):
        with pytest.raises(UsageError, match="differs in its tasks"):
            run(calibration, texts, others, ("magnitude",), known)
    without = run(calibration, texts, None, ("magnitude",))
    assert "tasks" not in without["dense"] and "tasks" not in without["evaluation"]
    with pytest.raises(UsageError, match="differs in its tasks"):
        run(calibration, texts, tasks, ("magnitude",), without)
