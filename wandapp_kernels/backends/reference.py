"""The reference: what every other backend is compared with. Slow, exact, works for every layout, type and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wandapp_kernels.backends.base import Backend, Problem
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.ops.running import reference_linear
from wandapp_kernels.sparsity.pattern import Pattern


class ReferenceBackend(Backend):
    """Decompress, multiply in float32 (float64 for float64), round once. Never chosen for speed."""

    default_tokens = 0

    def __init__(self, layout: str):
        self.name = f"reference-{layout}"
        self.layout = layout

    def supports(self, problem: Problem) -> str | None:
        return None

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        return reference_linear(x, get_layout(self.layout).decompress(tensors, shape, pattern), bias)
