"""The options that change a method, and what they mean to ``build_all``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from wandapp_kernels.cli import checks
from wandapp_kernels.pruning.methods import build_all
from wandapp_kernels.pruning.settings import PruneSettings

_OPTIMIZER_FIELDS = {
    "rounds": "rounds",
    "ro_samples": "samples",
    "ro_batch": "batch",
    "algorithm": "algorithm",
    "relative_lr": "relative_lr",
    "lr": "absolute_lr",
    "schedule": "schedule",
    "ro_mask": "mask",
    "zero_grad": "zero_grad",
    "ro_target": "target",
    "ro_loss": "loss",
    "ro_norms": "norms",
}


def changes(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the user changed about the method, as keywords of ``build_all``; nothing that was left alone."""
    optimizer = {
        field: value for name, field in _OPTIMIZER_FIELDS.items() if (value := getattr(arguments, name)) is not None
    }
    found: dict[str, Any] = {
        name: value
        for name in ("score", "update", "regional_optimizer", "preset", "alpha", "x_norm", "self_calibration")
        if (value := getattr(arguments, name)) is not None
    }
    for name in ("recompute_gradient", "sequential"):
        if getattr(arguments, name):
            found[name] = True
    if optimizer:
        found["optimizer"] = optimizer
    return found


def settings(arguments: argparse.Namespace, methods: Sequence[str]) -> list[PruneSettings]:
    """The settings of the methods as the options change them.

    Raises:
        UsageError: an option is impossible, or none of the methods uses it.
    """
    checks.seed(arguments.seed)
    return build_all(methods, arguments.sparsity, spell=_spell, **changes(arguments))


def _spell(name: str) -> str:
    """The option that sets a keyword of ``build_all`` or a field of the regional optimiser's settings."""
    names = {field: option for option, field in _OPTIMIZER_FIELDS.items()}
    return f"--{names.get(name, name).replace('_', '-')}"
