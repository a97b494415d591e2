"""What a measurement depends on besides the problem: the device and the versions."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

import wandapp_kernels
from wandapp_kernels.backends import load_backends

# Where the size cannot be read: larger than most last-level caches.
_UNKNOWN_CACHE = 64 << 20


def fingerprint(device: str) -> dict[str, str]:
    """Name of the device, and the versions and CPU kernels that decide a time; what has another is not used."""
    found = {"device": _name(device), "wandapp_kernels": wandapp_kernels.__version__, "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    else:
        found["cpu_kernels"] = cpu_kernels() or "none"
    return found


def cpu_kernels() -> str | None:
    """The variant of the compiled CPU kernels in use (``backends.cpu``); None where they are missing."""
    load_backends()
    # Not imported anew: where the compiled module is missing, that would warn again.
    compiled = sys.modules.get("wandapp_kernels.backends.cpu.compiled")
    return None if compiled is None else compiled.variant()


def last_level_cache(device: str) -> int:
    """Bytes of the last-level cache of a CPU, or of a GPU's L2."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
        sizes.append(int(text[:-1]) * scale if scale else int(text or 0))
    return max(sizes, default=_UNKNOWN_CACHE)


def _name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
