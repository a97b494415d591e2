"""Sparse inference toolkit for language models: prune with regional gradients, and measure what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wandapp_kernels.integrations.after_import import after_import

if TYPE_CHECKING:
    from wandapp_kernels.api import SparseLinear, desparsify, evaluate, load, prune, save, sparsify, swiglu

__version__ = "0.1.0"

__all__ = ["SparseLinear", "__version__", "desparsify", "evaluate", "load", "prune", "save", "sparsify", "swiglu"]


def __getattr__(name: str) -> Any:
    # Importing one module must not import transformers: that takes seconds, and every child process would pay it.
    if name in __all__:
        from wandapp_kernels import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_hf() -> None:
    from wandapp_kernels.integrations import hf

    hf.register()


# Without it transformers loads a compressed folder with random weights and only warns.
after_import("transformers.quantizers.auto", _register_hf)
