from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest

from wandapp_kernels.errors import UsageError
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.methods import BEST, METHODS, PAGE, build_all, build_settings
from wandapp_kernels.pruning.settings import OptimizerSettings, PruneSettings
from wandapp_kernels.pruning.updates import UPDATES
from wandapp_kernels.sparsity import Pattern

OPTIMIZED = [name for name, row in METHODS.items() if row.optimizer is not None]
PLAIN = [name for name, row in METHODS.items() if row.optimizer is None]

# criterion, update, regional optimiser, comparison group: the published compositions
TABLE = {
    "magnitude": ("magnitude", None, False, "layer"),
    "wanda": ("wanda", None, False, "row"),
    "ria": ("ria", None, False, "row"),
    "gblm": ("gblm-l2", None, False, "row"),
    "gblm-l1": ("gblm-l1", None, False, "row"),
    "pruner-zero": ("pruner-zero", None, False, "row"),
    "sparsegpt": ("obs", "sparsegpt", False, "row"),
    "admm": ("wanda", "admm", False, "row"),
    "wanda++rgs": ("rgs", None, False, "row"),
    "wanda++ro": ("wanda", None, True, "row"),
    "wanda++": ("rgs", None, True, "row"),
}


def refused(message: str, **arguments: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        build_settings(**{"method": "wanda", "sparsity": "2:4", **arguments})


@pytest.mark.parametrize("name", METHODS)
def test_every_row_refers_to_what_exists(name: str) -> None:
    row = METHODS[name]
    assert row.criterion in CRITERIA
    assert row.update is None or row.update in UPDATES
    assert row.group in ("row", "layer")
    assert row.source


@pytest.mark.parametrize("name", TABLE)
def test_published_methods_are_composed_as_published(name: str) -> None:
    settings = build_settings(name, "2:4")
    composed = (settings.criterion, settings.update, settings.optimizer is not None, settings.group)
    assert composed == TABLE[name]
    assert (settings.alpha, settings.x_norm) == (100.0, "sum")
    assert (settings.method, settings.pattern) == (name, Pattern.parse("2:4"))


def test_the_page_is_the_default_optimizer() -> None:
    assert METHODS["wanda++"].optimizer == METHODS["wanda++ro"].optimizer == PAGE == OptimizerSettings()
    assert (PAGE.rounds, PAGE.samples, PAGE.batch, PAGE.algorithm) == (5, 32, 1, "rmsprop")
    assert (PAGE.mask, PAGE.zero_grad, PAGE.target, PAGE.norms) == ("regrow", "sample", "pruned", False)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "50%", 0.6])
def test_every_method_takes_every_pattern(name: str, sparsity: str | float) -> None:
    assert build_settings(name, sparsity).pattern == Pattern.parse(sparsity)


@pytest.mark.parametrize("score, update", itertools.product(CRITERIA, [None, "none", *UPDATES]))
def test_any_score_goes_with_any_update(score: str, update: str | None) -> None:
    for method, optimizer in itertools.product(("wanda", "sparsegpt", "wanda++"), (None, True, False)):
        settings = build_settings(method, "2:4", score=score, update=update, regional_optimizer=optimizer)
        row = METHODS[method]
        assert settings.criterion == score
        assert settings.update == {None: row.update, "none": None}.get(update, update)
        assert settings.optimizer == {None: row.optimizer, True: PAGE, False: None}[optimizer]


@pytest.mark.parametrize(
    ("method", "sparsity", "changes", "name"),
    [
        ("wanda", "2:4", {"score": "wanda", "update": "none", "regional_optimizer": False}, "wanda"),
        ("wanda++", "2:4", {"regional_optimizer": True, "optimizer": {"rounds": 1}, "preset": "paper"}, "wanda++"),
        ("best", "2:4", {"self_calibration": 0}, "best"),
        ("wanda++", "2:4", {"score": "magnitude", "update": "none", "regional_optimizer": False}, "magnitude"),
        ("wanda++", "50%", {"score": "magnitude", "regional_optimizer": False}, "magnitude, by row"),
        ("magnitude", "50%", {"score": "wanda"}, "wanda, by layer"),
        ("magnitude", "2:4", {"score": "wanda"}, "wanda"),
        ("wanda++", "2:4", {"regional_optimizer": False}, "wanda++rgs"),
        ("wanda++", "2:4", {"score": "wanda", "optimizer": {"rounds": 1}}, "wanda++ro"),
        ("wanda", "2:4", {"score": "obs", "update": "sparsegpt"}, "sparsegpt"),
        ("best", "2:4", {"regional_optimizer": False, "self_calibration": 0}, "sparsegpt"),
        ("best", "2:4", {"regional_optimizer": False}, "obs+sparsegpt+self-calibration"),
        ("wanda", "2:4", {"score": "rgs", "update": "sparsegpt", "regional_optimizer": True}, "rgs+sparsegpt+ro"),
        ("best", "2:4", {"update": "admm", "self_calibration": 0}, "obs+admm+ro-best"),
        ("wanda++", "50%", {"update": "admm", "group": "layer"}, "rgs+admm+ro, by layer"),
    ],
)
def test_the_name_says_what_runs(method: str, sparsity: str, changes: dict[str, Any], name: str) -> None:
    assert build_settings(method, sparsity, **changes).method == name


@pytest.mark.parametrize("sparsity", ["2:4", "50%"])
def test_equal_names_mean_equal_compositions(sparsity: str) -> None:
    composed: dict[str, PruneSettings] = {}
    for method, score, update, optimizer in itertools.product(
        METHODS, [None, *CRITERIA], [None, "none", *UPDATES], [None, True, False]
    ):
        settings = build_settings(method, sparsity, score=score, update=update, regional_optimizer=optimizer)
        if settings.pattern.is_nm:
            settings = replace(settings, group="row")
        assert composed.setdefault(settings.method, settings) == settings


