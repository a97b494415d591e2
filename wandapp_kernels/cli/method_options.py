"""The options that change a method: what they mean to ``build_settings``, and which of them cannot be."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from wandapp_kernels.cli import checks
from wandapp_kernels.errors import UsageError
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.methods import build_all
from wandapp_kernels.pruning.settings import PruneSettings
from wandapp_kernels.pruning.statistics import (
    GRAM,
    MODEL_GRADIENT_L1,
    MODEL_GRADIENT_L2,
    NORM,
    REGIONAL_GRADIENT,
)

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
    """What the user changed about the method, as keywords of ``build_settings``; nothing that was left alone."""
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
    rates = [_option(name) for name in ("relative_lr", "lr", "preset") if getattr(arguments, name) is not None]
    if len(rates) > 1:
        raise UsageError(f"{' and '.join(rates[:2])} both set the learning rate; give one of them")
    changed = changes(arguments)
    plain = build_all(
        methods, arguments.sparsity, **{key: changed[key] for key in changed if key not in ("preset", "optimizer")}
    )
    named = ", ".join(dict.fromkeys(chosen.method for chosen in plain))
    typed = [_option(name) for name in ("preset", *_OPTIMIZER_FIELDS) if getattr(arguments, name) is not None]
    if typed and not any(chosen.optimizer for chosen in plain):
        belong = "belongs" if len(typed) == 1 else "belong"
        raise UsageError(
            f"{', '.join(typed)} {belong} to the regional optimiser, which {named} does not use; "
            "add --regional-optimizer, or choose another method"
        )
    found = build_all(methods, arguments.sparsity, **changed)
    for name, uses, where in (
        ("alpha", _weighs_gradients, "the criteria rgs and gblm"),
        ("x_norm", _adds_regional_gradients, "the criterion rgs"),
        ("recompute_gradient", _may_recompute, "the criterion rgs with a regional optimiser whose mask is regrow"),
        ("sequential", _reads_inputs, "criteria and updates that read a layer's inputs"),
        ("self_calibration", _reads_text, "methods that read calibration text"),
    ):
        if name in changed and not any(map(uses, found)):
            raise UsageError(f"{_option(name)} changes {where} only, which {named} does not use; leave it out")
    return found


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _weighs_gradients(chosen: PruneSettings) -> bool:
    criterion = CRITERIA[chosen.criterion]
    gradients = {REGIONAL_GRADIENT, MODEL_GRADIENT_L1, MODEL_GRADIENT_L2}
    return criterion.factors is not None and bool(criterion.needs & gradients)


def _adds_regional_gradients(chosen: PruneSettings) -> bool:
    return REGIONAL_GRADIENT in CRITERIA[chosen.criterion].needs


def _may_recompute(chosen: PruneSettings) -> bool:
    optimizer = chosen.optimizer
    return _adds_regional_gradients(chosen) and optimizer is not None and optimizer.mask == "regrow"


def _reads_inputs(chosen: PruneSettings) -> bool:
    return chosen.update is not None or bool(CRITERIA[chosen.criterion].needs & {NORM, GRAM})


def _reads_text(chosen: PruneSettings) -> bool:
    return bool(CRITERIA[chosen.criterion].needs or chosen.update or chosen.optimizer)
