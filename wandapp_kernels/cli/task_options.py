"""The options of zero-shot tasks, which ``eval`` and ``compare`` share."""

from __future__ import annotations

import argparse
from pathlib import Path

from wandapp_kernels.cli.bars import ProgressDisplay
from wandapp_kernels.errors import UsageError
from wandapp_kernels.evaluation.tasks import TaskSet, load_tasks
from wandapp_kernels.evaluation.zero_shot import TaskResult
from wandapp_kernels.pruning.walk import Progress
from wandapp_kernels.report.tables import is_share, score_text

_NEED_TASKS = ("shots", "limit", "task_folder")


def add(command: argparse.ArgumentParser, more: str = "") -> None:
    """The arguments; ``more`` is added to the help of ``--tasks``."""
    group = command.add_argument_group("zero-shot tasks (pip install wandapp_kernels[eval])")
    group.add_argument(
        "--tasks", metavar="A,B", help=f"tasks of lm-evaluation-harness, such as arc_easy,hellaswag{more}"
    )
    group.add_argument("--shots", type=int, help="examples before each question (default: 0)")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    group.add_argument(
        "--task-folder", type=Path, metavar="DIR", help="task definitions of your own, which go before lm-eval's"
    )


def load(arguments: argparse.Namespace, display: ProgressDisplay) -> TaskSet | None:
    """The tasks asked for, with their data; None without ``--tasks``.

    Raises:
        UsageError: an option has nothing to act on, and as ``load_tasks``.
        TextError: as ``load_tasks``.
    """
    if arguments.tasks is None:
        for name in _NEED_TASKS:
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} belongs to --tasks, which is not given; name the tasks")
        return None
    return load_tasks(
        arguments.tasks,
        shots=arguments.shots or 0,
        limit=arguments.limit,
        task_folder=arguments.task_folder,
        progress=lambda stage, done, total: display(arguments.command, Progress(stage, done, total)),
    )


def line(result: TaskResult) -> str:
    """A result as ``wandapp eval`` prints it."""
    figures = ", ".join(
        f"{name} {score_text({'metric': name, 'value': metric.value, 'standard_error': metric.standard_error})}"
        + (" %" if is_share(name) else "")
        for name, metric in result.metrics.items()
    )
    return (
        f"{result.task}: {figures} over {result.samples} questions, {result.shots} shots, version {result.version}, "
        f"prompts {result.prompt_hash}"
    )
