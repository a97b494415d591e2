"""The compiled module behind torch tensors: types, addresses, and every check that keeps a kernel inside its memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

import wandapp_kernels
from wandapp_kernels import _cpu  # type: ignore[attr-defined]
from wandapp_kernels.backends.base import choices_changed
from wandapp_kernels.errors import UsageError
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.nm_weight import kept_per_row
from wandapp_kernels.sparsity.pattern import Pattern

VARIABLE = "WANDAPP_CPU_VARIANT"
TWO_FOUR = Pattern.parse("2:4")
_CPU = torch.device("cpu")  # torch parses a string at every call

TYPES = {torch.bfloat16: _cpu.Type.bf16, torch.float16: _cpu.Type.fp16, torch.float32: _cpu.Type.fp32}
FORMATS = {
    "dense": _cpu.Format.dense,
    "nm": _cpu.Format.nm,
    "nm_pairs": _cpu.Format.nm_pairs,
    "bitmap": _cpu.Format.bitmap,
    "bitmap_windows": _cpu.Format.bitmap_windows,
}

# Rows of a block, columns of a chunk and of a tile of the layout nm_pairs (csrc/cpu/avx2_pairs.h).
PAIRS_ROWS, PAIRS_CHUNK, PAIRS_TILE = 4, 16, 128

# Rows of a block, values of a step, bytes of the columns of two steps, and columns of a weight at most of the layout
# bitmap_windows (csrc/cpu/windows.h).
WINDOW_ROWS, WINDOW_SLOTS, WINDOW_META, WINDOW_COLUMNS = 16, 32, 36, 1 << 16


def choose_variant(wanted: str | None = None) -> str:
    """The variant to run: ``wanted``, else that of ``WANDAPP_CPU_VARIANT``, else the best the processor runs.

    Raises:
        UsageError: the processor, or the compiler that built the package, does not have it.
    """
    available = [name for name, _ in _cpu.variants()]
    wanted = wanted or os.environ.get(VARIABLE) or available[0]
    if wanted not in available:
        raise UsageError(f"{VARIABLE} is {wanted!r}, but this machine runs only: {', '.join(available)}")
    return wanted


if wandapp_kernels._forked:
    _cpu.leave_openmp()

_variant_name = choose_variant()
_variant = dict(_cpu.variants())[_variant_name]


def variant() -> str:
    """The name of the variant in use."""
    return _variant_name


def use_variant(name: str | None) -> str:
    """Run this variant from now on (None: as at the start); returns the one used before. For tests and comparisons."""
    global _variant, _variant_name
    before = _variant_name
    _variant_name = choose_variant(name)
    _variant = dict(_cpu.variants())[_variant_name]
    choices_changed()
    return before


def has_kernel(layout: str) -> bool:
    """Whether the variant in use was written for this layout. (The plain one reads all, slowly.)"""
    if _variant_name == "plain":
        return layout not in ("nm_pairs", "bitmap_windows")
    return _cpu.has_kernel(_variant, FORMATS[layout], _cpu.Type.bf16)


def unheld(dtype: torch.dtype) -> str | None:
    """Why the kernels' own layouts do not hold values of this type, or None."""
    return None if dtype in TYPES else f"it holds bf16, fp16 and fp32, not {dtype}"


def has_fast_bf16_gemm() -> bool:
    """Whether dense libraries multiply bf16 natively here (AMX-BF16, AVX512-BF16)."""
    return _cpu.has_fast_bf16_gemm()


def has_amx_kernel(layout: str) -> bool:
    """Whether AMX runs here (the compiler knew it, the processor has it, the system allows it), and for this layout."""
    return _cpu.has_amx() and _cpu.has_kernel(_cpu.Variant.amx, FORMATS[layout], _cpu.Type.bf16)


class Bound:
    """A weight in ``layout`` with its bias, checked once, so that a call only passes addresses.

    It keeps only the copies that it makes of tensors that are not contiguous: the caller keeps the others alive.

    Attributes:
        layout, dtype: of the weight; x must have the type too.
        shape: (N, K).
    """

    __slots__ = ("_copies", "dtype", "layout", "native", "shape")

    def __init__(
        self,
        layout: str,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        dtype: torch.dtype,
        variant: str | None = None,
    ):
        """Raises UsageError unless types and sizes fit together; see the functions below for the arguments.

        ``variant``: whose kernel; None: that of the variant in use.
        """
        values, meta, offsets, kept = addresses(layout, tensors, shape, dtype)
        given = [*tensors, bias]
        if bias is not None:
            if bias.dtype != dtype or bias.shape != (shape[0],) or bias.device.type != "cpu":
                raise UsageError(f"bias is {bias.dtype} {tuple(bias.shape)}, but {dtype} {(shape[0],)} is needed")
            bias = bias.contiguous()
            kept.append(bias)
        self.layout, self.dtype, self.shape = layout, dtype, shape
        self._copies = [tensor for tensor in kept if not any(tensor is one for one in given)]
        address = 0 if bias is None else bias.data_ptr()
        kernels = _variant if variant is None else _cpu.Variant.__members__.get(variant)
        if kernels is None:
            raise UsageError(f"there is no variant {variant!r} (known: {', '.join(_cpu.Variant.__members__)})")
        self.native = _cpu.Bound(kernels, FORMATS[layout], TYPES[dtype], values, meta, offsets, address, *shape)


