"""Tasks of lm-evaluation-harness: found by name and their data loaded, before any model runs."""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from wandapp_kernels.errors import TextError, UsageError, WandappError
from wandapp_kernels.evaluation.quiet import quiet_harness

# lm-eval's own, so that its published prompts with examples are the same.
FEW_SHOT_SEED = 1234

# lm-eval's own of Python's generator, by which some tasks order their choices.
_RANDOM_SEED = 0

_CLOSE_NAMES = 3


@dataclass(frozen=True)
class LoadedTask:
    """A task, or a group of tasks with one figure such as ``mmlu``, with its data.

    Attributes:
        name: lm-eval's.
        tasks, groups: lm-eval's objects by name; no groups for a single task.
        shots: examples before each question.
        samples: questions asked.
        version: of the task's definition, as lm-eval gives it.
        prompt_hash: SHA-256 of every question, as it is asked, and its data (first 16 digits).
    """

    name: str
    tasks: dict[str, Any]
    groups: dict[str, Any]
    shots: int
    samples: int
    version: str
    prompt_hash: str

    def identity(self) -> dict[str, Any]:
        """What two results of the task must share to be compared."""
        kept = ("shots", "samples", "version", "prompt_hash")
        return {"task": self.name, **{key: getattr(self, key) for key in kept}, "lm_eval": lm_eval_version()}


@dataclass(frozen=True)
class TaskSet:
    """Tasks to run; ``limit`` and ``seed`` as given to :func:`load_tasks`."""

    tasks: tuple[LoadedTask, ...]
    limit: int | None
    seed: int


def load_tasks(
    names: str | Sequence[str],
    *,
    shots: int = 0,
    limit: int | None = None,
    task_folder: str | Path | None = None,
    seed: int = FEW_SHOT_SEED,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
) -> TaskSet:
    """Find tasks of lm-evaluation-harness and load their data sets from the Hugging Face cache or the hub.

    Args:
        names: tasks, groups or tags; comma-separated in one text. A tag, or a group without a figure of its own, stands
            for its tasks.
        shots: examples before each question, whatever the task's definition says.
        limit: of each task only the first so many questions; None takes all.
        task_folder: folder of task definitions (YAML), which go before lm-eval's own of the same name.
        seed: of the examples' choice.
        progress: ``("loading tasks", done, total)``.

    Raises:
        UsageError: lm-eval is not installed, a name is unknown, the folder holds no task, a number is out of range, or
            a task runs code or needs images.
        TextError: a task's data cannot be loaded.
    """
    asked = [names] if isinstance(names, str) else names
    asked = list(dict.fromkeys(name.strip() for entry in asked for name in entry.split(",") if name.strip()))
    if not asked:
        raise UsageError("no task is named; name at least one, such as arc_easy")
    if shots < 0:
        raise UsageError(f"the number of shots is {shots}, but must be 0 or more")
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit} questions, but must be at least 1")
    _require_lm_eval()
    progress("loading tasks", 0, len(asked))
    found: dict[str, LoadedTask] = {}
    with quiet_harness() as loud, _harness_random_state():
        manager = _manager(asked, task_folder)
        for done, name in enumerate(asked, start=1):
            for loaded in _load(manager, name, shots, limit, seed):
                found[loaded.name] = loaded
            with loud():
                progress("loading tasks", done, len(asked))
    return TaskSet(tuple(found.values()), limit, seed)


def lm_eval_version() -> str:
    """The installed one."""
    return version("lm-eval")


def _require_lm_eval() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"zero-shot tasks need lm-evaluation-harness, which cannot be imported ({error}); run "
            "`pip install wandapp_kernels[eval]`"
        ) from error


@contextmanager
def _harness_random_state() -> Iterator[None]:
    """The state of the global generators that lm-eval's command line starts with; then the caller's again."""
    python, array = random.getstate(), np.random.get_state()
    random.seed(_RANDOM_SEED)
    np.random.seed(FEW_SHOT_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@cache
def _built_in() -> Any:
    """lm-eval's own tasks: some 14,000 files, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _manager(names: Sequence[str], folder: str | Path | None) -> Any:
    """lm-eval's TaskManager that knows every name."""
    from lm_eval.tasks import TaskManager

    own: list[str] = []
    if folder is None:
        manager = _built_in()
    else:
        if not Path(folder).is_dir():
            raise UsageError(f"the task folder {folder} is not there; name a folder with task definitions (.yaml)")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        own = manager.all_tasks
        if not own:
            raise UsageError(
                f"the task folder {folder} holds no .yaml file that lm-eval reads as a task; see its guide"
            )
        if not set(names) <= set(manager.all_subtasks):  # a group of the folder may hold tasks of lm-eval
            for name, entry in _built_in().task_index.items():
                manager.task_index.setdefault(name, entry)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.task_index, _CLOSE_NAMES) or own[:_CLOSE_NAMES]
            hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            where = f" or {folder}" if folder is not None else ""
            raise UsageError(f"there is no task {name!r} in lm-eval {lm_eval_version()}{where}; {hint}")
    return manager


def _load(manager: Any, name: str, shots: int, limit: int | None, seed: int) -> Iterator[LoadedTask]:
    try:
        built = manager.load([name])
        for task_name, task in built["tasks"].items():
            _prepare(task_name, task, shots, limit, seed)
    except WandappError:
        raise
    except Exception as error:  # whatever the network, the cache, the parsers and a task's own code raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise TextError(
            f"the task {name} cannot be loaded ({type(error).__name__}: {reason}); its data set must be in the Hugging "
            "Face cache (HF_HOME) or the hub within reach, or give a task of your own with local files (a task folder)"
        ) from error
    group = built.get("groups", {}).get(name)
    if group is not None and group.has_aggregation:
        yield _loaded(name, built["tasks"], built["groups"], group.version, shots)
    else:
        for task_name, task in built["tasks"].items():
            yield _loaded(task_name, {task_name: task}, {}, str(task.VERSION), shots)


def _prepare(name: str, task: Any, shots: int, limit: int | None, seed: int) -> None:
    """Set the shots and build the questions, which shows whether the data is what the definition says."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"the task {name} runs code that the model writes, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"the task {name} shows images or sound, but the model reads text; leave it out")
    if shots and task.get_config("num_fewshot") == 0:
        raise UsageError(f"the task {name} is defined without examples, but {shots} shots are asked for; use 0")
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    task.build_all_requests(limit=limit)


def _loaded(name: str, tasks: dict[str, Any], groups: dict[str, Any], task_version: str, shots: int) -> LoadedTask:
    digest = hashlib.sha256()
    samples = 0
    for task_name, task in tasks.items():
        last = None
        for request in task.instances:
            if request.doc_id != last:
                samples += 1
                last = request.doc_id
                digest.update(json.dumps([task_name, request.doc], default=str, sort_keys=True).encode())
            digest.update(json.dumps(request.args, default=str, sort_keys=True).encode())
    return LoadedTask(name, tasks, groups, shots, samples, task_version, digest.hexdigest()[:16])
