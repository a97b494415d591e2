"""When Triton can run a kernel, and the device it is launched on."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from contextlib import AbstractContextManager
from functools import lru_cache

import torch

# Triton's code generator for NVIDIA GPUs starts at Ampere.
OLDEST_CAPABILITY = (8, 0)
MISSING = 'triton is not installed: pip install "wandapp_kernels[triton]"'


@lru_cache
def why_not(device: torch.device) -> str | None:
    """None when Triton kernels run on tensors of ``device``, else the reason in one sentence.

    They run on a GPU, and on a CPU under Triton's interpreter (``TRITON_INTERPRET=1``), which is for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return MISSING
    if device.type == "cuda":
        return _cannot_launch() or (None if interpreted() else _too_old(device.index or 0))
    if device.type == "cpu":
        # The variable first: importing Triton takes 90 MB and half a second.
        if os.environ.get("TRITON_INTERPRET", "0") != "0" and interpreted():
            return None
        return "Triton needs a GPU (or TRITON_INTERPRET=1, its slow interpreter for tests)"
    return f"Triton kernels are not tried on {device.type} devices"


@lru_cache
def interpreted() -> bool:
    """True when Triton was imported under ``TRITON_INTERPRET=1``."""
    import triton
    import triton.language as tl

    return not isinstance(tl.sum, triton.runtime.JITFunction)


@lru_cache
def _cannot_launch() -> str | None:
    """Why Triton cannot launch anything on a GPU; it compiles what it launches with by the system's C compiler."""
    try:
        import triton

        if not interpreted():
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # no compiler, no headers, no libcuda, a broken installation, ...
        return (
            f"Triton cannot launch kernels here ({type(error).__name__}: {' '.join(str(error).split())[:200]}): it "
            "needs a C compiler (gcc, or what $CC names) and Python's headers"
        )
    return None


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@lru_cache
def _too_old(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None or capability >= OLDEST_CAPABILITY:
        return None
    major, minor = OLDEST_CAPABILITY
    name = torch.cuda.get_device_name(index)
    return f"Triton needs compute capability {major}.{minor}, but {name} has {capability[0]}.{capability[1]}"
