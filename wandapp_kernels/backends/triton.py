"""Triton: sparse linears straight from the canonical layouts, on every GPU that Triton serves.

Two kernels for each layout: one for few tokens, which reads every weight once and multiplies on CUDA cores, and one
that expands tiles for the tensor cores. Which is faster where, and whether either beats decompressing, is measured.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from wandapp_kernels.backends.base import Backend, Problem, register_backend
from wandapp_kernels.kernels import launch
from wandapp_kernels.sparsity.pattern import Pattern

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW_TOKENS = 16


class _TritonBackend(Backend):
    """What both layouts share.

    Args:
        few: the kernel for at most ``FEW_TOKENS`` tokens; the other one takes any number.
    """

    def __init__(self, few: bool):
        self._few = few
        self.name = f"triton-{self.layout}" if few else f"triton-{self.layout}-dot"
        self.default_tokens = FEW_TOKENS if few else 0

    def supports(self, problem: Problem) -> str | None:
        if problem.dtype not in DTYPES:
            return f"the kernels are for float32, float16 and bfloat16, not {problem.dtype}"
        if self._few and problem.tokens > FEW_TOKENS:
            return f"this kernel is for at most {FEW_TOKENS} tokens"
        return launch.why_not(torch.device(problem.device))

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        weight = [tensor.contiguous() for tensor in tensors]
        return self._launch(x.contiguous(), weight, None if bias is None else bias.contiguous(), shape[0])

    @abstractmethod
    def _launch(
        self, x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, rows: int
    ) -> torch.Tensor:
        """``x [M, K] → [M, rows]``; everything contiguous."""


class TritonNM(_TritonBackend):
    """2:4 weights."""

    layout = "nm"

    def supports(self, problem: Problem) -> str | None:
        if problem.pattern != "2:4":
            return f"the kernels are for 2:4, not {problem.pattern}"
        return super().supports(problem)

    def _launch(
        self, x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, rows: int
    ) -> torch.Tensor:
        from wandapp_kernels.kernels.nm_linear import nm_linear

        values, indices = weight
        return nm_linear(x, values, indices, bias, rows, few=self._few)


class TritonBitmap(_TritonBackend):
    """Unstructured weights."""

    layout = "bitmap"

    def _launch(
        self, x: torch.Tensor, weight: list[torch.Tensor], bias: torch.Tensor | None, rows: int
    ) -> torch.Tensor:
        from wandapp_kernels.kernels.bitmap_linear import bitmap_linear

        values, bitmap, row_offsets = weight
        return bitmap_linear(x, values, bitmap, row_offsets, bias, rows, few=self._few)


for _few in (True, False):
    register_backend(TritonNM(_few))
    register_backend(TritonBitmap(_few))
