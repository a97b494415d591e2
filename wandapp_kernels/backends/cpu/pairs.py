"""The layout of 2:4 weights for AVX2: two rows interleaved, so that one in-lane permutation serves both.

Values: ``[blocks, chunks, 2 pairs, 2 halves, 8 lanes]``, in bf16 ``[…, 8 lanes, 2 halves]``. A block is 4 rows (pair p:
rows 2p and 2p + 1), a chunk 16 columns (half h: 8 of them), and lane ``4g + 2r + i`` holds the i-th kept value of row
``2p + r`` in group g of the half. Positions: int32 ``[blocks, tiles, 2 pairs, 8 lanes]``, 2 bits for each of the 16
halves of a tile of 128 columns, little-endian. Rows are padded to 4, columns to 16, with zeros at position 3.

Bytes are those of the canonical weight, 9/16 of dense at 16 bit, plus the padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wandapp_kernels.backends.cpu import compiled
from wandapp_kernels.ops.layouts import CompressedWeight, Layout
from wandapp_kernels.sparsity.nm_weight import NMWeight, kept_per_row
from wandapp_kernels.sparsity.packing import as_bits, pack_fields, row_chunks
from wandapp_kernels.sparsity.pattern import Pattern

_ROWS, _CHUNK, _TILE = compiled.PAIRS_ROWS, compiled.PAIRS_CHUNK, compiled.PAIRS_TILE
_KEPT = _CHUNK // 2
_PAD_POSITION = 3


class PairsLayout(Layout):
    """2:4 values and positions in the order of the AVX2 kernel."""

    name = "nm_pairs"
    operator = "nm_linear"

    def supports(self, weight: CompressedWeight) -> str | None:
        if not isinstance(weight, NMWeight) or (weight.pattern.n, weight.pattern.m) != (2, 4):
            return "it holds 2:4 weights only"
        return compiled.unheld(weight.values.dtype)

    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        self.require(weight)
        assert isinstance(weight, NMWeight)
        rows, columns = weight.shape
        blocks, chunks, tiles = _sizes(weight.shape)
        side_by_side = weight.values.dtype == torch.bfloat16
        bits = as_bits(weight.values)
        values = torch.empty((blocks, chunks, 2, 16), dtype=bits.dtype, device=bits.device)
        words = torch.empty((blocks, tiles, 2, 8), dtype=torch.int32, device=bits.device)
        shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=bits.device)
        for start, stop in row_chunks(blocks, _ROWS * columns):
            first, last = start * _ROWS, min(stop * _ROWS, rows)
            more_rows = stop * _ROWS - last
            part = torch.nn.functional.pad(bits[first:last], (0, chunks * _KEPT - bits.shape[1], 0, more_rows))
            lanes = part.view(stop - start, 2, 2, chunks, 2, 2, 2).permute(0, 3, 1, 4, 5, 2, 6).flatten(4)
            values[start:stop] = (lanes.transpose(3, 4) if side_by_side else lanes).flatten(3)
            fields = weight.fields(first, last)
            padding = (0, tiles * 8 * _KEPT - fields.shape[1], 0, more_rows)
            fields = torch.nn.functional.pad(fields, padding, value=_PAD_POSITION).to(torch.int32)
            steps = fields.view(stop - start, 2, 2, tiles, 16, 2, 2).permute(0, 3, 1, 5, 2, 6, 4).flatten(3, 5)
            words[start:stop] = (steps << shifts).sum(-1, dtype=torch.int32)
        shape = (blocks, chunks, 2, 8, 2) if side_by_side else (blocks, chunks, 2, 16)
        return [values.view(weight.values.dtype).view(shape), words]

    def unpack(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> NMWeight:
        values, words = tensors
        rows, columns = shape
        blocks, chunks, tiles = _sizes(shape)
        kept = kept_per_row(columns, compiled.TWO_FOUR)
        bits = as_bits(values)
        lanes = bits.transpose(3, 4) if bits.dim() == 5 else bits.unflatten(3, (2, 8))
        rowwise = lanes.reshape(blocks, chunks, 2, 2, 2, 2, 2).permute(0, 2, 5, 1, 3, 4, 6)
        flat = rowwise.reshape(blocks * _ROWS, chunks * _KEPT)[:rows, :kept].contiguous()
        indices = []
        shifts = torch.arange(0, 32, 2, dtype=torch.int32, device=words.device)
        for start, stop in row_chunks(blocks, _ROWS * columns):
            steps = (words[start:stop].unsqueeze(-1) >> shifts & 3).to(torch.uint8).unflatten(3, (2, 2, 2))
            fields = steps.permute(0, 2, 4, 1, 6, 3, 5).reshape((stop - start) * _ROWS, tiles * 8 * _KEPT)
            indices.append(pack_fields(fields[: rows - start * _ROWS, :kept], 2))
        return NMWeight(flat.view(values.dtype), torch.cat(indices), shape, compiled.TWO_FOUR)

    def decompress(
        self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None
    ) -> torch.Tensor:
        if tensors[0].device.type != "cpu" or (tensors[0].dtype == torch.bfloat16) != (tensors[0].dim() == 5):
            return super().decompress(tensors, shape, pattern)
        return compiled.decompress(self.name, tensors, shape)


def _sizes(shape: tuple[int, int]) -> tuple[int, int, int]:
    """Blocks, chunks and tiles of a weight."""
    rows, columns = shape
    return -(-rows // _ROWS), -(-columns // _CHUNK), -(-columns // _TILE)
