"""The table of methods: ``method = criterion × update × regional optimiser``. A new method is one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wandapp_kernels.errors import UsageError
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.options import Spell, check_optimised, check_rates, check_used
from wandapp_kernels.pruning.settings import OptimizerSettings, PruneSettings
from wandapp_kernels.pruning.updates import UPDATES
from wandapp_kernels.sparsity import Pattern


@dataclass(frozen=True)
class Method:
    """Attributes: the columns of the table, and where the method was published."""

    criterion: str
    source: str
    update: str | None = None
    optimizer: OptimizerSettings | None = None
    group: str = "row"
    self_calibration: int = 0


PAGE = OptimizerSettings()  # the Wanda++ page's loop: K = 5, M = 32, RMSprop, regrow; the rate relative to the weights

# Chosen on the development split, see docs/methods.md. A round draws 64 samples: the time spent on steps does not grow
# with the calibration set.
BEST = OptimizerSettings(
    rounds=5,
    samples=64,
    batch=4,
    algorithm="adam",
    relative_lr=1e-2,
    schedule="linear",
    mask="rechoose",
    target="dense",
    loss="token",
    norms=True,
)

METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude", "Han et al. 2015", group="layer"),
    "wanda": Method("wanda", "arXiv 2306.11695"),
    "ria": Method("ria", "ICLR 2024"),
    "gblm": Method("gblm-l2", "arXiv 2311.04902"),
    "gblm-l1": Method("gblm-l1", "arXiv 2311.04902"),
    "pruner-zero": Method("pruner-zero", "ICML 2024"),
    "sparsegpt": Method("obs", "arXiv 2301.00774", update="sparsegpt"),
    "admm": Method("wanda", "arXiv 2401.02938", update="admm"),
    "wanda++rgs": Method("rgs", "arXiv 2503.04992"),
    "wanda++ro": Method("wanda", "arXiv 2503.04992", optimizer=PAGE),
    "wanda++": Method("rgs", "arXiv 2503.04992", optimizer=PAGE),
    "best": Method("obs", "docs/methods.md", update="sparsegpt", optimizer=BEST, self_calibration=12288),
}


def build_settings(
    method: str,
    sparsity: str | float | Pattern,
    *,
    score: str | None = None,
    update: str | None = None,
    regional_optimizer: bool | None = None,
    preset: str | None = None,
    optimizer: dict[str, Any] | None = None,
    **settings: Any,
) -> PruneSettings:
    """Turn a row of ``METHODS`` and what the user changed about it into settings.

    They are named after the row as long as criterion, update and regional optimiser are the row's; else after the row
    that they are now, or after what they are made of: ``rgs+sparsegpt+ro``.

    Args:
        score: another criterion; update: another update, ``"none"`` for no repair; regional_optimizer: on or off.
        preset: ``"paper"`` sets the regional optimiser's rate to the paper's absolute 3e-7.
        optimizer: fields of ``OptimizerSettings`` to change.
        settings: fields of ``PruneSettings`` to change.

    Raises:
        UsageError: an unknown name, naming the known ones.
    """
    method = method.replace("++ ", "++")  # "wanda++ rgs", as the paper writes it
    row = _lookup("method", METHODS, method)
    criterion = score if score is not None else row.criterion
    _lookup("score", CRITERIA, criterion)
    repair = row.update if update is None else (None if update == "none" else update)
    if repair is not None:
        _lookup("update", UPDATES, repair)
    chosen = row.optimizer
    if regional_optimizer is False:
        chosen = None
    elif regional_optimizer and chosen is None:
        chosen = PAGE
    pattern = Pattern.parse(sparsity)
    group = settings.pop("group", row.group)
    written = settings.pop("self_calibration", row.self_calibration)
    composed = Method(criterion, "", repair, chosen, group, written)
    if preset not in (None, "paper"):
        raise UsageError(f"preset {preset!r} is unknown; the only one is 'paper'")
    changes = {"absolute_lr": 3e-7} if preset == "paper" else {}
    changes.update(optimizer or {})
    if changes:
        if chosen is None:
            named = ["preset"] * (preset is not None) + list(optimizer or {})
            raise UsageError(f"{', '.join(named)} belong to the regional optimiser, which {method!r} does not use")
        unknown = set(changes) - set(asdict(chosen))
        if unknown:
            raise UsageError(
                f"unknown optimizer settings: {', '.join(sorted(unknown))}; choose from {', '.join(asdict(chosen))}"
            )
        chosen = replace(chosen, **changes)
    return PruneSettings(
        pattern=pattern,
        method=_name(method, composed, pattern),
        criterion=criterion,
        update=repair,
        optimizer=chosen,
        group=group,
        self_calibration=written,
        **settings,
    )


def build_all(
    methods: Sequence[str], sparsity: str | float | Pattern, *, spell: Spell = str, **changes: Any
) -> list[PruneSettings]:
    """Settings of several methods, the same changes to all; those to the regional optimiser (``preset``, ``optimizer``)
    go to the methods that use it.

    Args:
        spell: gives a change the name that errors call it by.

    Raises:
        UsageError: as ``build_settings``; or a change that none of the methods uses, or two of the learning rate.
    """
    check_rates(changes, spell)
    others = {name: value for name, value in changes.items() if name not in ("preset", "optimizer")}
    plain = [build_settings(method, sparsity, **others) for method in methods]
    check_optimised(changes, plain, spell)
    found = [
        build_settings(method, sparsity, **changes) if settings.optimizer else settings
        for method, settings in zip(methods, plain, strict=True)
    ]
    check_used(changes, found, spell)
    return found


def _name(method: str, composed: Method, pattern: Pattern) -> str:
    """What a composition is called that was asked for as ``method``; equal names mean the same composition."""
    row = METHODS[method]
    if (composed.criterion, composed.update, composed.optimizer) == (row.criterion, row.update, row.optimizer):
        return method
    # n:m patterns compare within their groups of m, whatever else is compared.
    free = not pattern.is_nm
    for name, known in METHODS.items():
        if replace(known, source="", group=known.group if free else composed.group) == composed:
            return name
    parts = [composed.criterion]
    if composed.update is not None:
        parts.append(composed.update)
    if composed.optimizer is not None:
        parts.append("ro" if composed.optimizer == PAGE else f"ro-{method}")
    if composed.self_calibration:
        parts.append("self-calibration")
    name = "+".join(parts)
    return f"{name}, by {composed.group}" if free and (composed.group != "row" or name in METHODS) else name


def _lookup(kind: str, table: dict[str, Any], name: str) -> Any:
    if name not in table:
        raise UsageError(f"{kind} {name!r} is unknown; choose one of {', '.join(table)}")
    return table[name]
