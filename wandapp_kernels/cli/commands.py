"""What each subcommand does."""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from wandapp_kernels import api
from wandapp_kernels.checkpoint.atomic import check_target, write_text_atomic
from wandapp_kernels.checkpoint.inspect import inspect_folder
from wandapp_kernels.checkpoint.save import check_room_for, save_pruned, to_json
from wandapp_kernels.checkpoint.work_folder import remove_work
from wandapp_kernels.cli import checks, task_options
from wandapp_kernels.cli.bars import ProgressDisplay
from wandapp_kernels.cli.comparison_work import ComparisonWork, has_begun
from wandapp_kernels.cli.method_options import changes, settings
from wandapp_kernels.data.calibration import TokenSet, calibration_tokens, evaluation_tokens
from wandapp_kernels.errors import ModelError, UsageError
from wandapp_kernels.evaluation.compare import EvaluationText, compare, score_texts
from wandapp_kernels.evaluation.perplexity import DEFAULT_SEQLEN, Perplexity, context_length
from wandapp_kernels.evaluation.tasks import TaskSet
from wandapp_kernels.evaluation.zero_shot import zero_shot
from wandapp_kernels.finetuning.adapters import add_adapters, check_adapters
from wandapp_kernels.models.bundled import BUNDLED, bundled_folder, quiet_transformers
from wandapp_kernels.models.layers import check_ignored
from wandapp_kernels.models.load import LoadedModel, load_model
from wandapp_kernels.pruning.reports import PruneReport
from wandapp_kernels.pruning.walk import Progress, device_name, versions
from wandapp_kernels.report.page import write_report
from wandapp_kernels.report.tables import (
    comparison_table,
    format_inspection,
    human_bytes,
    human_seconds,
    is_share,
    mean_score,
    number,
    percent,
    score_text,
)
from wandapp_kernels.runtime.swap import desparsify


