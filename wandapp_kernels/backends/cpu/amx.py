"""The backends over the AMX kernels, where there are any and ``WANDAPP_CPU_AMX=1`` asks for them.

Asked for, because they have never run on hardware: what a fault in them would end is the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from wandapp_kernels.backends.base import Problem
from wandapp_kernels.backends.cpu import compiled
from wandapp_kernels.backends.cpu.backends import CompiledBackend


class CpuAmx(CompiledBackend):
    """The AMX kernel for what another backend runs, in bf16: weights are expanded into tiles in the cache."""

    variant = "amx"
    # Its code has only been run through emulation: without a measurement nobody knows whether, and where, it is faster.
    default_tokens = 0

    def __init__(self, backend: CompiledBackend):
        self.name = f"{backend.name}-amx"
        self.layout = backend.layout
        self._backend = backend

    def supports(self, problem: Problem) -> str | None:
        reason = self._backend.supports(problem)
        if reason is None and problem.dtype != torch.bfloat16:
            return f"the tiles of AMX take bf16, not {problem.dtype}"
        return reason


VARIABLE = "WANDAPP_CPU_AMX"


def amx_backends(backends: Iterable[CompiledBackend]) -> list[CpuAmx]:
    """One for each backend whose layout an AMX kernel of this machine reads; none unless they are asked for."""
    if os.environ.get(VARIABLE) != "1":
        return []
    return [CpuAmx(backend) for backend in backends if compiled.has_amx_kernel(backend.layout)]
