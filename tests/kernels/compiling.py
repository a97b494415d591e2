"""Compile a kernel as a launch would, for a GPU that need not be there, and look at what came out."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class AbsentGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextmanager
def targeting(capability: int, cache: Path) -> Iterator[None]:
    """Kernels are compiled for ``capability`` (90 for sm_90), cached below ``cache``, while the context lasts."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache)
        before = driver._active
        driver.set_active(AbsentGPU(capability))
        try:
            yield
        finally:
            driver._active = before  # reset_active() looks for a GPU


@dataclass(frozen=True)
class Compiled:
    """PTX, the disassembly of the cubin, and registers of a thread."""

    ptx: str
    sass: str
    registers: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.sass))


def compiled(kernel: Any, arguments: dict[str, Any], folder: Path, *, warps: int, fuse: bool = False) -> Compiled:
    """Compile ``kernel`` with the specialisations (alignment, divisibility, ones) that launching it would choose."""
    kernel.device_caches.clear()
    found = kernel.warmup(**arguments, grid=(1,), num_warps=warps, enable_fp_fusion=fuse)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(found.asm["cubin"])

    def tool(name: str, *options: str) -> str:
        command = [str(TOOLS / name), *options, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+)", tool("cuobjdump", "-res-usage"))
    assert usage is not None
    return Compiled(found.asm["ptx"], tool("nvdisasm", "-c"), int(usage[1]))
