"""The layout ``"bitmap-mma"``: an unstructured weight in panels of 16 rows × 128 columns, as tensor cores take them.

Order of the 2048 positions of a panel (csrc/cuda/bitmap_panel.cuh): half (64 columns), q = 0…7, lane = 4g + t, r, e::

    row = g + 8r        column = 64·half + 32·(q // 4) + 8t + 2·(q % 4) + e

Three tensors: ``values`` (each panel's kept weights in that order, filled up with zeros to 16 bytes), ``bitmap`` (int32
``[panels, 32 lanes, 2 halves]``, bit 4q + 2r + e) and ``offsets`` (int32 ``[panels + 1]``, where its values start,
in units of 16 bytes). Bytes at 16 bit and density d: 2·d + 1/8 a weight, and about 11 bytes a panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from wandapp_kernels.errors import SparsityError
from wandapp_kernels.ops.layouts import CompressedWeight, Layout, register_layout
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.packing import as_bits, row_chunks, true_places
from wandapp_kernels.sparsity.pattern import Pattern

SLAB_ROWS = 16
PANEL_COLUMNS = 128
PANEL = SLAB_ROWS * PANEL_COLUMNS
ALIGNMENT = 8  # values in 16 bytes
DTYPES = (torch.float16, torch.bfloat16)


def panel_counts(shape: tuple[int, int]) -> tuple[int, int]:
    """``(slabs, panels of a slab)`` of a dense shape ``(R, C)``."""
    return -(-shape[0] // SLAB_ROWS), -(-shape[1] // PANEL_COLUMNS)


def to_panels(dense: torch.Tensor) -> torch.Tensor:
    """``[R, C]`` → ``[panels, 2048]`` in panel order; what is outside the weight is zero."""
    slabs, panels = panel_counts((dense.shape[0], dense.shape[1]))
    missing = (0, panels * PANEL_COLUMNS - dense.shape[1], 0, slabs * SLAB_ROWS - dense.shape[0])
    tiles = torch.nn.functional.pad(dense, missing).view(slabs, 2, 8, panels, 2, 2, 4, 4, 2)
    # (slab, r, g, panel, half, q // 4, t, q % 4, e) → (slab, panel, half, q // 4, q % 4, g, t, r, e)
    return tiles.permute(0, 3, 4, 5, 7, 2, 6, 1, 8).reshape(slabs * panels, PANEL)


def from_panels(ordered: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of :func:`to_panels`: ``[R, C]``, contiguous."""
    slabs, panels = panel_counts(shape)
    tiles = ordered.view(slabs, panels, 2, 2, 4, 8, 4, 2, 2).permute(0, 7, 5, 1, 2, 3, 6, 4, 8)
    dense = tiles.reshape(slabs * SLAB_ROWS, panels * PANEL_COLUMNS)
    return dense[: shape[0], : shape[1]].contiguous()


def _words(kept: torch.Tensor) -> torch.Tensor:
    """bool ``[panels, 2048]`` → int32 ``[panels, 32, 2]``."""
    nibbles = kept.view(-1, 2, 8, 32, 4).permute(0, 3, 1, 2, 4).reshape(-1, 32, 2, 32)
    words = torch.zeros(nibbles.shape[:3], dtype=torch.int32, device=kept.device)
    for bit in range(32):
        words |= nibbles[..., bit].int() << bit
    return words


