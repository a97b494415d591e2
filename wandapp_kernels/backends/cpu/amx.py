"""The backends over the AMX kernels, where the processor has AMX; ``WANDAPP_CPU_AMX=0`` leaves them out."""

from __future__ import annotations

import os

import torch

from wandapp_kernels.backends.base import UNLIMITED, Problem
from wandapp_kernels.backends.cpu import compiled
from wandapp_kernels.backends.cpu.backends import CompiledBackend
from wandapp_kernels.errors import UsageError

VARIABLE = "WANDAPP_CPU_AMX"

# Without a measurement. Up to so many tokens the AVX-512 kernels are faster, beyond none is (bench/results/linear).
FEW_TOKENS = 4


class CpuAmx(CompiledBackend):
    """The AMX kernel for what another backend runs, in bf16: weights are expanded into tiles in the cache."""

    variant = "amx"
    default_tokens = UNLIMITED

    def __init__(self, backend: CompiledBackend):
        self.name = f"{backend.name}-amx"
        self.layout = backend.layout
        self._backend = backend

    def supports(self, problem: Problem) -> str | None:
        reason = self._backend.supports(problem)
        if reason is None and problem.dtype != torch.bfloat16:
            return f"the tiles of AMX take bf16, not {problem.dtype}"
        return reason

    def is_default(self, problem: Problem) -> bool:
        return FEW_TOKENS < problem.tokens <= self.default_tokens


def is_wanted() -> bool:
    """Whether the environment leaves the AMX kernels in.

    ``WANDAPP_CPU_AMX=0`` does not, and neither does ``WANDAPP_CPU_VARIANT``: who names a variant gets exactly that.

    Raises:
        UsageError: ``WANDAPP_CPU_AMX`` is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise UsageError(f"{VARIABLE} is {value!r}, but must be 0 (no AMX kernels) or 1 (where the processor has AMX)")
    return value == "1" and not os.environ.get(compiled.VARIABLE)


def with_amx(backend: CompiledBackend) -> list[CompiledBackend]:
    """The backend, and before it the one of the AMX kernel for its layout, where there is one and it is wanted.

    Before it, since the first that is meant for a problem runs it: the AMX one leaves few tokens and other types to it.

    Raises:
        UsageError: ``WANDAPP_CPU_AMX`` is neither 0 nor 1.
    """
    # Asked last: with the question the process requests the system's permission to use tiles.
    if is_wanted() and compiled.has_amx_kernel(backend.layout):
        return [CpuAmx(backend), backend]
    return [backend]
