"""A folder that keeps the finished parts of a long run, so that a killed one need not start again.

::

    work/
      run.json               what decides the result: only a run with the very same facts goes on from here
      NAME.safetensors       a finished part: tensors, and its facts as JSON in the header

Parts appear complete or not at all (`checkpoint.atomic`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from wandapp_kernels.checkpoint.atomic import check_target, new_file, write_text_atomic
from wandapp_kernels.errors import CheckpointError, UsageError

FORMAT = 1
_RUN, _FACTS = "run.json", "facts"


class Part(NamedTuple):
    """What was stored under a name."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


class WorkFolder:
    """The folder at ``path``, made if it is not there.

    Args:
        facts: what decides the result of the run; compared as JSON.

    Raises:
        CheckpointError: the folder cannot be written, holds something else, or is damaged.
        UsageError: it is that of a run with other facts.
    """

    def __init__(self, path: str | Path, facts: Mapping[str, Any]):
        self.path = Path(path)
        run = self.path / _RUN
        now = json.loads(json.dumps({"format": FORMAT, **facts}))
        if not run.exists():
            check_target(self.path)  # refuses a folder with anything in it
            write_text_atomic(run, json.dumps(now, indent=1) + "\n")
            return
        try:
            before = dict(json.loads(run.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(run, error) from error
        for name in [*now, *before]:
            if before.get(name) != now.get(name):
                raise UsageError(
                    f"{self.path} is the work of another run: {name} was {_short(before.get(name))} and is "
                    f"{_short(now.get(name))}; start it as before, or name another folder (or delete this one)"
                )

    def load(self, name: str) -> Part | None:
        """A part, on the CPU; None when it was not stored. Raises CheckpointError when its file is damaged."""
        file = self._file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt", device="cpu") as stored:
                facts = json.loads((stored.metadata() or {})[_FACTS])
                return Part({key: stored.get_tensor(key) for key in stored.keys()}, facts)  # noqa: SIM118
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self._damaged(file, error) from error

    def store(self, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Keep a part, in place of an earlier one of that name; memory that tensors share is stored for each."""
        whole = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        file = self._file(name)
        try:
            with new_file(file) as partial:
                save_file(whole, partial, {_FACTS: json.dumps(facts)})
        except SafetensorError as error:  # how a full disk is told
            raise CheckpointError(f"{file} cannot be written ({error}); make room and start again") from error

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def _damaged(self, file: Path, error: Exception) -> CheckpointError:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return CheckpointError(f"{file} is damaged ({what}); delete it and start again")


def remove_work(path: str | Path) -> None:
    """Delete a work folder, when its run is over."""
    shutil.rmtree(path, ignore_errors=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
