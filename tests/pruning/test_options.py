"""Changes that a method has no use for are refused in Python as on the command line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_ids

from wandapp_kernels import api
from wandapp_kernels.errors import UsageError
from wandapp_kernels.pruning.methods import build_all

USELESS: list[tuple[str, dict[str, Any], str]] = [
    ("wanda", {"alpha": 100.0}, "alpha changes the criteria rgs and gblm only, which wanda does not use"),
    ("gblm", {"x_norm": "mean"}, "x_norm changes the criterion rgs only, which gblm does not"),
    ("wanda++rgs", {"recompute_gradient": True}, "recompute_gradient changes the criterion rgs with a regional"),
    ("magnitude", {"sequential": True}, "sequential changes criteria and updates that read"),
    ("magnitude", {"self_calibration": 99}, "self_calibration changes methods that read calibration text"),
    ("wanda", {"optimizer": {"rounds": 2}}, "rounds belongs to the regional optimiser, which wanda does not use"),
    ("wanda", {"preset": "paper", "optimizer": {"rounds": 2}}, "preset, rounds belong to the regional optimiser"),
    ("wanda++", {"preset": "paper", "optimizer": {"relative_lr": 1e-2}}, "relative_lr and preset both set"),
    ("wanda++", {"optimizer": {"relative_lr": 1e-2, "absolute_lr": 1e-7}}, "relative_lr and absolute_lr both set"),
    ("wanda", {"seed": 2**64}, "seed is 18446744073709551616, but must be a number of at most 64 bits"),
]


@pytest.mark.parametrize(("method", "changes", "message"), USELESS, ids=str)
def test_what_changes_nothing_is_refused_before_anything_is_pruned(
    method: str, changes: dict[str, Any], message: str
) -> None:
    model, before = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        api.prune(model, token_ids(2, 8), method, **changes)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_one_method_that_uses_a_change_is_enough() -> None:
    found = build_all(["wanda", "wanda++"], "2:4", alpha=5.0, optimizer={"rounds": 2}, sequential=False)
    assert [settings.alpha for settings in found] == [5.0, 5.0]
    assert found[1].optimizer is not None and found[1].optimizer.rounds == 2
    build_all(["magnitude"], "2:4", sequential=False, recompute_gradient=False, preset=None, optimizer=None)
