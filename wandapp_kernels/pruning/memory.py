"""Peak memory of a stretch of work: device memory on CUDA, resident memory of the process elsewhere."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """``lap()`` returns the peak bytes since the last lap and starts the next one.

    On Linux the kernel's high-water mark is reset at every lap; where that is not possible the process's all-time peak
    is returned, which never falls.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.lap()

    def lap(self) -> int:
        if self._device.type == "cuda":
            torch.cuda.init()  # before, torch takes "cuda" only, and no device with a number
            peak = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return peak
        peak = _resident_peak()
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        return peak


def _resident_peak() -> int:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