def multiply(x: torch.Tensor, bound: Sequence[Bound]) -> list[torch.Tensor] | None:
    """``x @ Wᵀ + bias`` for every weight, in one call of the compiled module.

    Args:
        x: ``[..., K]`` on the CPU, contiguous, in the weights' type, with one row or more.
        bound: weights of one layout and type, all with K columns.

    Returns:
        One ``[..., N]`` for each weight; None when x holds NaN or infinity and the layout is sparse, for then removed
        weights matter (0 · NaN is NaN).

    Raises:
        UsageError: x does not fit.
    """
    dtype = bound[0].dtype
    if x.dtype != dtype or not x.is_cpu or not x.is_contiguous() or not x.dim():
        raise UsageError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}, but contiguous {dtype} is needed")
    *leading, columns = x.shape
    for one in bound:
        if one.shape[1] != columns:
            raise UsageError(f"x has {columns} columns, but the weight has in_features = {one.shape[1]}")
    outputs = [torch.empty(*leading, one.shape[0], dtype=dtype, device=_CPU) for one in bound]
    finite = _cpu.linear(
        [one.native for one in bound],
        x.data_ptr(),
        x.numel() // columns,
        [output.data_ptr() for output in outputs],
        torch.get_num_threads(),
    )
    return outputs if finite else None


def linear(
    layout: str,
    x: torch.Tensor,
    matrices: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor | None, tuple[int, int]]],
) -> list[torch.Tensor] | None:
    """`multiply` with weights that are bound for this call.

    Args:
        layout: of all matrices.
        x: ``[M, K]`` of a type in ``TYPES``, M ≥ 1.
        matrices: (tensors, bias, (N, K)) of each; values and bias in x's type.

    Raises:
        UsageError: types, shapes or sizes do not fit together.
    """
    if x.dtype not in TYPES:
        raise UsageError(f"the CPU kernels take x in bf16, fp16 or fp32, not {x.dtype}")
    return multiply(x.contiguous(), [Bound(layout, *matrix, x.dtype) for matrix in matrices])


