"""Running statistics against their definition. Run by test_interpreter.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wandapp_kernels.ops.running_statistics import add_channel_squares, add_squares


def ordered_sum(x: torch.Tensor) -> np.ndarray:
    """Σ x² in the documented order: 16 tokens, 16 sums of 16, 16 of those, and what is left of each level."""
    squares = x.float().numpy() ** 2
    levels = [np.zeros(x.shape[1], np.float32) for _ in range(4)]
    for token, row in enumerate(squares, 1):
        levels[0] = levels[0] + row
        for level in range(3):
            if token % 16 ** (level + 1):
                break
            levels[level + 1] = levels[level + 1] + levels[level]
            levels[level] = np.zeros(x.shape[1], np.float32)
    return ((levels[0] + levels[1]) + levels[2]) + levels[3]


@pytest.mark.parametrize(
    "tokens, channels, dtype",
    [
        (1, 1, torch.float32),
        (16, 7, torch.float16),
        (17, 33, torch.bfloat16),
        (255, 128, torch.float32),
        (256, 40, torch.float32),
        (300, 192, torch.bfloat16),
        (4096 + 300, 64, torch.float32),
    ],
)
def test_channel_squares_have_one_order(tokens: int, channels: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, channels, generator=generator).to(dtype)
    start = torch.rand(channels, generator=generator)
    sums = start.clone()
    add_channel_squares(x, sums)
    assert np.array_equal(sums.numpy(), start.numpy() + ordered_sum(x))
    exact = start.double() + x.double().square().sum(0)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)


def test_channel_squares_of_strided_tokens() -> None:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    for view in (x[::2], x[:, ::3], x.T):
        sums = torch.zeros(view.shape[1])
        add_channel_squares(view, sums)
        assert np.array_equal(sums.numpy(), ordered_sum(view))


def test_no_tokens_add_nothing() -> None:
    sums = torch.ones(4)
    add_channel_squares(torch.empty(0, 4), sums)
    assert sums.tolist() == [1.0] * 4


def test_non_finite_tokens_stay_visible() -> None:
    x = torch.ones(20, 3)
    x[17, 1], x[2, 2] = float("nan"), float("inf")
    sums = torch.zeros(3)
    add_channel_squares(x, sums)
    assert torch.isfinite(sums).tolist() == [True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_squared_gradients_round_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(67, 129, generator=generator).to(dtype)
    sums = torch.rand(67, 129, generator=generator)
    expected = (sums.double() + gradient.double().square()).float()
    add_squares(gradient, sums)
    assert torch.equal(sums, expected)