def test_switching_the_optimizer_on_keeps_a_methods_own() -> None:
    assert build_settings("best", "2:4", regional_optimizer=True).optimizer == BEST
    assert build_settings("wanda", "2:4", regional_optimizer=True).optimizer == PAGE


@pytest.mark.parametrize("name", OPTIMIZED)
def test_the_paper_preset_sets_the_absolute_rate(name: str) -> None:
    row = METHODS[name].optimizer
    assert row is not None
    assert build_settings(name, "2:4", preset="paper").optimizer == replace(row, absolute_lr=3e-7)
    mine = build_settings(name, "2:4", preset="paper", optimizer={"absolute_lr": 1e-6, "rounds": 2}).optimizer
    assert mine == replace(row, absolute_lr=1e-6, rounds=2)


def test_building_leaves_the_table_alone() -> None:
    before = dict(METHODS)
    changes = {"rounds": 1, "norms": True}
    build_settings("wanda++", "2:4", preset="paper", optimizer=changes, group="layer")
    assert before == METHODS and OptimizerSettings() == PAGE
    assert changes == {"rounds": 1, "norms": True}


def test_settings_pass_through() -> None:
    given: dict[str, Any] = {
        "group": "layer",
        "alpha": 3.0,
        "x_norm": "mean",
        "recompute_gradient": True,
        "sequential": True,
        "ignore": ("lm_head",),
        "seed": 7,
    }
    settings = build_settings("wanda++", Pattern.parse("50%"), **given)
    assert {name: getattr(settings, name) for name in given} == given


@pytest.mark.parametrize("name", ["wanda+++", "Wanda", "", "wanda "])
def test_an_unknown_method_names_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as error:
        build_settings(name, "2:4")
    assert repr(name) in str(error.value) and all(known in str(error.value) for known in METHODS)


def test_unknown_scores_and_updates_name_the_known_ones() -> None:
    for kind, table in (("score", CRITERIA), ("update", UPDATES)):
        with pytest.raises(UsageError) as error:
            build_settings("wanda", "2:4", **{kind: "nonesuch"})  # type: ignore[arg-type]
        assert f"{kind} 'nonesuch'" in str(error.value) and all(known in str(error.value) for known in table)


def test_what_is_refused() -> None:
    refused("preset 'page' is unknown", method="wanda++", preset="page")
    refused("preset '' is unknown", method="wanda++", preset="")
    refused(
        "unknown optimizer settings: lr, momentum; choose from rounds, samples",
        method="wanda++",
        optimizer={"momentum": 0.9, "lr": 1},
    )
    refused("sparsity '4:4'", sparsity="4:4")
    refused("group 'column' is unknown; choose one of row, layer", group="column")
    refused("x_norm 'max' is unknown; choose one of sum, mean", x_norm="max")
    for alpha in (-1, float("nan"), float("inf")):
        refused(f"alpha is {alpha:g}", alpha=alpha)


@pytest.mark.parametrize("name", PLAIN)
def test_optimizer_settings_need_a_method_with_one(name: str) -> None:
    refused(
        f"rounds belong to the regional optimiser, which '{name}' does not use", method=name, optimizer={"rounds": 2}
    )
    refused("preset belong to the regional optimiser", method=name, preset="paper")
    changed = build_settings(name, "2:4", regional_optimizer=True, optimizer={"rounds": 2}).optimizer
    assert changed == replace(PAGE, rounds=2)


@pytest.mark.parametrize("name", OPTIMIZED)
def test_optimizer_settings_are_refused_when_it_is_switched_off(name: str) -> None:
    assert build_settings(name, "2:4", regional_optimizer=False).optimizer is None
    refused("belong to the regional", method=name, regional_optimizer=False, optimizer={"rounds": 2})
    refused("belong to the regional", method=name, regional_optimizer=False, preset="paper")


@pytest.mark.parametrize(
    "field, value",
    [
        *((choice, "nonesuch") for choice in ("algorithm", "schedule", "mask", "zero_grad", "target")),
        *(("rounds", 0), ("rounds", -1), ("batch", 0), ("samples", -1)),
        *(("relative_lr", 0.0), ("relative_lr", -1e-3), ("absolute_lr", 0.0), ("absolute_lr", -3e-7)),
        *(("relative_lr", float("nan")), ("absolute_lr", float("inf"))),
    ],
)
def test_impossible_optimizer_settings_are_refused(field: str, value: Any) -> None:
    refused(repr(value) if isinstance(value, str) else "regional optimiser", method="wanda++", optimizer={field: value})


def test_an_absolute_rate_overrides_the_relative_one_even_in_the_check() -> None:
    assert OptimizerSettings(relative_lr=0.0, absolute_lr=3e-7).absolute_lr == 3e-7


def test_changes_to_the_optimizer_reach_only_the_methods_that_have_one() -> None:
    plain, optimized = build_all(["wanda", "wanda++"], "2:4", preset="paper", optimizer={"rounds": 2}, seed=3)
    assert plain == build_settings("wanda", "2:4", seed=3)
    assert optimized == build_settings("wanda++", "2:4", preset="paper", optimizer={"rounds": 2}, seed=3)
    with pytest.raises(UsageError, match="rounds belongs to the regional optimiser, which wanda, sparsegpt does"):
        build_all(["wanda", "sparsegpt"], "2:4", optimizer={"rounds": 2})


def test_a_method_may_be_written_as_in_the_paper():
    assert build_settings("wanda++ rgs", "2:4") == build_settings("wanda++rgs", "2:4")
    assert build_settings("wanda++ ro", "2:4").method == "wanda++ro"
