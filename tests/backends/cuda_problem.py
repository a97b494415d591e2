"""Weights in the CUDA layouts, and what to forget between fake GPUs."""

from __future__ import annotations

import torch

from wandapp_kernels.backends.cuda import launcher
from wandapp_kernels.backends.cuda.bitmap_layout import BitmapMmaLayout
from wandapp_kernels.backends.cuda.fragment_layout import FragmentLayout
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.nm_weight import NMWeight

CACHED = (
    launcher._kernel,
    launcher._cupy_stream,
    launcher._cupy_missing,
    launcher._not_compiled,
    launcher.multiprocessors,
    launcher.shared_memory,
)


def bitmap_weight(rows=40, columns=264, dtype=torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    return BitmapMmaLayout().pack(BitmapWeight.compress(dense, torch.rand(rows, columns, generator=generator) < 0.5))


def nm_weight(rows=40, columns=264, dtype=torch.bfloat16) -> list[torch.Tensor]:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense.view(rows, -1, 4)[..., 2:] = 0
    return FragmentLayout().pack(NMWeight.compress(dense, pattern="2:4"))


def pointers(*tensors: torch.Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
