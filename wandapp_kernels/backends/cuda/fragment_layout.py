"""Fragment order of a 2:4 weight: the layout the CUDA decode kernel loads straight into tensor-core registers.

W ``[N, K]`` is cut into blocks of 64 rows × 64 columns, row blocks outermost; N and K are padded up with zeros at
positions 0 and 1 of their group (nibble 0x4). With g = lane // 4, t = lane % 4::

    values    [row blocks, column blocks, 2 steps, 4 row tiles, 32 lanes, 8]   step: 32 columns, row tile: 16 rows
              elements 0, 1: row g,     compressed columns 2t, 2t + 1    (of the 16 of the step)
              elements 2, 3: row g + 8, the same;  4, 5 and 6, 7: the same rows, compressed columns 8 + 2t, 9 + 2t
    metadata  [row blocks, column blocks, 32 lanes, 4 row tiles] int32
              bits 0-15: row g, columns 16t to 16t + 15 of the block, one nibble a group;  bits 16-31: row g + 8

That is the A operand and the metadata of ``mma.sp::ordered_metadata.m16n8k32`` (PTX ISA 9.1, section 9.7.14.6.2), whose
sparsity selector is the step. Bytes: 9/16 of the padded dense weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F

from wandapp_kernels.ops.layouts import CompressedWeight, Layout, register_layout
from wandapp_kernels.sparsity.nm_weight import NMWeight, kept_per_row
from wandapp_kernels.sparsity.packing import as_bits, pack_fields, packed_bytes
from wandapp_kernels.sparsity.pattern import Pattern

BLOCK = 64
PATTERN = Pattern.parse("2:4")
DTYPES = (torch.float16, torch.bfloat16)

# Dimensions of the canonical order and their order in memory, for values
# (row block, row tile, half, g, column block, step, quarter, t, element) and for metadata
# (row block, row tile, half, g, column block, t).
_VALUE_ORDER = (0, 4, 5, 1, 3, 7, 6, 2, 8)
_METADATA_ORDER = (0, 4, 3, 5, 1, 2)


def blocks(extent: int) -> int:
    """Blocks that cover ``extent`` rows or columns."""
    return -(-extent // BLOCK)


class FragmentLayout(Layout):
    """``[values, metadata]`` in fragment order (see the module).

    Each of the three methods is one CUDA kernel on a GPU that can run it, and torch elsewhere: the same bits.
    """

    name = "nm-mma"
    operator = "nm_linear"

    def supports(self, weight: CompressedWeight) -> str | None:
        if not isinstance(weight, NMWeight):
            return f"layout {self.name!r} holds an NMWeight, not a {type(weight).__name__}"
        if (weight.pattern.n, weight.pattern.m) != (2, 4):
            return f"layout {self.name!r} is for 2:4, not {weight.pattern}: sparse tensor cores know no other pattern"
        if weight.values.dtype not in DTYPES:
            return f"layout {self.name!r} holds float16 or bfloat16, not {weight.values.dtype}"
        return None

    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        """``[values, metadata]``, contiguous. Raises UsageError when the weight is not 2:4 of 16 bits."""
        self.require(weight)
        assert isinstance(weight, NMWeight)
        if (kernels := _kernels(weight.values)) is not None:
            return kernels.pack(weight)
        rows, columns = weight.shape
        row_blocks, column_blocks = blocks(rows), blocks(columns)
        values = as_bits(weight.values, "values")
        missing = (0, column_blocks * BLOCK // 2 - values.shape[1], 0, row_blocks * BLOCK - rows)
        values = F.pad(values, missing).view(row_blocks, 4, 2, 8, column_blocks, 2, 2, 4, 2).permute(_VALUE_ORDER)
        metadata = _words(weight, row_blocks, column_blocks)
        return [values.contiguous().view(weight.values.dtype).flatten(4, 5).flatten(5), metadata]

    def unpack(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> NMWeight:
        if (kernels := _kernels(tensors[0])) is not None:
            return kernels.unpack(tensors, shape)
        values, metadata = tensors
        rows, columns = shape
        row_blocks, column_blocks = blocks(rows), blocks(columns)
        kept = kept_per_row(columns, PATTERN)
        bits = as_bits(values, "values").view(row_blocks, column_blocks, 2, 4, 8, 4, 2, 2, 2)
        canonical = bits.permute(_inverse(_VALUE_ORDER)).reshape(row_blocks * BLOCK, column_blocks * BLOCK // 2)
        halves = metadata.view(torch.int16).view(row_blocks, column_blocks, 8, 4, 4, 2)
        halves = halves.permute(_inverse(_METADATA_ORDER)).reshape(row_blocks * BLOCK, column_blocks * BLOCK // 16)
        indices = halves.view(torch.uint8)[:rows, : packed_bytes(kept, 2)].clone()
        if kept * 2 % 8:
            indices[:, -1] &= (1 << kept * 2 % 8) - 1
        return NMWeight(canonical[:rows, :kept].contiguous().view(values.dtype), indices, shape, PATTERN)

    def decompress(
        self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None
    ) -> torch.Tensor:
        if (kernels := _kernels(tensors[0])) is not None:
            return kernels.decompress(tensors, shape)
        return super().decompress(tensors, shape, pattern)


def _kernels(values: torch.Tensor) -> ModuleType | None:
    """The same by kernels, where ``values`` are on a GPU that they can run on."""
    from wandapp_kernels.backends.cuda import launcher, nm_packing

    return nm_packing if launcher.why_not(values.device, values.dtype) is None else None


def _words(weight: NMWeight, row_blocks: int, column_blocks: int) -> torch.Tensor:
    """int32 ``[row blocks, column blocks, 32, 4]``: the metadata words."""
    rows, kept = weight.values.shape
    fields = torch.zeros(
        (row_blocks * BLOCK, column_blocks * BLOCK // 2), dtype=torch.uint8, device=weight.values.device
    )
    fields[:, 1::2] = 1
    fields[:rows, :kept] = weight.fields()
    halves = pack_fields(fields, 2).view(torch.int16).view(row_blocks, 4, 2, 8, column_blocks, 4)
    words = halves.permute(_METADATA_ORDER).contiguous().view(torch.int32)
    return words.view(row_blocks, column_blocks, 32, 4)


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


register_layout(FragmentLayout())
