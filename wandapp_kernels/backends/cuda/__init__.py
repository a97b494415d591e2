"""CUDA kernels for NVIDIA GPUs, launched through CuPy. Importing this needs neither; running does."""

from __future__ import annotations

from wandapp_kernels.backends.base import register_backend
from wandapp_kernels.backends.cuda.bitmap import CudaBitmapBackend, bitmap_decode
from wandapp_kernels.backends.cuda.nm import CudaNMBackend, nm_decode, nm_gemm, nm_swiglu, nm_swiglu_refusal

register_backend(CudaNMBackend())
register_backend(CudaBitmapBackend())

__all__ = [
    "CudaBitmapBackend",
    "CudaNMBackend",
    "bitmap_decode",
    "nm_decode",
    "nm_gemm",
    "nm_swiglu",
    "nm_swiglu_refusal",
]
