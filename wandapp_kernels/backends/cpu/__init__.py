"""C++ kernels for the CPU: plain, AVX2, AVX-512; the best that the processor runs, asked when this is imported.

Where the processor has AMX, its kernels are there too; ``WANDAPP_CPU_AMX=0`` leaves them out. ``WANDAPP_CPU_VARIANT``
(``plain``, ``avx2``, ``avx512``, ``avx512_bf16``, ``avx512_vbmi2``) forces one variant, without AMX.
"""

from __future__ import annotations

import warnings

try:
    from wandapp_kernels.backends.cpu import compiled
except ImportError as error:
    warnings.warn(
        f"the compiled CPU kernels are missing ({error}), so sparse layers run slowly: install a C++17 compiler and "
        "install wandapp_kernels again",
        RuntimeWarning,
        stacklevel=2,
    )
    raise

from wandapp_kernels.backends.base import register_backend
from wandapp_kernels.backends.cpu.amx import with_amx
from wandapp_kernels.backends.cpu.backends import CompiledBackend, CpuDense, CpuLinear, CpuStrips, CpuWindows
from wandapp_kernels.backends.cpu.pairs import PairsLayout
from wandapp_kernels.backends.cpu.windows import WindowsLayout
from wandapp_kernels.ops.layouts import register_layout

register_layout(PairsLayout())
register_layout(WindowsLayout())
NM_LAYOUT = "nm_pairs" if compiled.has_kernel("nm_pairs") and not compiled.has_kernel("nm") else "nm"

DENSE = CpuDense()
NM = CpuLinear("cpu-nm", "nm_linear", NM_LAYOUT)
BITMAP = CpuLinear("cpu-bitmap", "bitmap_linear", "bitmap")
WINDOWS = CpuWindows("cpu-windows", "bitmap_linear", "bitmap_windows")

# Without a measurement the first is taken: windows where they were measured to win (bench/results/linear), else the
# canonical weight, which is smaller and which AMX reads.
_unstructured = [BITMAP, WINDOWS] if compiled.has_kernel("bitmap_windows") else [BITMAP]
if compiled.variant() == "avx2":
    _unstructured.reverse()


def register(kernel: CompiledBackend) -> None:
    """Register a kernel and what else reads its layout, in the order of preference: AMX, the kernel, strips."""
    for backend in with_amx(kernel):
        register_backend(backend)
    if isinstance(kernel, CpuLinear):
        register_backend(CpuStrips(kernel))


for _kernel in (NM, *_unstructured, DENSE):
    register(_kernel)

__all__ = [
    "BITMAP",
    "DENSE",
    "NM",
    "NM_LAYOUT",
    "WINDOWS",
    "CpuDense",
    "CpuLinear",
    "CpuStrips",
    "CpuWindows",
    "PairsLayout",
    "WindowsLayout",
    "compiled",
    "register",
]
