"""Random unstructured problems for the emulated kernels, and what they must give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from emulator import Launch

from wandapp_kernels.backends.cuda.bitmap import SLOT_BYTES, STAGES, plan_decode
from wandapp_kernels.backends.cuda.bitmap_layout import BitmapMmaLayout, panel_counts
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight

NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16).copy()


def from_bits(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int16).copy()).view(dtype)


@dataclass
class Cut:
    """A launch cut by hand instead of by the plan."""

    slabs_per_cta: int
    warps_per_slab: int
    splits: int


class BitmapProblem:
    """``x [M, K] Wᵀ + bias`` with a random weight that keeps ``density`` of its entries."""

    def __init__(
        self,
        tokens: int,
        rows: int,
        columns: int,
        density: float = 0.5,
        dtype: torch.dtype = torch.bfloat16,
        bias: bool = True,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)
        dense = torch.randn(rows, columns, generator=generator).to(dtype)
        self.weight = BitmapWeight.compress(dense, torch.rand(rows, columns, generator=generator) < density)
        self.tensors = BitmapMmaLayout().pack(self.weight)
        self.x = torch.randn(tokens, columns, generator=generator).to(dtype)
        self.bias = torch.randn(rows, generator=generator).to(dtype) if bias else None

    @property
    def reference(self) -> torch.Tensor:
        out = self.x.double() @ self.weight.decompress().double().T
        return out if self.bias is None else out + self.bias.double()

    def arguments(self) -> list[Any]:
        values, words, offsets = self.tensors
        return [bits(values), words.numpy().copy(), offsets.numpy().copy()]

    def decode(self, cut: Cut | None = None, reversed: bool = False) -> Launch:
        """The launch of the decode kernel; out is argument 6, before the workspace."""
        tokens, (rows, columns) = self.x.shape[0], self.weight.shape
        plan = plan_decode(tokens, (rows, columns), 132, 232448)
        if cut is None:
            cut = Cut(plan.slabs_per_cta, plan.warps_per_slab, plan.splits)
        ctas = -(-panel_counts((rows, columns))[0] // cut.slabs_per_cta)
        x = torch.nn.functional.pad(self.x, (0, -columns % 8))
        warps = cut.slabs_per_cta * cut.warps_per_slab
        split = cut.splits > 1
        partial = np.full(cut.splits * ctas * cut.slabs_per_cta * tokens * 16, np.nan, np.float32)
        return Launch(
            f"bitmap_decode_{NAMES[self.x.dtype]}_{8 * plan.token_tiles}",
            (ctas, cut.splits, 1),
            32 * warps,
            STAGES * SLOT_BYTES * warps,
            [
                *self.arguments(),
                bits(x),
                None if self.bias is None else bits(self.bias),
                np.full((tokens, rows), 0x7FFF, np.uint16),
                partial if split else None,
                np.zeros(ctas, np.uint32) if split else None,
                *(tokens, rows, x.shape[1], cut.warps_per_slab),
            ],
            reversed,
        )

    def out(self, results: list[np.ndarray]) -> torch.Tensor:
        place = 4 if self.bias is None else 5
        return from_bits(results[place], self.x.dtype)

    def decompress(self) -> Launch:
        rows, columns = self.weight.shape
        slabs, panels = panel_counts((rows, columns))
        out = np.full((rows, columns), 0x7FFF, np.uint16)
        grid = (-(-slabs * panels // 2), 1, 1)
        return Launch("bitmap_decompress_16", grid, 64, 2 * SLOT_BYTES, [*self.arguments(), out, rows, columns])
