"""Sparse inference toolkit for language models: prune with regional gradients, and measure what it cost."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from wandapp_kernels.integrations.after_import import after_import

if TYPE_CHECKING:
    from wandapp_kernels.api import (
        SparseLinear,
        desparsify,
        evaluate,
        finetune,
        load,
        prune,
        save,
        sparsify,
        swiglu,
        zero_shot,
    )

__version__ = "0.1.0"

__all__ = [
    "SparseLinear",
    "__version__",
    "desparsify",
    "evaluate",
    "finetune",
    "load",
    "prune",
    "save",
    "sparsify",
    "swiglu",
    "zero_shot",
]


# Whether this process was forked after the import of the package. The compiled kernels watch for forks themselves, but
# only once they are loaded, and a child that loads them first must know that its parent's OpenMP threads are gone.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


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
