"""What is measured, most interesting first: time may run out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from wandapp_kernels.backends import (
    BACKENDS,
    DENSE,
    DENSE_OPERATOR,
    UNSTRUCTURED,
    Backend,
    DecompressBackend,
    Problem,
)
from wandapp_kernels.backends import load_backends as _load

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)

# name, [out, in]
SHAPES = (
    ("LLaMA-3-8B gate/up", (14336, 4096)),
    ("LLaMA-3-8B down", (4096, 14336)),
    ("LLaMA q/k/v/o", (4096, 4096)),
    ("LLaMA-7B gate/up", (11008, 4096)),
    ("LLaMA-7B down", (4096, 11008)),
    ("LLaMA-3-70B gate/up", (28672, 8192)),
    ("LLaMA-3-70B down", (8192, 28672)),
    ("LLaMA-3-70B q/o", (8192, 8192)),
    ("LLaMA-3-8B k/v", (1024, 4096)),
)
PATTERNS = (("2:4", 50), (UNSTRUCTURED, 50), (UNSTRUCTURED, 40), (UNSTRUCTURED, 30))
DTYPE = torch.bfloat16

# Their supports() leaves few tokens out since they lose there; here it is measured that they do. Each number of tokens
# costs a search, so they are not measured at all of them.
VENDOR = ("cusparselt-nm", "cutlass-nm")
VENDOR_TOKENS = (1, 16, 64, 128, 512, 2048, 4096)
LEAST_VENDOR_TOKENS = 64

# Layouts that are decompressed where no kernel takes so many tokens; for fewer nobody would.
DECOMPRESSED = ("nm-mma", "bitmap-mma")
DECOMPRESS_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """One weight: shape, pattern and per cent kept."""

    name: str
    shape: tuple[int, int]
    pattern: str
    density: int

    def __str__(self) -> str:
        return f"{self.name} {self.shape[0]}x{self.shape[1]} {self.pattern} {self.density}%"


def weights() -> list[Case]:
    """Every shape at 2:4 and at 50 % first, then the sparser ones."""
    return [Case(name, shape, pattern, density) for pattern, density in PATTERNS for name, shape in SHAPES]


def problem(case: Case, tokens: int, dtype: torch.dtype = DTYPE) -> Problem:
    """The dispatch problem of a case on the current GPU."""
    operator = "bitmap_linear" if case.pattern == UNSTRUCTURED else "nm_linear"
    if case.pattern == DENSE:
        operator = DENSE_OPERATOR
    rows, columns = case.shape
    return Problem(operator, tokens, rows, columns, case.pattern, case.density, dtype, "cuda:0", 0)


def gpu_backends(operator: str) -> list[Backend]:
    """Backends with a layout of their own for ``operator``, those for CPUs left out."""
    from wandapp_kernels.ops.layouts import LAYOUTS

    _load()
    every = [*BACKENDS.values(), *(DecompressBackend(layout) for layout in DECOMPRESSED if layout in LAYOUTS)]
    return [
        backend
        for backend in every
        if backend.layout in LAYOUTS and LAYOUTS[backend.layout].operator == operator and not _is_cpu(backend)
    ]


def _is_cpu(backend: Backend) -> bool:
    return backend.name.partition("-")[0] in ("cpu", "reference")


def refusal(backend: Backend, asked: Problem) -> str | None:
    """Why ``backend`` is not measured on the problem; few tokens are no reason for the vendor's libraries."""
    if isinstance(backend, DecompressBackend) and asked.tokens < DECOMPRESS_TOKENS:
        return f"decompressing is not worth trying below {DECOMPRESS_TOKENS} tokens"
    if backend.name in VENDOR:
        if asked.tokens not in VENDOR_TOKENS:
            return f"it is measured at {VENDOR_TOKENS} tokens only"
        asked = replace(asked, tokens=max(asked.tokens, LEAST_VENDOR_TOKENS))
    return backend.supports(asked)


def refused_always(backend: Backend, case: Case, tokens: Sequence[int], dtype: torch.dtype = DTYPE) -> str | None:
    """Why ``backend`` is measured with none of these numbers of tokens; None if it is with one."""
    reasons = [refusal(backend, problem(case, count, dtype)) for count in tokens]
    return None if None in reasons else reasons[0]
