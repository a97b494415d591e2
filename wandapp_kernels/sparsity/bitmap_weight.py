"""A weight compressed by any mask: one bit for every column, and the kept values row after row.

One row (``·`` is removed), its values, and its bitmap, column j at bit ``j % 8`` of byte ``j // 8``::

    weight   a · · b · · · · | · c          values  a b c          bitmap  0x09 0x02

Bytes at 16 bit and density d: ``R·C·(2·d + 1/8) + 8·(R + 1)``: 9/16 of the dense weight at 50 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wandapp_kernels.errors import SparsityError
from wandapp_kernels.sparsity.checks import cast_values, check_shape, check_tensor, check_weight
from wandapp_kernels.sparsity.packing import (
    as_bits,
    check_finite,
    non_zero,
    pack_fields,
    packed_bytes,
    row_chunks,
    storage_of,
    true_places,
    unpack_fields,
)


@dataclass(frozen=True, eq=False)
class BitmapWeight:
    """A weight ``[R, C]`` of which any entries are kept.

    Attributes:
        values: ``[nnz]``, a type of ``packing.STORAGE``, row after row, columns ascending.
        bitmap: uint8 ``[R, ceil(C / 8)]``, little-endian: column j is bit ``j % 8`` of byte ``j // 8``.
        row_offsets: int64 ``[R + 1]``; row r owns ``values[row_offsets[r] : row_offsets[r + 1]]``.
        shape: ``(R, C)`` of the dense weight.
    """

    values: torch.Tensor
    bitmap: torch.Tensor
    row_offsets: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def compress(cls, weight: torch.Tensor, mask: torch.Tensor | None = None) -> BitmapWeight:
        """Compress ``weight [R, C]``; ``decompress()`` gives ``where(mask, weight, 0)`` back, bit for bit.

        Args:
            weight: finite, of a type in ``packing.STORAGE``, on any device.
            mask: bool ``[R, C]``, True = kept. Without one the non-zeros are kept, and -0.0 counts as zero.

        Raises:
            SparsityError: a wrong shape or type.
            NonFiniteError: a weight is NaN or infinite, kept or not.
        """
        storage = check_weight(weight, mask)
        rows, columns = weight.shape
        bitmap = torch.empty((rows, packed_bytes(columns, 1)), dtype=torch.uint8, device=weight.device)
        pieces = [torch.empty(0, dtype=storage.bits, device=weight.device)]
        row_offsets = torch.zeros(rows + 1, dtype=torch.int64, device=weight.device)
        for start, stop in row_chunks(rows, columns):
            chunk = as_bits(weight[start:stop])
            check_finite(chunk, storage, "weight", start)
            keep = non_zero(chunk, storage) if mask is None else mask[start:stop]
            bitmap[start:stop] = pack_fields(keep, 1)
            row_offsets[start + 1 : stop + 1] = keep.sum(1)
            pieces.append(chunk.reshape(-1)[true_places(keep.contiguous())])
        values = torch.cat(pieces).view(weight.dtype)
        return cls(values, bitmap, row_offsets.cumsum(0), (rows, columns))

    def decompress(self) -> torch.Tensor:
        """The dense weight ``[R, C]``, contiguous, with +0.0 where nothing is kept."""
        values = as_bits(self.values, "values")
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        chunks = list(row_chunks(*self.shape))
        bounds = self.row_offsets[[start for start, _ in chunks] + [self.shape[0]]].tolist() if chunks else [0]
        for (start, stop), first, last in zip(chunks, bounds, bounds[1:], strict=False):
            places = true_places(self.mask(start, stop).contiguous())
            dense[start:stop].view(-1).scatter_(0, places, values[first:last])
        return dense.view(self.values.dtype)

    def mask(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """bool ``[rows, C]``: True where rows ``start`` to ``stop`` keep a value."""
        return unpack_fields(self.bitmap[start:stop], 1, self.shape[1]).view(torch.bool)

    def validate(self) -> None:
        """Check shapes, types, finite values, that offsets follow the bitmap, and that the bits after column C are 0.

        Raises:
            SparsityError: the tensor, and where there is one the row, are named.
            NonFiniteError: a value is NaN or infinite.
        """
        rows, columns = check_shape(self.shape)
        storage = storage_of(self.values, "values")
        device = self.values.device
        check_tensor(self.row_offsets, "row_offsets", (rows + 1,), torch.int64, device)
        check_tensor(self.bitmap, "bitmap", (rows, packed_bytes(columns, 1)), torch.uint8, device)
        first, last = int(self.row_offsets[0]), int(self.row_offsets[-1])
        if first != 0:
            raise SparsityError(f"row_offsets starts at {first}, but the first row starts at 0")
        check_tensor(self.values, "values", (last,))
        lengths = self.row_offsets.diff()
        if bool((lengths < 0).any()):
            raise SparsityError(f"row_offsets decreases at row {int((lengths < 0).nonzero()[0])}")
        for start, stop in row_chunks(last, 1):
            check_finite(as_bits(self.values[start:stop]), storage, "values", start)
        for start, stop in row_chunks(rows, columns):
            if columns % 8 and bool((tail := self.bitmap[start:stop, -1] >> (columns % 8) != 0).any()):
                row = start + int(tail.nonzero()[0])
                raise SparsityError(f"bitmap: the bits after column {columns} are set in row {row}")
            wrong = self.mask(start, stop).sum(1) != lengths[start:stop]
            if bool(wrong.any()):
                row = start + int(wrong.nonzero()[0])
                raise SparsityError(
                    f"row_offsets gives row {row} {int(lengths[row])} values, but its bitmap has "
                    f"{int(self.mask(row, row + 1).sum())} bits set"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of values, bitmap and offsets."""
        return self.values.nbytes + self.bitmap.nbytes + self.row_offsets.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight in the same type."""
        return self.shape[0] * self.shape[1] * self.values.element_size()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BitmapWeight:
        """The same weight elsewhere or in another type. Raises NonFiniteError if a value overflows that type."""
        values = cast_values(self.values, device, dtype)
        return BitmapWeight(values, self.bitmap.to(device=device), self.row_offsets.to(device=device), self.shape)
