from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp_kernels.errors import NonFiniteError, SparsityError
from wandapp_kernels.sparsity import NMWeight, Pattern, mask_from_scores, packing
from wandapp_kernels.sparsity.nm_weight import index_bits, kept_per_row

DTYPES = tuple(packing.STORAGE)
INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PATTERNS = ("2:4", "1:4", "3:4", "1:2", "2:3", "4:8", "5:7", "15:16", "1:16")
LEGAL_NIBBLES = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(INTEGER[tensor.element_size()])


def from_bits(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.to(INTEGER[dtype.itemsize]).view(dtype)


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any finite bit pattern: denormals, the largest numbers, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2**62), 2**62, (rows, columns), generator=generator)
    weight = from_bits(codes >> (63 - 8 * dtype.itemsize) if dtype.itemsize < 8 else codes, dtype)
    sign = torch.randint(0, 2, (rows, columns), generator=generator).bool()
    zeros = torch.where(sign, torch.tensor(-0.0), torch.tensor(0.0)).to(torch.float32).to(dtype)
    hole = (torch.rand((rows, columns), generator=generator) < 0.1) | ~torch.isfinite(weight.to(torch.float64))
    return from_bits(torch.where(hole, bits(zeros), bits(weight)), dtype)


def nm_mask(rows: int, columns: int, pattern: str, seed: int, holes: float = 0.0) -> torch.Tensor:
    if not rows:
        return torch.zeros(0, columns, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    mask = mask_from_scores(torch.rand((rows, columns), generator=generator), Pattern.parse(pattern))
    return mask & (torch.rand((rows, columns), generator=generator) >= holes)


def keep(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``where(mask, weight, 0)`` on bits: exact for every type."""
    return from_bits(torch.where(mask, bits(weight), torch.zeros_like(bits(weight))), weight.dtype)


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert left.dtype == right.dtype and left.shape == right.shape
    assert torch.equal(bits(left), bits(right))


def slow_groups(weight: NMWeight) -> list[list[list[int]]]:
    """Positions of every row and group, read from the packed bytes bit by bit."""
    width, m, n = index_bits(weight.pattern), weight.pattern.m, weight.pattern.n
    columns = weight.shape[1]
    result = []
    for packed in weight.indices.tolist():
        number = int.from_bytes(bytes(packed), "little")
        fields = [number >> (i * width) & (2**width - 1) for i in range(weight.values.shape[1])]
        assert number >> (width * len(fields)) == 0
        result.append([fields[g * n : g * n + min(n, columns - g * m)] for g in range(-(-columns // m))])
    return result


@settings(deadline=None, max_examples=120)
@given(
    st.integers(0, 5),
    st.integers(0, 70),
    st.sampled_from(PATTERNS),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_the_round_trip_is_exact(
    rows: int, columns: int, pattern: str, dtype: torch.dtype, holes: float, given_mask: bool, seed: int
) -> None:
    weight, mask = random_weight(rows, columns, dtype, seed), nm_mask(rows, columns, pattern, seed, holes)
    wanted = keep(weight, mask)
    compressed = NMWeight.compress(weight, mask, pattern) if given_mask else NMWeight.compress(wanted, None, pattern)
    compressed.validate()
    dense = compressed.decompress()
    assert dense.is_contiguous()
    if not given_mask:
        # Without a mask -0.0 counts as zero: it comes back as +0.0.
        wanted = keep(wanted, wanted.to(torch.float64) != 0)
    assert_same_bits(dense, wanted)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from(PATTERNS), st.floats(0, 1), st.integers(0, 2**31))
def test_every_group_stores_n_ascending_positions_the_kept_ones_and_then_the_lowest_free(
    rows: int, columns: int, pattern: str, holes: float, seed: int
) -> None:
    mask = nm_mask(rows, columns, pattern, seed, holes)
    compressed = NMWeight.compress(torch.ones(rows, columns), mask, pattern)
    n, m = compressed.pattern.n, compressed.pattern.m
    for row, groups in enumerate(slow_groups(compressed)):
        for group, found in enumerate(groups):
            part = mask[row, group * m : (group + 1) * m].tolist()
            kept = [i for i, value in enumerate(part) if value]
            free = [i for i, value in enumerate(part) if not value]
            assert found == sorted(kept + free[: min(n, len(part)) - len(kept)])
    stored = compressed.mask()
    assert bool((stored | ~mask).all()) and stored.sum().item() == compressed.values.numel()


def test_the_docstring_example() -> None:
    a, b, c, d, e = 1.0, 2.0, 3.0, 4.0, 5.0
    compressed = NMWeight.compress(torch.tensor([[a, 0, 0, b, 0, c, d, 0, 0, 0, 0, e]]))
    assert compressed.values.tolist() == [[a, b, c, d, 0.0, e]]
    assert compressed.indices.tolist() == [[0x9C, 0x0C]]
    assert compressed.shape == (1, 12) and str(compressed.pattern) == "2:4"


def test_all_sixteen_subsets_of_a_group_give_legal_nibbles() -> None:
    codes = [code for code in range(16) if code.bit_count() <= 2]
    rows = torch.tensor([[float(code >> i & 1) for i in range(4)] for code in codes])
    nibbles = NMWeight.compress(rows).indices.flatten().tolist()
    assert set(nibbles) <= LEGAL_NIBBLES
    # 0 and 1 non-zeros: filled from the lowest free position; pairs: themselves.
    assert dict(zip(codes, nibbles, strict=True)) == {
        0b0000: 0x4, 0b0001: 0x4, 0b0010: 0x4, 0b0100: 0x8, 0b1000: 0xC,
        0b0011: 0x4, 0b0101: 0x8, 0b1001: 0xC, 0b0110: 0x9, 0b1010: 0xD, 0b1100: 0xE,
    }  # fmt: skip


def test_padding_is_plus_zero_and_kept_minus_zero_stays() -> None:
    weight = torch.tensor([[-0.0, -0.0, -0.0, 3.0]])
    inferred = NMWeight.compress(weight)
    assert bits(inferred.values).tolist() == [[0, bits(torch.tensor([3.0])).item()]]
    given = NMWeight.compress(weight, torch.tensor([[False, True, False, True]]))
    assert_same_bits(given.decompress(), torch.tensor([[0.0, -0.0, 0.0, 3.0]]))


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_the_result_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, rows: int, chunk: int) -> None:
    weight = keep(random_weight(rows, 33, torch.bfloat16, 1), nm_mask(rows, 33, "2:4", 1))
    whole = NMWeight.compress(weight)
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", chunk)
    pieces = NMWeight.compress(weight)
    assert_same_bits(pieces.values, whole.values)
    assert torch.equal(pieces.indices, whole.indices)
    assert_same_bits(pieces.decompress(), whole.decompress())
    pieces.validate()


def test_weights_and_masks_need_not_be_contiguous() -> None:
    weight, mask = random_weight(12, 10, torch.float16, 2), nm_mask(10, 12, "2:4", 2)
    strided = NMWeight.compress(weight.T, mask.T.contiguous().T)
    assert_same_bits(strided.decompress(), keep(weight.T.contiguous(), mask))
    sliced = torch.zeros(4, 21)[:, 1:]
    sliced[:, 2] = 1
    assert torch.equal(NMWeight.compress(sliced).decompress(), sliced)


def test_a_parameter_is_compressed_without_a_graph() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, 0, 0, 2]]))
    assert not NMWeight.compress(weight).values.requires_grad


def test_bytes() -> None:
    weight = NMWeight.compress(torch.zeros(6, 64, dtype=torch.bfloat16))
    assert weight.dense_nbytes == 6 * 64 * 2
    assert weight.nbytes * 16 == weight.dense_nbytes * 9
    assert kept_per_row(67, Pattern.parse("2:4")) == 34


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(("row", "column", "group", "width"), [(0, 0, 0, 4), (4, 9, 2, 4), (2, 12, 3, 3)])
def test_a_weight_or_mask_that_breaks_the_pattern_is_refused(
    monkeypatch: pytest.MonkeyPatch, with_mask: bool, row: int, column: int, group: int, width: int
) -> None:
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 30)
    weight = torch.zeros(6, 15)
    weight[row, group * 4 : group * 4 + 3] = 1.0
    mask = weight.bool() if with_mask else None
    name = "mask" if with_mask else "weight"
    message = rf"{name} keeps 3 of the {width} columns of row {row}, group {group}: the pattern 2:4 keeps at most 2"
    with pytest.raises(SparsityError, match=message):
        NMWeight.compress(torch.ones(6, 15) if with_mask else weight, mask)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point])
@pytest.mark.parametrize("kept", [True, False])
def test_nan_and_infinity_are_refused_with_their_place(dtype: torch.dtype, kept: bool) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = torch.tensor(bad).to(dtype)
        if torch.isfinite(broken.to(torch.float32)):
            continue  # a type without infinity saturates
        weight = torch.zeros(5, 8, dtype=torch.float32).to(dtype)
        bits(weight)[3, 6] = bits(broken.reshape(1))[0]
        mask = torch.zeros(5, 8, dtype=torch.bool)
        mask[3, 6] = kept
        with pytest.raises(NonFiniteError, match="row 3, column 6"):
            NMWeight.compress(weight, mask)


@pytest.mark.parametrize("sign", [0x00, 0x80])
def test_the_largest_float8_numbers_are_finite(sign: int) -> None:
    top = torch.tensor([[0x7E | sign, 0, 0, 0]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert_same_bits(NMWeight.compress(top).decompress(), top)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(4),), r"weight has shape \(4,\)"),
        ((torch.zeros(2, 4, dtype=torch.int64),), "weight is torch.int64"),
        ((torch.zeros(2, 4, dtype=torch.bool),), "weight is torch.bool"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), "mask is torch.float32"),
        ((torch.zeros(2, 4), torch.zeros(4, 2, dtype=torch.bool)), r"mask is torch.bool \(4, 2\)"),
        ((torch.zeros(2, 4), None, "50%"), "use BitmapWeight"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(SparsityError, match=message):
        NMWeight.compress(*arguments)  # type: ignore[arg-type]


def changed(tensor: torch.Tensor, place: tuple[int, int], value: float) -> torch.Tensor:
    copy = tensor.clone()
    copy[place] = value
    return copy


def valid() -> NMWeight:
    """5 × 15 at 2:4: 8 values and 2 bytes of indices a row; the tail of 3 columns keeps 2."""
    return NMWeight.compress(keep(torch.ones(5, 15), nm_mask(5, 15, "2:4", 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"values": w.values[:, :-1].contiguous()}, r"values has shape \(5, 7\)"),
        (lambda w: {"values": w.values.to(torch.int32)}, "values is torch.int32"),
        (lambda w: {"values": w.values.repeat(1, 2)[:, ::2]}, "values is not contiguous"),
        (lambda w: {"indices": w.indices[:-1]}, r"indices has shape \(4, 2\)"),
        (lambda w: {"indices": w.indices.to(torch.int16)}, "indices is torch.int16"),
        (lambda w: {"indices": w.indices.to("meta")}, "indices is on meta"),
        (lambda w: {"shape": (5, 19)}, "values has shape"),
        (lambda w: {"shape": (5, -1)}, "shape is"),
        (lambda w: {"pattern": Pattern.parse("50%")}, "is not n:m"),
        (lambda w: {"indices": changed(w.indices, (3, 0), 0x44 ^ 0x11)}, "do not ascend inside a group in row 3"),
        (lambda w: {"indices": changed(w.indices, (1, 1), 0xE4)}, "outside its group of 4 in row 1"),
    ],
)
def test_validate_names_what_is_wrong(change: object, message: str) -> None:
    weight = valid()
    weight.validate()
    with pytest.raises(SparsityError, match=message):
        replace(weight, **change(weight)).validate()  # type: ignore[operator]


def test_validate_checks_values_ranges_and_the_bits_after_the_last_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK_ELEMENTS", 8)
    odd = NMWeight.compress(torch.tensor([[1.0, 0, 0, 0, 1.0]] * 3))
    odd.validate()
    with pytest.raises(NonFiniteError, match="values is NaN or infinite at row 2, column 1"):
        replace(odd, values=changed(odd.values, (2, 1), float("inf"))).validate()
    with pytest.raises(SparsityError, match="the bits after the last are set in row 1"):
        replace(odd, indices=changed(odd.indices, (1, 0), odd.indices[1, 0] | 0x40)).validate()
    ternary = NMWeight.compress(torch.tensor([[0.0, 0, 1.0]]), pattern="1:3")
    with pytest.raises(SparsityError, match="outside its group of 3 in row 0"):
        replace(ternary, indices=torch.tensor([[3]], dtype=torch.uint8)).validate()


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([*sorted(LEGAL_NIBBLES) * 4, *range(16)]), min_size=4, max_size=4))
def test_validate_accepts_exactly_the_legal_nibbles(nibbles: list[int]) -> None:
    """Two bytes of a row of 15 columns: four groups, the last of three columns, whose positions are 0, 1 and 2."""
    packed = [nibbles[0] | nibbles[1] << 4, nibbles[2] | nibbles[3] << 4]
    weight = replace(valid(), indices=torch.tensor([packed] * 5, dtype=torch.uint8))
    if LEGAL_NIBBLES.issuperset(nibbles) and nibbles[3] in {0x4, 0x8, 0x9}:
        weight.validate()
    else:
        with pytest.raises(SparsityError, match="indices"):
            weight.validate()


def test_to_casts_and_refuses_overflow() -> None:
    weight = NMWeight.compress(torch.tensor([[1.0, 0, 0, 70000.0]]))
    assert weight.to(dtype=torch.bfloat16).values.dtype == torch.bfloat16
    assert weight.to("meta").indices.device.type == "meta"
    with pytest.raises(NonFiniteError, match=r"cast to torch\.float16"):
        weight.to(dtype=torch.float16)
    with pytest.raises(SparsityError, match=r"torch\.int32"):
        weight.to(dtype=torch.int32)
