"""Pruning in a caller's ``torch.no_grad()`` or ``torch.inference_mode()``, and of models that were made there."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_ids

from wandapp_kernels import api

IDS = token_ids(3, 8)
CHANGES: dict[str, dict[str, Any]] = {
    "wanda": {},
    "gblm": {},
    "wanda++": {"optimizer": {"rounds": 1, "samples": 2}},
    "best": {"optimizer": {"rounds": 1, "samples": 2}, "self_calibration": 40},
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize(("method", "arch"), [*((method, "llama") for method in CHANGES), ("wanda", "mixtral")])
def test_the_weights_are_those_of_a_call_outside(
    method: str, arch: str, made_inside: bool, mode: type[AbstractContextManager[None]]
) -> None:
    expected = tiny_model(arch, num_hidden_layers=1)
    api.prune(expected, IDS, method, device="cpu", **CHANGES[method])
    model = None if made_inside else tiny_model(arch, num_hidden_layers=1)
    with mode():
        model = model or tiny_model(arch, num_hidden_layers=1)
        api.prune(model, IDS.clone(), method, device="cpu", **CHANGES[method])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    model(IDS, labels=IDS).loss.backward()  # as a model from outside allows


def test_a_model_that_was_made_inside_is_pruned_outside() -> None:
    expected = tiny_model("gemma3")
    with torch.inference_mode():
        model = tiny_model("gemma3")
    for one in (model, expected):
        api.prune(one, IDS, "gblm", device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
