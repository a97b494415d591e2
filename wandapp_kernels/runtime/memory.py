"""Memory of this process: as the operating system counts it, or what torch allocated on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

CPU = torch.device("cpu")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes(device: torch.device = CPU) -> int:
    """Bytes of physical memory this process holds now; where Linux's counter is missing, the most it ever held."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _counter("VmRSS") or _all_time_peak()


def peak_bytes(device: torch.device = CPU) -> int:
    """The most bytes this process held since :func:`reset_peak`, or since it started where that is not possible."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _counter("VmHWM") or _all_time_peak()


def reset_peak(device: torch.device = CPU) -> None:
    """Let :func:`peak_bytes` start again from what is held now (on the CPU of Linux only, else without effect)."""
    if device.type == "cuda":
        torch.cuda.init()  # before, torch takes "cuda" only, and no device with a number
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def release_free_memory() -> None:
    """Give pages that nothing uses back to the operating system: glibc keeps them for the next allocation."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _counter(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _all_time_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
