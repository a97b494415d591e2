"""Fused scoring against the reference, bit for bit. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from wandapp_kernels.kernels import launch
from wandapp_kernels.kernels.row_threshold import WIDEST, row_threshold
from wandapp_kernels.kernels.row_threshold_wide import CHUNK, row_threshold_wide

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.ops.row_threshold import score_row_bitmap, score_row_mask
from wandapp_kernels.ops.score import scores, why_not_fused
from wandapp_kernels.ops.score_compress import score_compress, score_nm_mask
from wandapp_kernels.sparsity import Pattern, keep_highest, mask_from_scores
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.packing import as_bits, pack_fields

ALPHA = 100.0


def inputs(rows: int, columns: int, dtype: torch.dtype, terms: str, seed: int = 0) -> dict:
    """Values that tie often, zeros of both signs; `terms` beside W: n(orm), g(radient), s(quares of it)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        coarse = (torch.randn(shape, generator=generator) * 2).round() / 2
        fine = torch.randn(shape, generator=generator)
        return torch.where(torch.rand(shape, generator=generator) < 0.5, coarse, fine)

    weight = draw(rows, columns).to(dtype)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = -0.0
    norm = draw(columns).abs() if "n" in terms else None
    gradient = draw(rows, columns).abs() * 1e-2 if "g" in terms or "s" in terms else None
    return {
        "weight": weight,
        "norm": norm,
        "gradient": gradient,
        "alpha": ALPHA,
        "samples": 7 if "s" in terms else None,
    }


def reference(given: dict, pattern: Pattern) -> torch.Tensor:
    return mask_from_scores(scores(**given), pattern)


def assert_same_weight(found: NMWeight, expected: NMWeight) -> None:
    found.validate()
    assert torch.equal(as_bits(found.values), as_bits(expected.values))
    assert torch.equal(found.indices, expected.indices)


def test_this_runs_the_kernels() -> None:
    assert launch.interpreted() and launch.why_not(torch.device("cpu")) is None


@pytest.mark.parametrize(
    "shape, text, dtype, terms",
    [
        ((1, 1), "2:4", torch.float32, "ng"),
        ((3, 7), "2:4", torch.float16, "ns"),
        ((33, 130), "2:4", torch.bfloat16, "ng"),
        ((20, 259), "2:4", torch.float32, "n"),
        ((17, 256), "2:4", torch.float32, ""),
        ((2, 515), "2:4", torch.float32, "g"),
        ((5, 203), "4:8", torch.float16, "ng"),
        ((2, 37), "8:16", torch.float32, "ns"),
        ((4, 31), "1:2", torch.bfloat16, "n"),
        ((4, 45), "1:4", torch.float32, "n"),
        ((3, 23), "2:16", torch.float16, ""),
    ],
)
def test_nm_masks_and_compressed_weights_are_the_references(shape, text: str, dtype, terms: str) -> None:
    given, pattern = inputs(*shape, dtype, terms), Pattern.parse(text)
    expected = reference(given, pattern)
    assert torch.equal(score_nm_mask(pattern=pattern, **given), expected)
    assert_same_weight(score_compress(pattern=pattern, **given), NMWeight.compress(given["weight"], expected, pattern))


@pytest.mark.parametrize("text", ["3:5", "3:4", "1:3"])
def test_groups_that_are_no_power_of_two(text: str) -> None:
    given, pattern = inputs(3, 41, torch.float32, "ng"), Pattern.parse(text)
    expected = reference(given, pattern)
    assert torch.equal(score_nm_mask(pattern=pattern, **given), expected)
    assert_same_weight(score_compress(pattern=pattern, **given), NMWeight.compress(given["weight"], expected, pattern))


def test_a_program_walks_down_many_rows() -> None:
    given, pattern = inputs(128 * 11, 3, torch.float32, "n"), Pattern.parse("2:4")
    from wandapp_kernels.kernels import score_nm

    programs, score_nm.PROGRAMS = score_nm.PROGRAMS, 2
    try:
        assert torch.equal(score_nm_mask(pattern=pattern, **given), reference(given, pattern))
    finally:
        score_nm.PROGRAMS = programs


@pytest.mark.parametrize("text", ["2:4", "50%"])
def test_any_strides(text: str) -> None:
    given, pattern = inputs(12, 20, torch.float32, "ng"), Pattern.parse(text)
    expected = reference(given, pattern)
    choose = score_nm_mask if pattern.is_nm else score_row_mask
    given["weight"] = given["weight"].T.contiguous().T
    assert torch.equal(choose(pattern=pattern, **given), expected)
    given["gradient"] = given["gradient"].repeat_interleave(2, dim=1)[:, ::2]
    given["norm"] = given["norm"].repeat_interleave(3)[::3]
    assert torch.equal(choose(pattern=pattern, **given), expected)