def prune(arguments: argparse.Namespace) -> None:
    """``wandapp prune MODEL --out DIR``"""
    check_target(arguments.out, arguments.force)
    checks.spares(arguments.model, {"--out": arguments.out}, in_place=True)
    if arguments.work:
        checks.apart({"--out": arguments.out, "--work": arguments.work})
        arguments.kept = f"the same command goes on from {arguments.work}"
    (chosen,) = settings(arguments, [arguments.method])
    device = checks.device(arguments.device)
    loaded = load_dense(arguments)
    check_room_for(loaded.model, arguments.out)  # what is found out after pruning is found out too late
    check_ignored(loaded.model, arguments.ignore)
    tokens = _calibration(arguments, loaded)
    display = ProgressDisplay(arguments.quiet)
    report = api.prune(
        loaded.model,
        tokens,
        arguments.method,
        arguments.sparsity,
        seed=arguments.seed,
        ignore=arguments.ignore,
        device=device,
        progress=lambda where: display(chosen.method, where),
        work=arguments.work,
        **changes(arguments),
    )
    display.close()
    recorded = _recorded(report, tokens, arguments)
    with quiet_transformers():
        save_pruned(loaded.model, loaded.tokenizer, arguments.out, recorded, force=arguments.force)
    if arguments.json:
        write_text_atomic(arguments.json, to_json(recorded))
    if arguments.work:
        remove_work(arguments.work)
    for warning in report.warnings:
        display.line(f"warning: {warning}")
    print(
        f"{arguments.out}: {report.method} {report.sparsity}, {percent(report.achieved_sparsity)} of the block "
        f"Linears' weights are zero, {human_seconds(report.seconds)}, "
        f"peak memory {human_bytes(report.peak_memory_bytes)}"
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """``wandapp eval MODEL``"""
    device = checks.device(arguments.device)
    with_text = arguments.text is not None or arguments.tasks is None
    for name in ("seqlen", "tokens", "split"):
        if not with_text and getattr(arguments, name) is not None:
            raise UsageError(f"--{name} is of a text, but with --tasks alone there is none; give --text too")
    display = ProgressDisplay(arguments.quiet)
    tasks = task_options.load(arguments, display)
    if arguments.adapter:
        check_adapters(arguments.adapter)
    loaded = load(arguments)
    if arguments.adapter:
        add_adapters(loaded.model, arguments.adapter)
    measured: list[Perplexity] = []
    if with_text:
        seqlen = window(arguments.seqlen, loaded)
        tokens = 16384 if arguments.tokens is None else arguments.tokens
        texts = evaluation_texts(
            "wiki" if arguments.text is None else arguments.text, loaded, arguments.split or "evaluation", tokens
        )
        measured = score_texts(loaded, texts, seqlen, device)
    for result in measured:
        print(
            f"{result.source} ({result.split}): perplexity {number(result.value)} over {result.tokens} tokens "
            f"in windows of {result.seqlen}, text {result.text_hash}"
        )
    found = {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "perplexity": measured[0].value if measured else None,
        "texts": [
            {
                "text": m.source,
                "split": m.split,
                "perplexity": m.value,
                "tokens": m.tokens,
                "seqlen": m.seqlen,
                "text_hash": m.text_hash,
            }
            for m in measured
        ],
        "versions": versions(),
        "device": device_name(device),
    }
    if tasks is not None:
        found["tasks"] = _run_tasks(loaded, tasks, device, display)
    display.close()
    if arguments.json:
        write_text_atomic(arguments.json, to_json(found))


def _run_tasks(
    loaded: LoadedModel, tasks: TaskSet, device: torch.device, display: ProgressDisplay
) -> list[dict[str, Any]]:
    """Print and return what the model scores."""
    module: nn.Module = loaded.model
    module.to(device)
    results = zero_shot(
        loaded.model,
        _tokenizer(loaded),
        tasks,
        progress=lambda stage, done, total: display("eval", Progress(stage, done, total)),
    )
    display.close()
    for result in results:
        print(task_options.line(result))
    found = [asdict(result) for result in results]
    mean = mean_score({result["task"]: result for result in found})
    if mean is not None:
        unit = " %" if is_share(mean["metric"]) else ""
        print(f"mean over {len(found)} tasks: {mean['metric']} {score_text(mean)}{unit}")
    return found


def compare_methods(arguments: argparse.Namespace) -> None:
    """``wandapp compare MODEL --methods …``"""
    for folder in (arguments.out, arguments.save):
        if folder:
            # An earlier attempt may have saved a model already.
            check_target(folder, arguments.force or (folder is arguments.save and has_begun(arguments.work)))
        if folder and arguments.work:
            checks.apart({"--out" if folder is arguments.out else "--save": folder, "--work": arguments.work})
    checks.spares(arguments.model, {"--out": arguments.out, "--save": arguments.save})
    if arguments.out and arguments.save:
        checks.apart({"--out": arguments.out, "--save": arguments.save})
    methods = [method.strip() for method in arguments.methods.split(",") if method.strip()]
    if not methods:
        raise UsageError("--methods is empty; name at least one, such as wanda,wanda++")
    chosen = settings(arguments, methods)
    device = checks.device(arguments.device)
    display = ProgressDisplay(arguments.quiet)
    tasks = task_options.load(arguments, display)
    loaded = load(arguments)
    if arguments.save:
        check_room_for(loaded.model, arguments.save)
    check_ignored(loaded.model, arguments.ignore)
    tokens = _calibration(arguments, loaded)
    texts = evaluation_texts(arguments.text, loaded, "evaluation", arguments.eval_tokens)
    seqlen = window(arguments.eval_seqlen, loaded, "--eval-seqlen")
    del loaded
    keeper = _BestModel(arguments, tokens)
    kept: dict[str, Any] = {}
    if arguments.work:
        work = ComparisonWork(arguments, chosen, tokens, texts, seqlen, device)
        arguments.kept = f"the same command goes on from {arguments.work}"
        kept = {"known": work.known(), "keep": work.keep, "work": work.blocks}
        keeper.resume(kept["known"])

    def done(name: str, value: float, seconds: float) -> None:
        display.line(
            f"{name}: perplexity {number(value)}" + (f", pruned in {human_seconds(seconds)}" if seconds else "")
        )
        keeper.done(name, value)

    report = compare(
        keeper.load,
        methods,
        arguments.sparsity,
        tokens,
        texts,
        eval_seqlen=seqlen,
        tasks=tasks,
        seed=arguments.seed,
        device=device,
        progress=display,
        done=done,
        pruned=keeper.pruned,
        ignore=tuple(arguments.ignore),
        **kept,
        **changes(arguments),
    )
    display.close()
    report["command"] = arguments.command_line
    if arguments.out:  # before anything is printed, which may fail
        write_report(report, arguments.out, force=arguments.force)
    if arguments.json:
        write_text_atomic(arguments.json, to_json(report))
    if arguments.work:
        remove_work(arguments.work)
    print(comparison_table(report))
    if arguments.out:
        print(f"\nreport: {arguments.out / 'report.html'}")
    if arguments.save and keeper.best is None:
        warnings.warn(f"no perplexity is a finite number: nothing was written to {arguments.save}", stacklevel=1)
    elif arguments.save:
        print(f"{'' if arguments.out else chr(10)}model of {keeper.best}: {arguments.save}")


class _BestModel:
    """Loads models for a comparison and, with ``--save``, keeps the one with the lowest perplexity on disk."""

    def __init__(self, arguments: argparse.Namespace, tokens: TokenSet):
        self._arguments = arguments
        self._tokens = tokens
        self._latest: LoadedModel | None = None
        self._report: PruneReport | None = None
        self._lowest = math.inf
        self.best: str | None = None

    def resume(self, known: dict[str, Any] | None) -> None:
        """Take up what an earlier attempt has finished, and saved."""
        found = {entry["method"]: entry["perplexity"] for entry in (known or {}).get("methods", [])}
        finite = {method: perplexity for method, perplexity in found.items() if perplexity < math.inf}
        if not self._arguments.save or not finite:
            return
        if not self._arguments.save.is_dir():
            raise UsageError(
                f"{self._arguments.save}, which an earlier attempt saved, is gone; delete {self._arguments.work} to "
                "start again"
            )
        self.best = min(finite, key=finite.__getitem__)
        self._lowest = finite[self.best]

    def load(self) -> LoadedModel:
        self._latest = None  # one model in memory at a time
        loaded = load_dense(self._arguments)
        if self._arguments.save:
            self._latest = loaded
        return loaded

    def pruned(self, report: PruneReport) -> None:
        """How the model loaded last was pruned."""
        self._report = report

    def done(self, method: str, perplexity: float) -> None:
        """A method has pruned and evaluated the model loaded last."""
        if self._latest is None or self._report is None or not perplexity < self._lowest:
            return
        asked = self._arguments
        recorded = {**_recorded(self._report, self._tokens, asked), "perplexity": perplexity}
        force = asked.force or self.best is not None
        with quiet_transformers():
            save_pruned(self._latest.model, self._latest.tokenizer, asked.save, recorded, force=force)
        if not asked.work:
            asked.kept = f"{asked.save} holds the model of {method}"
        self.best, self._lowest = method, perplexity


def inspect(arguments: argparse.Namespace) -> None:
    """``wandapp inspect DIR``"""
    bundled = arguments.folder in BUNDLED
    found = inspect_folder(bundled_folder(arguments.folder) if bundled else arguments.folder)
    print(format_inspection(found, every_layer=arguments.layers))
    if arguments.json:
        write_text_atomic(arguments.json, to_json(found))


def _recorded(report: PruneReport, tokens: TokenSet, arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``wandapp.json`` holds."""
    return {
        **report.to_dict(),
        "model": arguments.model,
        "calibration": tokens.source,
        "command": arguments.command_line,
    }


def load(arguments: argparse.Namespace) -> LoadedModel:
    """The model and its tokenizer, which must be there."""
    loaded = load_model(arguments.model, dtype=arguments.dtype, revision=arguments.revision)
    if loaded.tokenizer is None:
        raise ModelError(f"{arguments.model} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    return loaded


def load_dense(arguments: argparse.Namespace) -> LoadedModel:
    """What is to be pruned: a compressed folder is decompressed."""
    loaded = load(arguments)
    desparsify(loaded.model)
    return loaded


def _tokenizer(loaded: LoadedModel) -> PreTrainedTokenizerBase:
    assert loaded.tokenizer is not None, "load refuses a model without one"
    return loaded.tokenizer


def _calibration(arguments: argparse.Namespace, loaded: LoadedModel) -> TokenSet:
    seqlen = window(arguments.seqlen, loaded)
    return calibration_tokens(
        _tokenizer(loaded), arguments.calibration, samples=arguments.samples, seqlen=seqlen, seed=arguments.seed
    )


def window(asked: int | None, loaded: LoadedModel, option: str = "--seqlen", most: int = DEFAULT_SEQLEN) -> int:
    """Tokens of a window: what was asked for, within the context, or the context, at most ``most``."""
    context = context_length(loaded.model)
    if asked is None:
        return min(context or most, most)
    if asked < 2 or (context is not None and asked > context):
        allowed = "at least 2" if context is None else f"2 to {context}, the context of {loaded.name}"
        raise UsageError(f"{option} is {asked}, but must be {allowed}")
    return asked


def evaluation_texts(names: str, loaded: LoadedModel, split: Any, tokens: int) -> list[EvaluationText]:
    """The first ``tokens`` tokens of each text of a comma-separated list."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if not chosen:
        raise UsageError("--text is empty; name at least one, such as wiki")
    tokenizer = _tokenizer(loaded)
    return [EvaluationText(name, split, evaluation_tokens(tokenizer, name, split, tokens)[0]) for name in chosen]
