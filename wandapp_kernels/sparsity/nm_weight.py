"""A weight compressed by an n:m pattern: the kept values and, for each, its position inside its group.

One row of a 2:4 weight (``·`` is removed), its values, and its indices, two bits each, packed little-endian::

    weight    a · · b | · c d · | · · · e          values   a b c d 0 e
    group        0    |    1    |    2             indices  0 3 1 2 0 3   bytes 0x9C 0x0C

Bytes at 16 bit: ``R · (2 · C/2 + 2 · C/2 / 8)``, 9/16 of the dense weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

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
    unpack_fields,
)
from wandapp_kernels.sparsity.pattern import Pattern

_TOO_MANY = 0xFF


def index_bits(pattern: Pattern) -> int:
    """Bits of one index: 1 for m = 2, 2 for m ≤ 4, 4 for m ≤ 16. A field never crosses a byte."""
    return 1 if pattern.m <= 2 else 2 if pattern.m <= 4 else 4


def kept_per_row(columns: int, pattern: Pattern) -> int:
    """Values stored for a row: n of every full group of m, ``min(t, n)`` of a ragged tail of t columns."""
    return columns // pattern.m * pattern.n + min(columns % pattern.m, pattern.n)


@dataclass(frozen=True, eq=False)
class NMWeight:
    """A weight ``[R, C]`` of which n of every m consecutive columns are kept.

    Every group stores exactly n values (its tail ``min(t, n)``) at distinct, ascending positions, also where fewer are
    non-zero: the rest is +0.0 at the lowest free positions. So a 2:4 group has one of the six legal nibbles 0x4, 0x8,
    0xC, 0x9, 0xD, 0xE.

    Attributes:
        values: ``[R, kept_per_row]``, a type of ``packing.STORAGE``.
        indices: uint8 ``[R, ceil(kept_per_row * bits / 8)]``, positions inside the group, ``bits`` bits each,
            little-endian (field i of a row at bit ``i * bits``); each row starts on a byte.
        shape: ``(R, C)`` of the dense weight.
        pattern: n:m.
    """

    values: torch.Tensor
    indices: torch.Tensor
    shape: tuple[int, int]
    pattern: Pattern

    @classmethod
    def compress(
        cls, weight: torch.Tensor, mask: torch.Tensor | None = None, pattern: str | Pattern = "2:4"
    ) -> NMWeight:
        """Compress ``weight [R, C]``; ``decompress()`` gives ``where(mask, weight, 0)`` back, bit for bit.

        Args:
            weight: finite, of a type in ``packing.STORAGE``, on any device.
            mask: bool ``[R, C]``, True = kept. Without one the non-zeros are kept, and -0.0 counts as zero.
            pattern: n:m.

        Raises:
            SparsityError: the mask, or the weight's non-zeros, keep more than n of a group (row and group are named);
                a wrong shape or type.
            NonFiniteError: a weight is NaN or infinite, kept or not.
        """
        pattern = _nm(pattern)
        storage = check_weight(weight, mask)
        rows, columns = weight.shape
        kept = kept_per_row(columns, pattern)
        bits = index_bits(pattern)
        values = torch.empty((rows, kept), dtype=storage.bits, device=weight.device)
        indices = torch.empty((rows, packed_bytes(kept, bits)), dtype=torch.uint8, device=weight.device)
        base = _first_columns(columns, pattern, weight.device)
        for start, stop in row_chunks(rows, columns):
            chunk = as_bits(weight[start:stop])
            check_finite(chunk, storage, "weight", start)
            keep = non_zero(chunk, storage) if mask is None else mask[start:stop]
            fields = _positions(keep, pattern, start, "weight" if mask is None else "mask")
            indices[start:stop] = pack_fields(fields, bits)
            # As integers, a product with False is 0 whatever the bits were.
            values[start:stop] = (chunk * keep).gather(1, base + fields)
        return cls(values.view(weight.dtype), indices, (rows, columns), pattern)

    def decompress(self) -> torch.Tensor:
        """The dense weight ``[R, C]``, contiguous, with +0.0 where nothing is kept."""
        values = as_bits(self.values, "values")
        dense = torch.zeros(self.shape, dtype=values.dtype, device=values.device)
        for start, stop, columns in self._columns():
            dense[start:stop].scatter_(1, columns, values[start:stop])
        return dense.view(self.values.dtype)

    def mask(self) -> torch.Tensor:
        """bool ``[R, C]``: True at every stored position, the padding of groups with fewer non-zeros included."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.values.device)
        for start, stop, columns in self._columns():
            mask[start:stop].scatter_(1, columns, True)
        return mask

    def fields(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """uint8 ``[rows, kept_per_row]``: the unpacked positions of rows ``start`` to ``stop``."""
        packed = self.indices[start:stop]
        return unpack_fields(packed, index_bits(self.pattern), kept_per_row(self.shape[1], self.pattern))

    def validate(self) -> None:
        """Check shapes, types, finite values, and that indices are in range, ascending, and followed by zero bits.

        Raises:
            SparsityError: the tensor, and where there is one the row, are named.
            NonFiniteError: a value is NaN or infinite.
        """
        _nm(self.pattern)
        rows, columns = check_shape(self.shape)
        kept = kept_per_row(columns, self.pattern)
        bits = index_bits(self.pattern)
        storage = storage_of(self.values, "values")
        check_tensor(self.values, "values", (rows, kept))
        check_tensor(self.indices, "indices", (rows, packed_bytes(kept, bits)), torch.uint8, self.values.device)
        # The largest legal position of each field: the tail is shorter than a group.
        slots = torch.arange(kept, device=self.values.device)
        limits = (columns - slots // self.pattern.n * self.pattern.m).clamp(max=self.pattern.m)
        first_of_group = slots[1:] % self.pattern.n == 0
        used = kept * bits % 8
        for start, stop in row_chunks(rows, columns):
            check_finite(as_bits(self.values[start:stop]), storage, "values", start)
            fields = self.fields(start, stop)
            _refuse(fields >= limits, start, f"indices: a position is outside its group of {self.pattern.m}")
            disorder = (fields[:, 1:] <= fields[:, :-1]) & ~first_of_group
            _refuse(disorder, start, "indices: positions do not ascend inside a group")
            if used:
                _refuse(self.indices[start:stop, -1:] >> used != 0, start, "indices: the bits after the last are set")

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices."""
        return self.values.nbytes + self.indices.nbytes

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight in the same type."""
        return self.shape[0] * self.shape[1] * self.values.element_size()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> NMWeight:
        """The same weight elsewhere or in another type. Raises NonFiniteError if a value overflows that type."""
        values = cast_values(self.values, device, dtype)
        return NMWeight(values, self.indices.to(device=device), self.shape, self.pattern)

    def _columns(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """``(start, stop, int64 [stop - start, kept_per_row])``: the column of every value, some rows at a time."""
        base = _first_columns(self.shape[1], self.pattern, self.values.device)
        for start, stop in row_chunks(*self.shape):
            yield start, stop, base + self.fields(start, stop)


def _nm(pattern: str | Pattern) -> Pattern:
    pattern = Pattern.parse(pattern)
    if not pattern.is_nm:
        raise SparsityError(f"pattern {pattern} is not n:m: use BitmapWeight for unstructured sparsity")
    return pattern


def _first_columns(columns: int, pattern: Pattern, device: torch.device) -> torch.Tensor:
    """int64 ``[kept_per_row]``: the first column of each stored value's group."""
    return torch.arange(kept_per_row(columns, pattern), device=device) // pattern.n * pattern.m


def _positions(keep: torch.Tensor, pattern: Pattern, first_row: int, name: str) -> torch.Tensor:
    """uint8 ``[rows, kept_per_row]``: the stored positions of every group, ascending, free ones added from the lowest.

    Raises SparsityError, naming row and group, when a group of ``keep [rows, C]`` keeps more than the pattern allows.
    """
    n, m = pattern.n, pattern.m
    rows, columns = keep.shape
    full = columns // m * m
    found = []
    for first, last, width in ((0, full, m), (full, columns, columns - full)):
        part = keep[:, first:last]
        if not part.numel():
            continue
        groups = part.unflatten(1, (part.shape[1] // width, width)).view(torch.uint8)
        codes = groups[..., 0].to(torch.uint8 if width <= 8 else torch.int32)
        for lane in range(1, width):
            codes = codes | (groups[..., lane].to(codes.dtype) << lane)
        chosen = _choices(min(n, width), width).to(keep.device).index_select(0, codes.reshape(-1).to(torch.int32))
        if bool((over := chosen[:, 0] == _TOO_MANY).any()):
            row, group = divmod(int(over.nonzero()[0]), codes.shape[1])
            raise SparsityError(
                f"{name} keeps {int(groups[row, group].sum())} of the {width} columns of row {first_row + row}, "
                f"group {first // m + group}: the pattern {pattern} keeps at most {n}"
            )
        found.append(chosen.reshape(rows, -1))
    return torch.cat(found, 1) if found else keep.new_empty((keep.shape[0], 0), dtype=torch.uint8)


@lru_cache(maxsize=64)
def _choices(n: int, width: int) -> torch.Tensor:
    """uint8 ``[2**width, n]``: for every set of kept positions (bit i: position i) the n that are stored, ascending.

    Sets of fewer than n are filled from the lowest free position; those of more than n are ``_TOO_MANY``.
    """
    kept = (torch.arange(2**width).unsqueeze(1) >> torch.arange(width)) & 1
    room = n - kept.sum(1, keepdim=True)
    free = 1 - kept
    stored = kept | (free & (free.cumsum(1) <= room).long())
    order = stored.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return order.masked_fill(room < 0, _TOO_MANY).to(torch.uint8)


def _refuse(bad: torch.Tensor, first_row: int, what: str) -> None:
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0])
        raise SparsityError(f"{what} in row {first_row + row}")
