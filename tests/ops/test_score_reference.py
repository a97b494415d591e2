from __future__ import annotations

import numpy as np
import pytest
import torch

from wandapp_kernels.errors import NonFiniteError, UsageError
from wandapp_kernels.ops.row_threshold import score_row_bitmap, score_row_mask
from wandapp_kernels.ops.running_statistics import add_channel_squares, add_squares
from wandapp_kernels.ops.score import scores, why_not_fused
from wandapp_kernels.ops.score_compress import score_compress, score_nm_mask
from wandapp_kernels.sparsity import Pattern, mask_from_scores
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.packing import pack_fields

TWO_OF_FOUR, HALF = Pattern.parse("2:4"), Pattern.parse("50%")


def drawn(rows: int = 5, columns: int = 22) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(2, rows, columns, generator=generator)
    return weight, torch.rand(columns, generator=generator), gradient.abs()


def test_scores_are_the_formula() -> None:
    weight, norm, gradient = drawn()
    w, n, g = (tensor.double().numpy() for tensor in (weight, norm, gradient))
    cases = [
        (scores(weight), np.abs(w)),
        (scores(weight, norm), n * np.abs(w)),
        (scores(weight, norm, gradient, alpha=3.0), (3 * g + n) * np.abs(w)),
        (scores(weight, None, gradient, alpha=3.0), 3 * g * np.abs(w)),
        (scores(weight, norm, gradient, alpha=3.0, samples=7), (3 * np.sqrt(g / 7) + n) * np.abs(w)),
    ]
    for found, expected in cases:
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_half_precision_is_scored_in_fp32() -> None:
    weight = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert scores(weight, torch.full((4,), 1e4)).tolist() == [[3e6] * 4]


def test_masks_and_compressed_weights_follow_the_scores() -> None:
    weight, norm, gradient = drawn()
    found = scores(weight, norm, gradient, alpha=100.0)
    mask = mask_from_scores(found, TWO_OF_FOUR)
    assert torch.equal(score_nm_mask(weight, TWO_OF_FOUR, norm, gradient, alpha=100.0), mask)
    compressed = score_compress(weight, TWO_OF_FOUR, norm, gradient, alpha=100.0)
    assert torch.equal(compressed.decompress(), weight * mask)
    assert torch.equal(compressed.indices, NMWeight.compress(weight, mask).indices)
    mask = mask_from_scores(found, HALF)
    assert torch.equal(score_row_mask(weight, HALF, norm, gradient, alpha=100.0), mask)
    assert torch.equal(score_row_bitmap(weight, HALF, norm, gradient, alpha=100.0), pack_fields(mask, 1))


def test_a_non_finite_score_stops() -> None:
    weight, norm, _ = drawn()
    norm[3] = float("nan")
    for choose, pattern in ((score_nm_mask, TWO_OF_FOUR), (score_compress, TWO_OF_FOUR), (score_row_mask, HALF)):
        with pytest.raises(NonFiniteError, match="5 of 110 scores"):
            choose(weight, pattern, norm)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": torch.ones(4)}, "1 dimensions"),
        ({"norm": torch.ones(3)}, r"shape \(3,\), but the weight has 4 input channels"),
        ({"gradient": torch.ones(2, 3)}, r"\(2, 3\), but the weight \(2, 4\)"),
        ({"gradient": torch.ones(2, 4), "samples": 0}, "samples is 0"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(arguments: dict, message: str) -> None:
    given = {"weight": torch.ones(2, 4), **arguments}
    with pytest.raises(UsageError, match=message):
        scores(**given)
    with pytest.raises(UsageError, match=message):
        score_nm_mask(pattern=TWO_OF_FOUR, **given)


def test_each_pattern_has_its_operator() -> None:
    weight = torch.ones(2, 4)
    for choose in (score_nm_mask, score_compress):
        with pytest.raises(UsageError, match="not n:m"):
            choose(weight, HALF)
    for choose in (score_row_mask, score_row_bitmap):
        with pytest.raises(UsageError, match="2:4 is n:m"):
            choose(weight, TWO_OF_FOUR)


def test_without_a_gpu_the_reference_runs_and_says_why() -> None:
    weight, norm, _ = drawn()
    assert why_not_fused(weight, norm, None)
    assert "float64" in (why_not_fused(weight.double(), norm, None) or "")
    assert "norm is torch.float16" in (why_not_fused(weight, norm.half(), None) or "")
    assert "norm is on meta" in (why_not_fused(weight, norm.to("meta"), None) or "")


def test_running_statistics_are_sums_of_squares() -> None:
    weight, sums, gradient = drawn()
    start = sums.clone()
    add_channel_squares(weight.bfloat16(), sums)
    exact = start.double() + weight.bfloat16().double().square().sum(0)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)
    squares = gradient.clone()
    add_squares(weight.half(), squares)
    torch.testing.assert_close(squares.double(), gradient.double() + weight.half().double() ** 2, rtol=1e-6, atol=0)


def test_statistics_of_other_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"\(2, 3\) and sum_squares \(2,\)"):
        add_channel_squares(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(UsageError, match=r"\(2, 3\), but sum_squares \(2, 1\)"):
        add_squares(torch.ones(2, 3), torch.ones(2, 1))
