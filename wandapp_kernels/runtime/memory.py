"""Memory of this process, as the operating system counts it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Bytes of physical memory this process holds now; where Linux's counter is missing, the most it ever held."""
    return _counter("VmRSS") or _all_time_peak()


def peak_bytes() -> int:
    """The most bytes this process held since :func:`reset_peak`, or since it started where that is not possible."""
    return _counter("VmHWM") or _all_time_peak()


def reset_peak() -> None:
    """Let :func:`peak_bytes` start again from what is held now (Linux only, else without effect)."""
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
