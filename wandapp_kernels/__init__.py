"""Sparse inference toolkit for language models: prune with regional gradients, and measure what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandapp_kernels.api import SparseLinear, desparsify, evaluate, load, prune, save, sparsify

__version__ = "0.1.0"

__all__ = ["SparseLinear", "__version__", "desparsify", "evaluate", "load", "prune", "save", "sparsify"]


def __getattr__(name: str) -> Any:
    # Importing one module must not import transformers: that takes seconds, and every child process would pay it.
    if name in __all__:
        from wandapp_kernels import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