@pytest.mark.parametrize(
    "shape, dtype, terms",
    [
        ((1, 1), torch.float32, "n"),
        ((3, 13), torch.float16, ""),
        ((5, 130), torch.float32, "ng"),
        ((4, 600), torch.bfloat16, "ns"),
    ],
)
@pytest.mark.parametrize("ratio", [0.29, 0.5, 0.9])
def test_row_masks_and_bitmaps_are_the_references(shape, dtype, terms: str, ratio: float) -> None:
    given, pattern = inputs(*shape, dtype, terms), Pattern.parse(ratio)
    expected = reference(given, pattern)
    assert torch.equal(score_row_mask(pattern=pattern, **given), expected)
    assert torch.equal(score_row_bitmap(pattern=pattern, **given), pack_fields(expected, 1))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("keep", [0, 1, 36, 37])
def test_every_count_is_kept_exactly(wide: bool, keep: int) -> None:
    weight = inputs(2, 37, torch.float32, "")["weight"]
    weight[1] = 0.5  # all equal
    mask, flag = torch.ones(2, 37, dtype=torch.bool), torch.zeros(1, dtype=torch.int32)
    if wide:
        row_threshold_wide(weight, None, None, 0.0, None, keep, mask, None, flag)
    else:
        row_threshold(weight, None, None, 0.0, None, keep, mask, None)
    assert torch.equal(mask, keep_highest(weight.abs(), keep))


def test_negative_scores_sort_below_both_zeros() -> None:
    weight, norm = torch.tensor([[1.0, 2.0, 4.0, -0.0, 3.0]]), torch.tensor([-1.0, -1.0, -0.0, 1.0, 1.0])
    for keep in range(6):
        mask = torch.empty(1, 5, dtype=torch.bool)
        row_threshold(weight, norm, None, 0.0, None, keep, mask, None)
        assert torch.equal(mask, keep_highest(norm * weight.abs(), keep)), keep


def test_a_tail_of_negative_scores_beats_its_padding() -> None:
    given, pattern = {"weight": torch.ones(2, 7), "norm": -torch.ones(7)}, Pattern.parse("2:4")
    assert score_nm_mask(pattern=pattern, **given).tolist() == [[True, True, False, False, True, True, False]] * 2
    given = {"weight": torch.ones(2, 5), "norm": -torch.ones(5)}
    assert_same_weight(
        score_compress(pattern=pattern, **given), NMWeight.compress(given["weight"], reference(given, pattern))
    )


def test_rows_wider_than_the_registers() -> None:
    given = inputs(1, WIDEST + 5, torch.float32, "ng")
    pattern = Pattern.parse("60%")
    assert torch.equal(score_row_mask(pattern=pattern, **given), reference(given, pattern))


def test_ties_across_the_chunks_of_a_wide_row() -> None:
    weight = torch.ones(1, CHUNK + 100)
    weight[0, 5] = 2.0
    keep, flag = CHUNK + 50, torch.zeros(1, dtype=torch.int32)
    mask, bitmap = torch.empty(weight.shape, dtype=torch.bool), torch.empty(1, (CHUNK + 107) // 8, dtype=torch.uint8)
    row_threshold_wide(weight, None, None, 0.0, None, keep, mask, bitmap, flag)
    assert torch.equal(mask, keep_highest(weight, keep)) and not flag.item()
    assert torch.equal(bitmap, pack_fields(mask, 1))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["weight", "norm", "gradient"])
@pytest.mark.parametrize("text", ["2:4", "50%"])
def test_non_finite_scores_stop(poison: float, place: str, text: str) -> None:
    given, pattern = inputs(3, 9, torch.float32, "ng"), Pattern.parse(text)
    given["weight"] = given["weight"].abs() + 1
    given[place].view(-1)[8] = poison
    choose = score_nm_mask if pattern.is_nm else score_row_mask
    with pytest.raises(NonFiniteError, match="of 27 scores are NaN or infinite"):
        choose(pattern=pattern, **given)
    if pattern.is_nm:
        with pytest.raises(NonFiniteError):
            score_compress(pattern=pattern, **given)
    else:
        with pytest.raises(NonFiniteError):
            score_row_bitmap(pattern=pattern, **given)


def test_non_finite_scores_of_a_wide_row() -> None:
    weight, flag = torch.ones(1, CHUNK + 1), torch.zeros(1, dtype=torch.int32)
    weight[0, CHUNK] = float("nan")
    row_threshold_wide(weight, None, None, 0.0, None, 9, torch.empty(weight.shape, dtype=torch.bool), None, flag)
    assert flag.item() == 1


def test_other_types_take_the_reference() -> None:
    given = inputs(3, 9, torch.float64, "n")
    assert "float64" in (why_not_fused(given["weight"], given["norm"], None) or "")
    pattern = Pattern.parse("2:4")
    assert torch.equal(score_nm_mask(pattern=pattern, **given), reference(given, pattern))


def test_empty_weights() -> None:
    for shape in ((0, 8), (3, 0)):
        weight = torch.empty(shape)
        assert score_nm_mask(weight, Pattern.parse("2:4")).shape == shape
        assert score_row_mask(weight, Pattern.parse("50%")).shape == shape