def decompress(
    layout: str,
    tensors: Sequence[torch.Tensor],
    shape: tuple[int, int],
    first: int = 0,
    last: int | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rows ``first`` to ``last`` of the dense weight, bit for bit; ``dtype`` may be float32, which widens exactly."""
    own = tensors[0].dtype
    dtype = dtype or own
    if own not in TYPES or dtype not in (own, torch.float32):
        raise UsageError(f"the CPU kernels decompress bf16, fp16 and fp32 to themselves or fp32, not {own} to {dtype}")
    rows, columns = shape
    last = rows if last is None else last
    out = torch.empty((last - first, columns), dtype=dtype, device="cpu")
    return decompress_into(out, Bound(layout, tensors, None, shape, own), first)


def decompress_into(out: torch.Tensor, bound: Bound, first: int) -> torch.Tensor:
    """`decompress` of as many rows as ``out`` has, from ``first`` on; returns ``out``.

    Raises:
        UsageError: ``out`` is not contiguous ``[rows, K]`` on the CPU, in the weight's type or float32.
    """
    rows, columns = bound.shape
    fits = out.dim() == 2 and out.shape[1] == columns and 0 <= first <= rows - out.shape[0]
    if not fits or out.dtype not in (bound.dtype, torch.float32) or not out.is_cpu or not out.is_contiguous():
        raise UsageError(
            f"rows from {first} on of a {bound.dtype} weight {rows} × {columns} do not go into {out.dtype} "
            f"{tuple(out.shape)} on {out.device}"
        )
    last = first + out.shape[0]
    _cpu.decompress(bound.native, first, last, out.data_ptr(), out.dtype != bound.dtype, torch.get_num_threads())
    return out


def addresses(
    layout: str, tensors: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> tuple[int, int, int, list[torch.Tensor]]:
    """Addresses of values, positions and offsets (0: none), and the tensors to keep alive meanwhile.

    Raises:
        UsageError: a tensor has the wrong type or number of elements for the shape, or is not on the CPU; offsets lead
            outside the values.

    Offsets are not looked at again: they must stay as they are. Positions and bits are not checked, for that would read
    the whole weight; a wrong one gives wrong results, but no kernel leaves its memory for it. Only the meta of
    ``bitmap_windows`` must be what was packed.
    """
    rows, columns = shape
    chunks, tiles = -(-columns // PAIRS_CHUNK), -(-columns // PAIRS_TILE)
    blocks = -(-rows // PAIRS_ROWS)
    if layout == "dense":
        expected = [(dtype, rows * columns)]
    elif layout == "nm":
        kept_columns = kept_per_row(columns, TWO_FOUR)
        expected = [(dtype, rows * kept_columns), (torch.uint8, rows * -(-kept_columns // 4))]
    elif layout == "nm_pairs":
        expected = [(dtype, blocks * chunks * 32), (torch.int32, blocks * tiles * 16)]
    elif layout == "bitmap_windows":
        pairs = tensors[0].numel() // (2 * WINDOW_SLOTS)
        blocks = -(-rows // WINDOW_ROWS)
        expected = [(dtype, pairs * 2 * WINDOW_SLOTS), (torch.uint8, pairs * WINDOW_META)]
        expected += [(torch.int64, blocks + 1), (torch.int64, rows + 1)]
    else:
        expected = [(dtype, tensors[0].numel()), (torch.uint8, rows * -(-columns // 8)), (torch.int64, rows + 1)]
    if len(tensors) != len(expected):
        raise UsageError(f"layout {layout!r} has {len(expected)} tensors, not {len(tensors)}")
    # The order of the values depends on the type they were packed in, and their number of dimensions tells it.
    if layout == "nm_pairs" and (dtype == torch.bfloat16) != (tensors[0].dim() == 5):
        raise UsageError("the type of a layer's values changed after they were packed: swap the layer again")
    kept, found = [], [0, 0, 0, 0]
    for i, (tensor, (kind, size)) in enumerate(zip(tensors, expected, strict=True)):
        if tensor.dtype != kind or tensor.numel() != size or tensor.device.type != "cpu":
            raise UsageError(
                f"tensor {i} of layout {layout!r} is {tensor.dtype} with {tensor.numel()} elements on {tensor.device}, "
                f"but a weight {rows} × {columns} needs {kind} with {size} on the CPU"
            )
        tensor = tensor if tensor.is_contiguous() else tensor.contiguous()
        kept.append(tensor)
        found[i] = tensor.data_ptr()
    if layout == "bitmap" and not _cpu.offsets_fit(found[2], rows, columns, kept[0].numel()):
        raise UsageError(
            f"row_offsets must ascend from 0 to {kept[0].numel()}, the number of values, by at most {columns} a row: "
            "validate() names what is wrong"
        )
    if layout == "bitmap_windows":
        first, last, each = int(kept[2][0]), int(kept[2][-1]), kept[2].diff()
        steps = kept[0].numel() // WINDOW_SLOTS
        if first != 0 or last != steps or bool((each < 0).any()) or bool((each % 2 != 0).any()):
            raise UsageError(
                f"the blocks' first steps must ascend from 0 to {steps} by even numbers, but they go from "
                f"{first} to {last}"
            )
    return found[0], found[1], found[2], kept


def pack_windows(weight: BitmapWeight) -> list[torch.Tensor]:
    """The tensors of the layout ``bitmap_windows`` of a weight on the CPU, of a type in ``TYPES``."""
    rows, _ = weight.shape
    dtype, threads = weight.values.dtype, torch.get_num_threads()
    bound = Bound("bitmap", (weight.values, weight.bitmap, weight.row_offsets), None, weight.shape, dtype)
    offsets = torch.zeros(-(-rows // WINDOW_ROWS) + 1, dtype=torch.int64, device="cpu")
    if not _cpu.count_windows(bound.native, offsets[1:].data_ptr(), threads):
        raise UsageError(
            "a row of the bitmap has another number of bits than row_offsets gives it: validate() names it"
        )
    offsets.cumsum_(0)
    steps = int(offsets[-1])
    values = torch.empty((steps, WINDOW_SLOTS), dtype=dtype, device="cpu")
    meta = torch.empty((steps // 2, WINDOW_META), dtype=torch.uint8, device="cpu")
    _cpu.pack_windows(bound.native, offsets.data_ptr(), values.data_ptr(), meta.data_ptr(), threads)
    return [values, meta, offsets, weight.row_offsets.clone()]


def unpack_windows(tensors: Sequence[torch.Tensor], shape: tuple[int, int]) -> BitmapWeight:
    """The weight that `pack_windows` was given, bit for bit."""
    rows, columns = shape
    bound = Bound("bitmap_windows", tensors, None, shape, tensors[0].dtype)
    row_offsets = tensors[3].clone(memory_format=torch.contiguous_format)
    values = torch.empty(max(int(row_offsets[-1]), 0), dtype=bound.dtype, device="cpu")
    bitmap = torch.empty((rows, -(-columns // 8)), dtype=torch.uint8, device="cpu")
    into = (row_offsets.data_ptr(), values.data_ptr(), bitmap.data_ptr())
    if not _cpu.unpack_windows(bound.native, *into, torch.get_num_threads()):
        raise UsageError("a row has another number of weights than row_offsets gives it: swap the layer again")
    return BitmapWeight(values, bitmap, row_offsets, shape)
