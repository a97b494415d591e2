"""Bits and bytes under the compressed weights: integer views, exact zero and finite tests, fields smaller than a byte.

Every step looks at the bit pattern, not at the number: it is exact, and it works for types (float8) that most torch
operators do not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from wandapp_kernels.errors import NonFiniteError, SparsityError

# Rows are handled in pieces of this many elements: temporaries stay small and no index passes 2^31.
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Storage:
    """How a weight type looks as bits.

    Attributes:
        bits: the integer type of the same width.
        magnitude: the bits that are not the sign; all clear means ±0.
        non_finite: the smallest magnitude that is infinity or NaN, as an integer; None where every code is a number.
    """

    bits: torch.dtype
    magnitude: int
    non_finite: int | None


STORAGE: dict[torch.dtype, Storage] = {
    torch.float64: Storage(torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    torch.float32: Storage(torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.float16: Storage(torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: Storage(torch.int16, 0x7FFF, 0x7F80),
    torch.float8_e5m2: Storage(torch.uint8, 0x7F, 0x7C),
    # e4m3fn has no infinity; NaN is all ones, and 0x78 to 0x7E are numbers.
    torch.float8_e4m3fn: Storage(torch.uint8, 0x7F, 0x7F),
    torch.int8: Storage(torch.uint8, 0xFF, None),
}


def storage_of(tensor: torch.Tensor, name: str) -> Storage:
    """The bits of ``tensor``'s type. Raises SparsityError for a type that cannot be stored."""
    if tensor.dtype not in STORAGE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE)
        raise SparsityError(f"{name} is {tensor.dtype}, which cannot be stored compressed: use one of {known}")
    return STORAGE[tensor.dtype]


def as_bits(tensor: torch.Tensor, name: str = "weight") -> torch.Tensor:
    """``tensor`` seen as integers of the same width; shares memory."""
    return tensor.detach().view(storage_of(tensor, name).bits)


def non_zero(bits: torch.Tensor, storage: Storage) -> torch.Tensor:
    """bool like ``bits``: True where the number is not ±0."""
    return (bits & storage.magnitude) != 0


def check_finite(bits: torch.Tensor, storage: Storage, name: str, first: int = 0) -> None:
    """Raise NonFiniteError, naming the place, when a number of ``bits`` is NaN or infinite.

    Args:
        bits: ``[rows, columns]`` or ``[length]``, part of ``name``.
        storage: how numbers look as bits.
        name: what the message calls the tensor.
        first: the row (or place) of ``bits[0]`` in the whole tensor.
    """
    if storage.non_finite is None or not bits.numel():
        return
    # Read as integers, magnitudes are in the order of the numbers: infinity and NaN come last.
    magnitude = bits & storage.magnitude
    if int(magnitude.amax()) >= storage.non_finite:
        place, *column = (magnitude >= storage.non_finite).nonzero()[0].tolist()
        where = f"row {first + place}, column {column[0]}" if column else f"place {first + place}"
        raise NonFiniteError(f"{name} is NaN or infinite at {where}: only finite weights can be compressed")


def true_places(mask: torch.Tensor) -> torch.Tensor:
    """int64 ``[count]``: where a contiguous bool ``mask`` is True, counted row after row, ascending."""
    if mask.device.type == "cpu":
        # Seven times as fast as torch.nonzero on one thread.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().squeeze(1)


def row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """``(start, stop)`` of consecutive pieces of rows, each of about ``CHUNK_ELEMENTS`` elements, at least one row."""
    step = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def packed_bytes(fields: int, bits: int) -> int:
    """Bytes of a row of ``fields`` fields of ``bits`` bits."""
    return -(-fields * bits // 8)


def pack_fields(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack small numbers, little-endian: field i of a row starts at bit ``i * bits`` of that row.

    Args:
        fields: uint8 or bool ``[rows, F]``, each below ``2**bits``.
        bits: 1, 2, 4 or 8, so that no field crosses a byte.

    Returns:
        uint8 ``[rows, ceil(F * bits / 8)]``; the bits after the last field are zero.
    """
    fields = fields.view(torch.uint8) if fields.dtype == torch.bool else fields
    per_byte = 8 // bits
    if per_byte == 1:
        return fields.clone()
    if padding := -fields.shape[1] % per_byte:
        fields = torch.nn.functional.pad(fields, (0, padding))
    lanes = fields.reshape(fields.shape[0], fields.shape[1] // per_byte, per_byte)
    packed = lanes[..., 0].clone()
    for lane in range(1, per_byte):
        packed |= lanes[..., lane] << (lane * bits)
    return packed


def unpack_fields(packed: torch.Tensor, bits: int, fields: int) -> torch.Tensor:
    """The inverse of :func:`pack_fields`: uint8 ``[rows, fields]``."""
    per_byte = 8 // bits
    lanes = torch.empty((*packed.shape, per_byte), dtype=torch.uint8, device=packed.device)
    for lane in range(per_byte):
        torch.bitwise_and(packed >> (lane * bits), (1 << bits) - 1, out=lanes[..., lane])
    return lanes.reshape(packed.shape[0], packed.shape[1] * per_byte)[:, :fields]
