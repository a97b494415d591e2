"""Compare pruning methods on one model: same calibration tokens, same evaluation tokens, one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wandapp_kernels.checkpoint.work_folder import remove_work
from wandapp_kernels.data.calibration import TokenSet, token_hash
from wandapp_kernels.errors import UsageError
from wandapp_kernels.evaluation.perplexity import Perplexity, perplexity
from wandapp_kernels.evaluation.tasks import TaskSet
from wandapp_kernels.evaluation.zero_shot import zero_shot
from wandapp_kernels.models.load import LoadedModel
from wandapp_kernels.pruning.methods import build_all
from wandapp_kernels.pruning.reports import PruneReport
from wandapp_kernels.pruning.settings import PruneSettings, recorded_settings
from wandapp_kernels.pruning.walk import Progress, device_name, prune_blocks, versions


@dataclass(frozen=True)
class EvaluationText:
    """Held-out tokens: ``ids`` is a 1-D int64 stream."""

    name: str
    split: str
    ids: torch.Tensor


def score_texts(
    loaded: LoadedModel, texts: Sequence[EvaluationText], seqlen: int, device: torch.device
) -> list[Perplexity]:
    """Perplexity on each text, in windows of ``seqlen`` tokens that start with BOS if there is one; moves the model."""
    model: nn.Module = loaded.model
    model.to(device)
    bos = loaded.tokenizer.bos_token_id if loaded.tokenizer is not None else None
    return [
        perplexity(loaded.model, text.ids, seqlen=seqlen, bos_token_id=bos, source=text.name, split=text.split)
        for text in texts
    ]


def compare(
    load: Callable[[], LoadedModel],
    methods: Sequence[str],
    sparsity: str,
    calibration: TokenSet,
    texts: Sequence[EvaluationText],
    *,
    eval_seqlen: int,
    tasks: TaskSet | None = None,
    seed: int = 0,
    device: torch.device,
    progress: Callable[[str, Progress], None] = lambda _method, _progress: None,
    done: Callable[[str, float, float], None] = lambda _method, _perplexity, _seconds: None,
    pruned: Callable[[PruneReport], None] = lambda _report: None,
    known: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda _result: None,
    work: Path | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Prune a freshly loaded model with every method and evaluate it.

    Args:
        load: gives the dense model anew; called once for the dense figures and once for each method, so that one model
            is in memory at a time.
        tasks: what ``load_tasks`` returned, to run on the dense model and after every method.
        changes: to the methods, see ``build_all``.
        progress: ``(method or dense, where the walk or a task is)``; done: ``(method, perplexity on the first text,
            pruning seconds)``.
        pruned: called with each method's report, of which the result leaves out the layers, before it is evaluated.
        known: an earlier, partial result of the same comparison; what it holds is not measured again.
        keep: called with the result so far after each method, to resume from later.
        work: folder for the finished blocks of the method at work, which a killed one goes on after.

    Returns:
        ``{"model", "dense": {"perplexity", "perplexities"}, "methods": [{"method", "sparsity",
        "achieved_sparsity", "perplexity", "perplexities", "seconds", "cpu_seconds", "peak_memory_bytes",
        "settings", "blocks", "warnings"}], "seed", "text_hash", "versions", "calibration", "evaluation", "device"}``.
        ``perplexity`` is on the first text; ``seconds`` is the pruning alone. With tasks ``dense`` and each method have
        ``tasks`` too, ``{task: {"metric", "value", "standard_error", "metrics"}}``, and so has ``evaluation``.

    Raises:
        UsageError: before any work, when one of the methods is unknown or ``known`` was measured otherwise: another
            calibration or evaluation text, tasks, seed, or settings of a method.
    """
    settings = build_all(methods, sparsity, seed=seed, **changes)
    if known is not None:
        _check_known(known, calibration, texts, tasks, eval_seqlen, seed, settings)

    def measure(name: str, loaded: LoadedModel) -> tuple[list[Perplexity], dict[str, Any]]:
        measured = score_texts(loaded, texts, eval_seqlen, device)
        return measured, _figures(measured) | _task_figures(loaded, tasks, partial(progress, name))

    result = known or _dense_result(load(), measure, calibration, tasks, eval_seqlen, seed, device)
    done("dense", result["dense"]["perplexity"], 0.0)
    finished = {entry["method"] for entry in result["methods"]}
    for position, chosen in enumerate(settings):
        if chosen.method in finished:
            continue  # equal names mean the same composition, given twice
        finished.add(chosen.method)
        loaded = load()
        blocks = None if work is None else work / f"{position:02}"
        report = prune_blocks(
            loaded.model,
            calibration.ids,
            chosen,
            device=device,
            progress=partial(progress, chosen.method),
            work=blocks,
        )
        pruned(report)
        entry = _entry(report, measure(chosen.method, loaded)[1])
        result["methods"].append(entry)
        done(chosen.method, entry["perplexity"], report.seconds)
        keep(result)  # the last: what is kept is not done again
        if blocks is not None:
            remove_work(blocks)
        del loaded
    return result


