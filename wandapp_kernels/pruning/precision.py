"""Matrix products in TF32 on a GPU, except where exactness pays. On a CPU everything stays fp32.

A block's forward and backward tolerate TF32's 10-bit mantissa and run several times faster with it on tensor cores;
sums of squares that a Cholesky factorisation will read (``H = XXᵀ``) do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """TF32 for fp32 products while the context lasts, when ``device`` is a GPU."""
    with _precision("high" if device.type == "cuda" else torch.get_float32_matmul_precision()):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Full fp32 products while the context lasts."""
    with _precision("highest"):
        yield


@contextmanager
def _precision(level: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(level)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
