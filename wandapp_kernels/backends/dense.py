"""Dense products: of a weight that stays dense, and of a compressed one that is decompressed for the call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from wandapp_kernels.backends.base import DENSE, UNLIMITED, Backend, Problem
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.sparsity.pattern import Pattern


class DenseBackend(Backend):
    """``torch.nn.functional.linear`` on a dense weight: what every sparse backend must beat."""

    name = "dense"
    layout = DENSE
    default_tokens = UNLIMITED

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
        return functional.linear(x, tensors[0], bias)


class DecompressBackend(Backend):
    """Decompress into a scratch weight, then the dense product: any layout, and a weight of any type.

    It pays when there are many tokens: decompressing costs one pass over the weight, whatever their number.
    """

    default_tokens = 0

    def __init__(self, layout: str):
        self.name = f"decompress-{layout}"
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
        weight = get_layout(self.layout).decompress(tensors, shape, pattern)
        return functional.linear(x, weight.to(x.dtype), bias)
