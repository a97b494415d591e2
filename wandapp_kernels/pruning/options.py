"""Which changes to a method mean something to it: one that would change nothing is refused, as a mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wandapp_kernels.errors import UsageError
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.settings import PruneSettings
from wandapp_kernels.pruning.statistics import (
    GRAM,
    MODEL_GRADIENT_L1,
    MODEL_GRADIENT_L2,
    NORM,
    REGIONAL_GRADIENT,
)

# Gives an option the name that the user knows it by.
Spell = Callable[[str], str]


def check_rates(changes: Mapping[str, Any], spell: Spell) -> None:
    """Raise UsageError where the learning rate is set twice."""
    given = changes.get("optimizer") or {}
    rates = [name for name in ("relative_lr", "absolute_lr") if name in given]
    rates += ["preset"] if changes.get("preset") is not None else []
    if len(rates) > 1:
        raise UsageError(f"{' and '.join(map(spell, rates[:2]))} both set the learning rate; give one of them")


def check_optimised(changes: Mapping[str, Any], chosen: Sequence[PruneSettings], spell: Spell) -> None:
    """Raise UsageError where the regional optimiser is changed, which none of the methods uses."""
    given = [name for name in ("preset",) if changes.get(name) is not None] + list(changes.get("optimizer") or {})
    if given and not any(settings.optimizer for settings in chosen):
        belong = "belongs" if len(given) == 1 else "belong"
        raise UsageError(
            f"{', '.join(map(spell, given))} {belong} to the regional optimiser, which {_named(chosen)} does not use; "
            f"switch it on with {spell('regional_optimizer')}, or choose another method"
        )


def check_used(changes: Mapping[str, Any], chosen: Sequence[PruneSettings], spell: Spell) -> None:
    """Raise UsageError where none of the methods uses what is changed; False is no change."""
    for name, uses, where in (
        ("alpha", _weighs_gradients, "the criteria rgs and gblm"),
        ("x_norm", _adds_regional_gradients, "the criterion rgs"),
        ("recompute_gradient", _may_recompute, "the criterion rgs with a regional optimiser whose mask is regrow"),
        ("sequential", _reads_inputs, "criteria and updates that read a layer's inputs"),
        ("self_calibration", _reads_text, "methods that read calibration text"),
    ):
        if changes.get(name, False) is not False and not any(map(uses, chosen)):
            raise UsageError(f"{spell(name)} changes {where} only, which {_named(chosen)} does not use; leave it out")


def _named(chosen: Sequence[PruneSettings]) -> str:
    return ", ".join(dict.fromkeys(settings.method for settings in chosen))


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
