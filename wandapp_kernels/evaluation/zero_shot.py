"""Accuracy of a causal language model on tasks of lm-evaluation-harness."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from wandapp_kernels.errors import UsageError
from wandapp_kernels.evaluation.harness_model import harness_model
from wandapp_kernels.evaluation.quiet import quiet_harness
from wandapp_kernels.evaluation.tasks import FEW_SHOT_SEED, LoadedTask, TaskSet, lm_eval_version, load_tasks
from wandapp_kernels.models.checks import require_module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]

# What the literature on pruning reports, where a task has it.
_HEADLINE = "acc"

# Draws for the standard error of metrics that have no formula for it, such as f1.
_BOOTSTRAP = 1000


@dataclass(frozen=True)
class Metric:
    """A figure of a task and its standard error, which is None where it cannot be estimated."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class TaskResult:
    """What a model scores on a task, and what it takes to compare it with another score.

    Attributes:
        task: lm-eval's name.
        metric, value, standard_error: the figure to report: ``acc`` where the task has it, as in the papers on pruning,
            else its first metric.
        metrics: all that the task defines, by name: ``acc``, ``acc_norm`` (log-likelihoods divided by the length of the
            answer in characters), ``f1``, …; with the filter after a comma where it is not ``none``.
        samples: questions asked.
        shots: examples before each.
        version: of the task's definition.
        prompt_hash: of what was asked, see :class:`~wandapp_kernels.evaluation.tasks.LoadedTask`.
        lm_eval: version of lm-evaluation-harness.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    metrics: dict[str, Metric]
    samples: int
    shots: int
    version: str
    prompt_hash: str
    lm_eval: str


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] | TaskSet,
    *,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int | None = None,
    task_folder: str | Path | None = None,
    seed: int = FEW_SHOT_SEED,
    progress: Progress = lambda _stage, _done, _total: None,
) -> list[TaskResult]:
    """Run tasks of lm-evaluation-harness on a model that is in memory, dense or with sparse layers, where it is.

    Of a multiple-choice task, with question q and answers a of n_a characters::

        acc = share of questions whose right answer is argmax_a sum_t ln p(a_t | q, a_<t); acc_norm: the sum over n_a

    Prompts are lm-eval's, without a chat template. Log-softmax runs in fp32. A prompt that is longer than the context
    loses its beginning, with a warning. The model's weights, training mode and device and the state of the random
    generators are left as they were.

    Args:
        tasks: names, see :func:`~wandapp_kernels.evaluation.tasks.load_tasks`, or what it returned, which saves loading
            the data for each of several models; ``shots``, ``limit``, ``task_folder`` and ``seed`` belong to names.
        batch_size: sequences at once; None takes as many as keep the logits within 512 MiB in fp32, at most 32. It
            changes nothing but rounding.
        progress: ``(stage, done, total)``; the stage is ``loading tasks`` or a task's name.

    Returns:
        One result for each task or group, in the order asked for.

    Raises:
        UsageError, TextError: as ``load_tasks``; the model or the tokenizer is none, the tasks were loaded and shots or
            the like are given too, or a task does not fit the model.
        NonFiniteError: the model gives NaN or infinite log-likelihoods.
    """
    require_module(model)
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "get_input_embeddings"):
        raise UsageError(f"the model is a {type(model).__name__}, but tasks need a causal model of transformers")
    if tokenizer is None:
        raise UsageError("tasks are text, but there is no tokenizer; give the model's own")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}; raise it")
    if not isinstance(tasks, TaskSet):
        tasks = load_tasks(tasks, shots=shots, limit=limit, task_folder=task_folder, seed=seed, progress=progress)
    elif shots or limit is not None or task_folder is not None or seed != FEW_SHOT_SEED:
        raise UsageError(
            "shots, limit, task_folder and seed belong to load_tasks, which has loaded these tasks already"
        )
    training = [module for module in model.modules() if module.training]
    try:
        with _random_state(model.device):
            return [_run(model, tokenizer, task, tasks, batch_size, progress) for task in tasks.tasks]
    finally:
        for module in training:
            module.training = True


@contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Seeded as lm-eval does, for tasks that let the model draw; afterwards as before."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(FEW_SHOT_SEED)
        try:
            yield
        finally:
            random.setstate(state)


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: LoadedTask,
    chosen: TaskSet,
    batch_size: int | None,
    progress: Progress,
) -> TaskResult:
    from lm_eval.evaluator import evaluate

    with quiet_harness() as loud:

        def report(done: int, total: int) -> None:
            with loud():
                progress(task.name, done, total)

        harness = harness_model(model, tokenizer, batch_size, report)
        for one in task.tasks.values():
            one.set_fewshot_seed(seed=chosen.seed)  # every run of a task draws the same examples
        try:
            found = evaluate(
                harness,
                {"tasks": task.tasks, "groups": task.groups},
                limit=chosen.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
            )
        except (AssertionError, ValueError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UsageError(f"the task {task.name} does not fit this model: {reason}; leave it out") from error
    if harness.truncated:
        warnings.warn(
            f"{harness.truncated} prompts of {task.name} are longer than the model's context, and their beginnings "
            "were cut off",
            stacklevel=3,
        )
    return _result(task, found["results"][task.name])


def _result(task: LoadedTask, found: Mapping[str, Any]) -> TaskResult:
    metrics = {}
    for key, value in found.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = found.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else key
        metrics[name] = Metric(float(value), float(error) if isinstance(error, int | float) else None)
    if not metrics:
        raise UsageError(f"the task {task.name} gives no figure; leave it out")
    headline = _HEADLINE if _HEADLINE in metrics else next(iter(metrics))
    figure = metrics[headline]
    return TaskResult(
        task.name,
        headline,
        figure.value,
        figure.standard_error,
        metrics,
        task.samples,
        task.shots,
        task.version,
        task.prompt_hash,
        lm_eval_version(),
    )
