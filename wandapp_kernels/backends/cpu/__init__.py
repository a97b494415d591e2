"""C++ kernels for the CPU: plain, AVX2, AVX-512; the best that the processor runs, asked when this is imported.

``WANDAPP_CPU_VARIANT`` (``plain``, ``avx2``, ``avx512``, ``avx512_bf16``, ``avx512_vbmi2``) forces one.
``WANDAPP_CPU_AMX=1`` adds the AMX kernels, which have never run on hardware, to what is measured.
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
from wandapp_kernels.backends.cpu.amx import amx_backends
from wandapp_kernels.backends.cpu.backends import CpuDense, CpuLinear, CpuStrips, CpuWindows
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
# canonical weight, which is smaller.
_unstructured = [BITMAP, WINDOWS] if compiled.has_kernel("bitmap_windows") else [BITMAP]
if compiled.variant() == "avx2":
    _unstructured.reverse()

for backend in (NM, *_unstructured):
    register_backend(backend)
    register_backend(CpuStrips(backend))
register_backend(DENSE)
for amx in amx_backends((NM, BITMAP, DENSE)):
    register_backend(amx)

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
]