def _kept(words: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_words`."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    nibbles = ((words.view(-1, 32, 2, 1) >> bits) & 1).bool().view(-1, 32, 2, 8, 4)
    return nibbles.permute(0, 2, 3, 1, 4).reshape(-1, PANEL)


class BitmapMmaLayout(Layout):
    """Bitmap and values in the fragment order of ``mma.m16n8k16`` (see the module).

    Each of the three methods runs CUDA kernels on a GPU that can run them, and torch elsewhere: the same bits.
    """

    name = "bitmap-mma"
    operator = "bitmap_linear"

    def supports(self, weight: CompressedWeight) -> str | None:
        if not isinstance(weight, BitmapWeight):
            return f"it holds a BitmapWeight, not a {type(weight).__name__}"
        if weight.values.dtype not in DTYPES:
            return f"it holds 16-bit floating point, not {weight.values.dtype}"
        if weight.shape[0] * weight.shape[1] >= ALIGNMENT << 31:
            return "its offsets have 31 bits, too few for this weight"
        return None

    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        self.require(weight)
        assert isinstance(weight, BitmapWeight)
        # Here, where every weight comes in: kernels follow the offsets, and a launch must not wait to look at them.
        if (last := int(weight.row_offsets[-1])) != len(weight.values):
            raise SparsityError(f"row_offsets ends at {last}, but there are {len(weight.values)} values")
        if (kernels := _kernels(weight.values)) is not None:
            return kernels.pack(weight)
        bits = as_bits(weight.values, "values")
        rows, columns = weight.shape
        words, counts, kept_values = [], [], []
        for start, stop in _slab_chunks(rows, columns):
            mask = weight.mask(start, stop)
            first, last = weight.row_offsets[[start, stop]].tolist()
            dense = torch.zeros(mask.shape, dtype=bits.dtype, device=bits.device).masked_scatter_(
                mask, bits[first:last]
            )
            kept = to_panels(mask)
            words.append(_words(kept))
            counts.append(kept.sum(1))
            kept_values.append(to_panels(dense).view(-1)[true_places(kept)])
        if not words:
            empty = torch.zeros(1, dtype=torch.int32, device=bits.device)
            return [weight.values.clone(), empty[:0].view(0, 32, 2), empty]
        lengths = torch.cat(counts)
        offsets = torch.nn.functional.pad((-(-lengths // ALIGNMENT)).cumsum(0), (1, 0))
        values = torch.zeros(int(offsets[-1]) * ALIGNMENT, dtype=bits.dtype, device=bits.device)
        values[_places(lengths, offsets)] = torch.cat(kept_values)
        return [values.view(weight.values.dtype), torch.cat(words), offsets.int()]

    def unpack(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> BitmapWeight:
        if (kernels := _kernels(tensors[0])) is not None:
            return kernels.unpack(tensors, shape)
        values, words, offsets = tensors
        slabs, panels = panel_counts(shape)
        if words.shape != (slabs * panels, 32, 2) or offsets.shape != (slabs * panels + 1,):
            raise SparsityError(
                f"layout {self.name!r}: a weight of shape {shape} has {slabs * panels} panels, but bitmap is "
                f"{list(words.shape)} and offsets {list(offsets.shape)}"
            )
        return BitmapWeight.compress(*self._dense(values, words, offsets, shape))

    def decompress(
        self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None
    ) -> torch.Tensor:
        """The dense weight ``[R, C]``, +0.0 where nothing is kept."""
        from wandapp_kernels.backends.cuda.bitmap import decompress, why_not

        if why_not(tensors[0].device, tensors[0].dtype) is None:
            return decompress(tensors, shape)
        values, words, offsets = tensors
        return self._dense(values, words, offsets, shape)[0]

    @staticmethod
    def _dense(
        values: torch.Tensor, words: torch.Tensor, offsets: torch.Tensor, shape: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense weight and its mask."""
        kept = _kept(words)
        ordered = torch.zeros(kept.shape, dtype=torch.int16, device=kept.device)
        ordered.masked_scatter_(kept, values.view(torch.int16)[_places(kept.sum(1), offsets.long())])
        return from_panels(ordered, shape).view(values.dtype), from_panels(kept, shape)


def _kernels(values: torch.Tensor) -> ModuleType | None:
    """Packing by kernels, where ``values`` are on a GPU that they can run on."""
    from wandapp_kernels.backends.cuda import bitmap_packing, launcher

    return bitmap_packing if launcher.why_not(values.device, values.dtype) is None else None


def _slab_chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Pieces of whole slabs, so that temporaries stay small."""
    slabs = -(-rows // SLAB_ROWS)
    pieces = row_chunks(slabs, max(columns, 1) * SLAB_ROWS)
    return [(start * SLAB_ROWS, min(stop * SLAB_ROWS, rows)) for start, stop in pieces]


def _places(lengths: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Where the kept values of all panels stand in ``values``, panel after panel."""
    packed_starts = lengths.cumsum(0) - lengths
    shifts = torch.repeat_interleave(offsets[:-1] * ALIGNMENT - packed_starts, lengths)
    return shifts + torch.arange(len(shifts), device=lengths.device)


register_layout(BitmapMmaLayout())
