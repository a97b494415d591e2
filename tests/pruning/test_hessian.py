from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.pruning.hessian import DAMPING, damped, damped_inverse


def gram_of(tokens: int, columns: int, seed: int = 0, dead: tuple[int, ...] = ()) -> torch.Tensor:
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    inputs[:, list(dead)] = 0
    return inputs.T @ inputs


def exact(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """``H + damping · mean(diag) · I`` in float64 without dead channels."""
    hessian = gram.double()
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.1])
def test_damping_is_a_share_of_the_mean_diagonal(damping: float) -> None:
    gram = gram_of(20, 6)
    before = gram.clone()
    torch.testing.assert_close(damped(gram, damping).double(), exact(gram, damping), rtol=1e-6, atol=0)
    assert torch.equal(gram, before)


def test_dead_channels_take_the_mean_of_the_others_and_leave_them_alone() -> None:
    gram = gram_of(20, 6, dead=(1, 4))
    live = [0, 2, 3, 5]
    hessian = damped(gram, 0.01)
    mean = gram.diagonal()[live].mean()
    torch.testing.assert_close(hessian[1, 1], 1.01 * mean)
    torch.testing.assert_close(hessian[4, 4], 1.01 * mean)
    torch.testing.assert_close(hessian[live][:, live], damped(gram[live][:, live], 0.01))
    assert (hessian[1, [0, 2, 3, 4, 5]] == 0).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.sampled_from([1e-20, 1e-6, 1.0, 1e6]), st.integers(0, 2**31))
def test_damping_scales_with_the_inputs(columns: int, scale: float, seed: int) -> None:
    gram = gram_of(2 * columns, columns, seed, dead=(0,))
    torch.testing.assert_close(damped(gram * scale, 0.01), damped(gram, 0.01) * (scale if columns > 1 else 1.0))


def test_all_dead_is_the_damped_identity() -> None:
    solved = damped_inverse(torch.zeros(3, 3))
    torch.testing.assert_close(solved.inverse, torch.eye(3) / (1 + DAMPING))
    assert solved.dead.tolist() == [True] * 3


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 60), st.integers(0, 2**31))
def test_inverse_and_factor_equal_float64(columns: int, tokens: int, seed: int) -> None:
    """Fewer tokens than columns make the Gram matrix singular: the damping has to carry it."""
    gram = gram_of(tokens, columns, seed)
    solved = damped_inverse(gram)
    inverse = torch.linalg.inv(exact(gram, DAMPING))
    scale = inverse.diagonal().max().item()
    torch.testing.assert_close(solved.inverse.double(), inverse, rtol=0, atol=1e-4 * scale)
    factor = solved.factor.double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, inverse, rtol=0, atol=1e-4 * scale)
    assert solved.damping == DAMPING and not solved.dead.any()


def test_the_factor_holds_the_inverse_of_every_remaining_hessian() -> None:
    """``U[j, j:] · U_jj`` is the first row of the inverse of ``H[j:, j:]``: so OBS inverts only once."""
    gram = gram_of(80, 12)
    factor, hessian = damped_inverse(gram).factor.double(), exact(gram, DAMPING)
    for j in range(12):
        row = torch.linalg.inv(hessian[j:, j:])[0]
        torch.testing.assert_close(factor[j, j:] * factor[j, j], row, rtol=1e-4, atol=1e-9)


def test_an_indefinite_hessian_raises_the_damping_tenfold() -> None:
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    solved = damped_inverse(gram, 0.01)
    assert solved.damping == pytest.approx(0.1)
    torch.testing.assert_close(solved.inverse.double(), torch.linalg.inv(exact(gram, 0.1)), rtol=1e-4, atol=0)


def test_duplicate_channels_need_more_damping_than_almost_none() -> None:
    inputs = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat([inputs, inputs, inputs], 1)
    solved = damped_inverse(inputs.T @ inputs, 1e-9)
    assert 1e-9 < solved.damping <= 1e-5
    assert torch.isfinite(solved.inverse).all() and torch.isfinite(solved.factor).all()


@pytest.mark.parametrize("damping, last", [(0.01, "10000"), (0.0, "0")])
def test_a_hopeless_hessian_names_the_last_damping_tried(damping: float, last: str) -> None:
    gram = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    with pytest.raises(NonFiniteError, match=f"2 inputs is not positive definite even with damping {last};"):
        damped_inverse(gram, damping)


def test_nan_is_refused() -> None:
    gram = gram_of(20, 4)
    gram[1, 2] = gram[2, 1] = torch.nan
    with pytest.raises(NonFiniteError):
        damped_inverse(gram)
