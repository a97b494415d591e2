from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp_kernels.errors import NonFiniteError, SparsityError
from wandapp_kernels.sparsity import BitmapWeight, packing

DTYPES = tuple(packing.STORAGE)
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGER[tensor.element_size()])


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape
    assert torch.equal(bits(left), bits(right))


@st.composite
def sparse_weights(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its mask; some rows empty, some full."""
    rows, columns = draw(st.integers(0, 6)), draw(st.integers(0, 40))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    small = torch.randint(-6, 7, (rows, columns), generator=generator).float()
    weight = torch.where(small == 3, torch.tensor(-0.0), small).to(dtype)
    mask = torch.rand((rows, columns), generator=generator) < draw(st.floats(0, 1))
    for row in range(rows):
        kind = draw(st.sampled_from(["as drawn", "empty", "full"]))
        if kind != "as drawn":
            mask[row] = kind == "full"
    return weight, mask


@settings(deadline=None, max_examples=120)
@given(sparse_weights(), st.booleans())
def test_the_round_trip_is_exact_and_rows_are_stored_one_after_the_other(
    given_weight: tuple[torch.Tensor, torch.Tensor], given_mask: bool
) -> None:
    weight, mask = given_weight
    if not given_mask:
        mask = mask & (weight.to(torch.float64) != 0)
    wanted = torch.where(mask, bits(weight), torch.zeros_like(bits(weight))).view(weight.dtype)
    compressed = BitmapWeight.compress(weight, mask) if given_mask else BitmapWeight.compress(wanted)
    compressed.validate()
    assert_same_bits(compressed.decompress(), wanted)
    assert torch.equal(compressed.mask(), mask)
    # The definition, row by row and bit by bit.
    assert compressed.row_offsets.dtype == torch.int64 and compressed.row_offsets.shape == (len(mask) + 1,)
    offsets = compressed.row_offsets.tolist()
    for row, (kept, packed) in enumerate(zip(mask.tolist(), compressed.bitmap.tolist(), strict=True)):
        number = int.from_bytes(bytes(packed), "little")
        assert [number >> j & 1 for j in range(8 * len(packed))] == [*map(int, kept), *[0] * (-len(kept) % 8)]
        stored = bits(compressed.values)[offsets[row] : offsets[row + 1]].tolist()
        assert stored == [value for value, keep in zip(bits(weight)[row].tolist(), kept, strict=True) if keep]


def test_the_docstring_example() -> None:
    weight = BitmapWeight.compress(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0, 0, 3]]))
    assert weight.values.tolist() == [1, 2, 3]
    assert weight.bitmap.tolist() == [[0x09, 0x02]]
    assert weight.row_offsets.tolist() == [0, 3]


@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_the_result_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    weight = torch.randn(100, 33) * (torch.rand(100, 33) < 0.4)
    whole = BitmapWeight.compress(weight)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", chunk)
    pieces = BitmapWeight.compress(weight)
    for name in ("values", "bitmap", "row_offsets"):
        assert torch.equal(getattr(pieces, name), getattr(whole, name))
    assert torch.equal(pieces.decompress(), weight)
    pieces.validate()


def test_weights_and_masks_need_not_be_contiguous() -> None:
    weight, mask = torch.randn(12, 10), torch.rand(10, 12) < 0.5
    strided = BitmapWeight.compress(weight.T, mask.T.contiguous().T)
    assert torch.equal(strided.decompress(), torch.where(mask, weight.T, 0))


def test_bytes_and_casts() -> None:
    weight = BitmapWeight.compress(torch.tensor([[1.0, 0, 0, 70000.0]] * 16))
    assert weight.dense_nbytes == 16 * 16
    assert weight.nbytes == 32 * 4 + 16 + 17 * 8
    assert weight.to(dtype=torch.bfloat16).nbytes == 32 * 2 + 16 + 17 * 8
    moved = weight.to("meta")
    assert {moved.values.device.type, moved.bitmap.device.type, moved.row_offsets.device.type} == {"meta"}
    with pytest.raises(NonFiniteError, match=r"cast to torch\.float16"):
        weight.to(dtype=torch.float16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_kept_or_not(bad: float) -> None:
    weight = torch.zeros(5, 8, dtype=torch.bfloat16)
    weight[3, 6] = bad
    for mask in (None, torch.zeros(5, 8, dtype=torch.bool)):
        with pytest.raises(NonFiniteError, match="row 3, column 6"):
            BitmapWeight.compress(weight, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4),), r"weight has shape \(4,\)"),
        ((torch.zeros(2, 4, dtype=torch.complex64),), "weight is torch.complex64"),
        ((torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.uint8)), "mask is torch.uint8"),
        ((torch.zeros(2, 4), torch.zeros(2, 5, dtype=torch.bool)), r"mask is torch.bool \(2, 5\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(SparsityError, match=message):
        BitmapWeight.compress(*arguments)


def valid() -> BitmapWeight:
    """4 × 11: rows of 3, 0, 11 and 2 values, two bytes of bitmap with five unused bits."""
    mask = torch.zeros(4, 11, dtype=torch.bool)
    mask[0, [1, 8, 10]] = mask[2] = mask[3, :2] = True
    return BitmapWeight.compress(torch.ones(4, 11), mask)


def changed(tensor: torch.Tensor, place: int | tuple[int, int], value: float) -> torch.Tensor:
    copy = tensor.clone()
    copy[place] = value
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"values": w.values[:-1]}, r"values has shape \(15,\)"),
        (lambda w: {"values": w.values.to(torch.int32)}, "values is torch.int32"),
        (lambda w: {"values": w.values.repeat(2)[::2]}, "values is not contiguous"),
        (lambda w: {"bitmap": w.bitmap[:, :1].contiguous()}, r"bitmap has shape \(4, 1\)"),
        (lambda w: {"bitmap": w.bitmap.view(torch.int8)}, "bitmap is torch.int8"),
        (lambda w: {"bitmap": w.bitmap.to("meta")}, "bitmap is on meta"),
        (lambda w: {"row_offsets": w.row_offsets[1:]}, r"row_offsets has shape \(4,\)"),
        (lambda w: {"row_offsets": w.row_offsets.int()}, "row_offsets is torch.int32"),
        (lambda w: {"row_offsets": changed(w.row_offsets, 0, 1)}, "row_offsets starts at 1"),
        (lambda w: {"row_offsets": changed(w.row_offsets, 2, 2)}, "row_offsets decreases at row 1"),
        (lambda w: {"row_offsets": changed(w.row_offsets, 1, 2)}, "row_offsets gives row 0 2 values, but .* 3 bits"),
        (lambda w: {"bitmap": changed(w.bitmap, (3, 0), 7)}, "row_offsets gives row 3 2 values, but .* 3 bits"),
        (lambda w: {"bitmap": changed(w.bitmap, (1, 1), 8)}, "bits after column 11 are set in row 1"),
        (lambda w: {"shape": (4, 17)}, "bitmap has shape"),
        (lambda w: {"shape": (4.0, 11)}, "shape is"),
    ],
)
def test_validate_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, change: object, message: str) -> None:
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 11)
    weight = valid()
    weight.validate()
    with pytest.raises(SparsityError, match=message):
        replace(weight, **change(weight)).validate()  # type: ignore[operator]


def test_validate_refuses_nan_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 3)
    with pytest.raises(NonFiniteError, match="values is NaN or infinite at place 13"):
        replace(valid(), values=changed(valid().values, 13, float("nan"))).validate()
