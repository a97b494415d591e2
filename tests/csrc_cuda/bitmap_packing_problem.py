"""Unstructured weights for the packing kernels: what torch packs, and the launches that are to give the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from bitmap_problem import bits
from emulator import Emulator, Launch

from wandapp_kernels.backends.cuda.bitmap_layout import PANEL_COLUMNS, SLAB_ROWS, BitmapMmaLayout, panel_counts
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.packing import pack_fields

WARPS = 2  # of a CTA: several CTAs at small shapes, the last one not full
SHAPES = [(1, 1), (1, 8), (7, 63), (16, 128), (17, 129), (15, 65), (33, 260), (20, 391), (48, 512)]
FILL = 0x5A5A  # what stands in a tensor before a kernel writes it


def random_bits(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 16, count, dtype=np.uint16)


class PackingProblem:
    """A weight, canonical and as torch packs it, with values of any 16 bits."""

    def __init__(
        self,
        rows: int,
        columns: int,
        density: float,
        empty: Sequence[int] = (),
        full: Sequence[int] = (),
        order: int = 0,
        weight: BitmapWeight | None = None,
    ):
        if weight is None:
            generator = torch.Generator().manual_seed(rows * 7919 + columns)
            mask = torch.rand(rows, columns, generator=generator) < density
            mask[list(empty)], mask[list(full)] = False, True
            kept = random_bits(int(mask.sum()), rows + columns)
            offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
            values = torch.from_numpy(kept.view(np.int16)).view(torch.bfloat16)
            weight = BitmapWeight(values, pack_fields(mask, 1), offsets, (rows, columns))
        self.weight, self.order = weight, order
        self.tensors = BitmapMmaLayout().pack(weight)
        self.bitmap = weight.bitmap.numpy().copy()
        self.words, self.offsets = self.tensors[1].numpy().copy(), self.tensors[2].numpy().copy()
        self.segments = self._segments()
        self.starts = np.concatenate([[0], self.segments.reshape(-1).cumsum()]).astype(np.int64)

    def _segments(self) -> np.ndarray:
        panels = panel_counts(self.weight.shape)[1]
        mask = torch.nn.functional.pad(self.weight.mask(), (0, -self.weight.shape[1] % PANEL_COLUMNS))
        return mask.view(self.weight.shape[0], panels, PANEL_COLUMNS).sum(2).int().numpy()

    def _counts(self) -> np.ndarray:
        slabs, panels = panel_counts(self.weight.shape)
        padded = np.pad(self.segments, ((0, -self.segments.shape[0] % SLAB_ROWS), (0, 0)))
        return padded.reshape(slabs, SLAB_ROWS, panels).sum(1).reshape(-1).astype(np.int32)

    def expected_words(self) -> list[np.ndarray]:
        """Words, counts of the panels, counts of the segments."""
        return [self.words, self._counts(), self.segments]

    def expected_bitmap(self) -> list[np.ndarray]:
        return [self.weight.bitmap.numpy(), self._counts(), self.segments]

    def launch(self, name: str, *arguments: np.ndarray) -> Launch:
        slabs, panels = panel_counts(self.weight.shape)
        grid = (-(-slabs * panels // WARPS), 1, 1)
        return Launch(name, grid, 32 * WARPS, 0, [*arguments, *self.weight.shape], self.order)

    def _filled(self, *like: np.ndarray) -> list[np.ndarray]:
        return [np.full_like(array, FILL & 0x7F) for array in like]

    def packed_words(self, emulator: Emulator, name: str = "bitmap_pack_words") -> list[np.ndarray]:
        made = self._filled(*self.expected_words())
        return emulator.run(self.launch(name, self.bitmap, *made))[1:]

    def unpacked_words(
        self, emulator: Emulator, words: np.ndarray | None = None, name: str = "bitmap_unpack_words"
    ) -> list[np.ndarray]:
        made = self._filled(*self.expected_bitmap())
        return emulator.run(self.launch(name, self.words if words is None else words, *made))[1:]

    def packed_values(
        self, emulator: Emulator, values: np.ndarray | None = None, name: str = "bitmap_pack_values"
    ) -> np.ndarray:
        values = bits(self.weight.values) if values is None else values
        made = np.full(int(self.offsets[-1]) * 8, FILL, np.uint16)
        return emulator.run(self.launch(name, self.bitmap, self.starts, self.offsets, values, made))[-1]

    def unpacked_values(
        self, emulator: Emulator, packed: np.ndarray | None = None, name: str = "bitmap_unpack_values"
    ) -> np.ndarray:
        packed = bits(self.tensors[0]) if packed is None else packed
        made = np.full(int(self.starts[-1]), FILL, np.uint16)
        return emulator.run(self.launch(name, self.bitmap, self.starts, self.offsets, packed, made))[-1]
