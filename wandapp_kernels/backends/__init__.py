"""Who can run an operator. Backends are loaded when first asked for; one that cannot be is a reason, not an error."""

from __future__ import annotations

import importlib

from wandapp_kernels.backends.base import (
    BACKENDS,
    DENSE,
    Backend,
    Call,
    Held,
    UnusableError,
    choices_changed,
    epoch,
    marks_of,
    register_backend,
)
from wandapp_kernels.backends.dense import DecompressBackend, DenseBackend
from wandapp_kernels.backends.problem import DENSE_OPERATOR, Problem, density_bucket, problem_for, token_bucket
from wandapp_kernels.backends.reference import ReferenceBackend
from wandapp_kernels.ops.layouts import LAYOUTS
from wandapp_kernels.sparsity.pattern import UNSTRUCTURED

# Each module registers its layouts and backends when it is imported, in the order they are preferred.
MODULES = ("cpu", "cuda", "cusparselt", "triton")

# Module -> why it could not be loaded.
UNAVAILABLE: dict[str, str] = {}

_loaded = False


def load_backends() -> None:
    """Import every backend module once, which registers its backends; absent ones are entered in ``UNAVAILABLE``."""
    global _loaded
    if _loaded:
        return
    for module in MODULES:
        try:
            importlib.import_module(f"wandapp_kernels.backends.{module}")
        except ImportError as error:
            UNAVAILABLE[module] = f"it cannot be imported: {error}"
    _loaded = True


def backends_of(layout: str) -> list[Backend]:
    """Every backend that reads ``layout``: its own in order of preference, then decompressing, then the reference."""
    load_backends()
    own = [backend for backend in BACKENDS.values() if backend.layout == layout]
    if layout == DENSE:
        return own
    return [*own, DecompressBackend(layout), ReferenceBackend(layout)]


def layouts_of(operator: str) -> list[str]:
    """Every layout of an operator: those with a backend of their own first, in order of preference."""
    load_backends()
    preferred = dict.fromkeys(backend.layout for backend in BACKENDS.values())
    ranked = [name for name in preferred if name in LAYOUTS] + [name for name in LAYOUTS if name not in preferred]
    return [name for name in ranked if LAYOUTS[name].operator == operator]


# Registered before all others: among equals the plain one is taken.
register_backend(DenseBackend())

__all__ = [
    "BACKENDS",
    "DENSE",
    "DENSE_OPERATOR",
    "UNAVAILABLE",
    "UNSTRUCTURED",
    "Backend",
    "Call",
    "DecompressBackend",
    "DenseBackend",
    "Held",
    "Problem",
    "ReferenceBackend",
    "UnusableError",
    "backends_of",
    "choices_changed",
    "density_bucket",
    "epoch",
    "layouts_of",
    "load_backends",
    "marks_of",
    "problem_for",
    "register_backend",
    "token_bucket",
]
