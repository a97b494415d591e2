"""Backends whose speed, mistakes and refusals a test decides; they replace the real ones in `tests/dispatch`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from wandapp_kernels import dispatch
from wandapp_kernels.backends import Backend, Problem, base
from wandapp_kernels.ops import layouts
from wandapp_kernels.ops.layouts import NMLayout
from wandapp_kernels.sparsity import Pattern
from wandapp_kernels.tuning.store import Measurement, Store

PROBLEM = dispatch.problem_for(64, 32, "2:4", 1, torch.float32)


class FakeLayout(NMLayout):
    name = "fake-nm"


class Fake(Backend):
    """Right results after waiting; can refuse, fail or be wrong."""

    def __init__(self, name: str, layout: str, wait: float = 0.0, **behaviour: Any):
        self.name, self.layout, self.wait = name, layout, wait
        self.reason = behaviour.get("reason")
        self.default_tokens = behaviour.get("default_tokens", 16)
        self.error = behaviour.get("error")
        self.factor = behaviour.get("factor", 1.0)
        self.calls: list[int] = []
        self.asked: list[Problem] = []

    def supports(self, problem: Problem) -> str | None:
        self.asked.append(problem)
        return self.reason

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        if self.error:
            raise RuntimeError(self.error)
        self.calls.append(x.shape[0])
        time.sleep(self.wait)
        dense = (
            tensors[0]
            if self.layout == "dense"
            else layouts.get_layout(self.layout).decompress(tensors, shape, pattern)
        )
        return torch.nn.functional.linear(x, dense, bias) * self.factor


def add(*fakes: Fake) -> None:
    for fake in fakes:
        base.BACKENDS[fake.name] = fake


def remember(problem: Problem, times: dict[str, float], left_out: dict[str, str] | None = None) -> None:
    Store("cpu").put({problem: Measurement(times, left_out or {})})
    dispatch.forget()


def at(tokens: int) -> Problem:
    return replace(PROBLEM, tokens=tokens)