def _check_known(
    known: dict[str, Any],
    calibration: TokenSet,
    texts: Sequence[EvaluationText],
    tasks: TaskSet | None,
    eval_seqlen: int,
    seed: int,
    settings: Sequence[PruneSettings],
) -> None:
    found = {entry["method"]: entry["settings"] for entry in known["methods"]}
    pairs = [
        ("calibration text", known["text_hash"], calibration.text_hash),
        ("seed", known["seed"], seed),
        ("evaluation window", known["evaluation"]["seqlen"], eval_seqlen),
        (
            "evaluation texts",
            [[text["text"], text["text_hash"]] for text in known["evaluation"]["texts"]],
            [[text.name, token_hash(text.ids)] for text in texts],
        ),
        ("tasks", known["evaluation"].get("tasks", []), _task_identities(tasks)),
        *(
            (f"settings of {chosen.method}", found[chosen.method], json.loads(json.dumps(recorded_settings(chosen))))
            for chosen in settings
            if chosen.method in found
        ),
    ]
    for what, before, now in pairs:
        if json.loads(json.dumps(before)) != now:
            raise UsageError(f"the earlier result differs in its {what}: {before}, now {now}; measure it again")


def _dense_result(
    dense: LoadedModel,
    measure: Callable[[str, LoadedModel], tuple[list[Perplexity], dict[str, Any]]],
    calibration: TokenSet,
    tasks: TaskSet | None,
    eval_seqlen: int,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    measured, figures = measure("dense", dense)
    return {
        "model": dense.name,
        "dense": figures,
        "methods": [],
        "seed": seed,
        "text_hash": calibration.text_hash,
        "versions": versions(),
        "device": device_name(device),
        "calibration": {
            "source": calibration.source,
            "samples": calibration.ids.shape[0],
            "seqlen": calibration.ids.shape[1],
            "seed": calibration.seed,
            "text_hash": calibration.text_hash,
        },
        "evaluation": {
            "seqlen": eval_seqlen,
            "texts": [
                {"text": m.source, "split": m.split, "tokens": m.tokens, "text_hash": m.text_hash} for m in measured
            ],
            **({"tasks": _task_identities(tasks)} if tasks is not None else {}),
        },
    }


def _figures(measured: Sequence[Perplexity]) -> dict[str, Any]:
    return {"perplexity": measured[0].value, "perplexities": {m.source: m.value for m in measured}}


def _task_figures(
    loaded: LoadedModel, tasks: TaskSet | None, progress: Callable[[Progress], None]
) -> dict[str, dict[str, Any]]:
    if tasks is None:
        return {}
    assert loaded.tokenizer is not None, "tasks are text"
    kept = ("metric", "value", "standard_error", "metrics")
    results = zero_shot(
        loaded.model,
        loaded.tokenizer,
        tasks,
        progress=lambda stage, done, total: progress(Progress(stage, done, total)),
    )
    found = {result.task: asdict(result) for result in results}
    return {"tasks": {task: {key: result[key] for key in kept} for task, result in found.items()}}


def _task_identities(tasks: TaskSet | None) -> list[dict[str, Any]]:
    return [task.identity() for task in tasks.tasks] if tasks is not None else []


def _entry(report: PruneReport, figures: dict[str, Any]) -> dict[str, Any]:
    recorded = asdict(report)
    kept = (
        *("method", "sparsity", "achieved_sparsity", "seconds", "cpu_seconds", "peak_memory_bytes"),
        *("settings", "warnings"),
    )
    blocks = [{key: value for key, value in block.items() if key != "layers"} for block in recorded["blocks"]]
    return {**{key: recorded[key] for key in kept}, **figures, "blocks": blocks}
