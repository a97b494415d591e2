"""The folder of ``wandapp compare --work``: the result so far, and the finished blocks of the method at work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.work_folder import WorkFolder
from wandapp_kernels.data.calibration import TokenSet, token_hash
from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.evaluation.compare import EvaluationText
from wandapp_kernels.pruning.settings import PruneSettings, recorded_settings
from wandapp_kernels.pruning.walk import device_name, versions

_RESULT, _BLOCKS = "comparison.json", "blocks"


def has_begun(path: Path | None) -> bool:
    """Whether a comparison has finished a method there."""
    return path is not None and (path / _RESULT).is_file()


class ComparisonWork:
    """Of the comparison that the arguments ask for.

    Attributes:
        blocks: where `compare` keeps finished blocks.

    Raises:
        CheckpointError, UsageError: see `WorkFolder`.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        chosen: Sequence[PruneSettings],
        tokens: TokenSet,
        texts: Sequence[EvaluationText],
        window: int,
        device: torch.device,
    ):
        self._path: Path = arguments.work
        facts = {name: getattr(arguments, name) for name in ("model", "dtype", "revision", "seed", "ignore")}
        facts |= {
            "save": str(arguments.save.resolve()) if arguments.save else None,
            "settings": [recorded_settings(settings) for settings in chosen],
            "calibration": tokens.text_hash,
            "texts": [[text.name, token_hash(text.ids)] for text in texts],
            "window": window,
            "versions": versions(),
            "device": device_name(device),
        }
        WorkFolder(self._path, facts)
        self.blocks = self._path / _BLOCKS

    def known(self) -> dict[str, Any] | None:
        """The result so far, if a method was finished. Raises CheckpointError when its file is damaged."""
        file = self._path / _RESULT
        if not file.is_file():
            return None
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({type(error).__name__}); delete {self._path}") from error

    def keep(self, result: dict[str, Any]) -> None:
        """Store the result so far; perplexities may be infinite, which only Python's JSON holds."""
        write_text_atomic(self._path / _RESULT, json.dumps(result) + "\n")
