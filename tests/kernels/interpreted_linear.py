"""Sparse linears through their backends against float64. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch

from wandapp_kernels.backends import BACKENDS, Problem, load_backends
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.sparsity import Pattern
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.mask import mask_from_scores
from wandapp_kernels.sparsity.nm_weight import NMWeight

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TWO_OF_FOUR = Pattern.parse("2:4")
load_backends()


def compressed(layout: str, rows: int, columns: int, dtype: torch.dtype) -> NMWeight | BitmapWeight:
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    if layout == "nm":
        weight[torch.rand(rows, columns, generator=generator) < 0.3] = 0.0
        return NMWeight.compress(weight, mask_from_scores(weight.float().abs(), TWO_OF_FOUR), TWO_OF_FOUR)
    return BitmapWeight.compress(weight, torch.rand(rows, columns, generator=generator) < 0.4)


def run(name: str, x: torch.Tensor, weight: NMWeight | BitmapWeight, bias: torch.Tensor | None) -> torch.Tensor:
    backend = BACKENDS[name]
    pattern = TWO_OF_FOUR if backend.layout == "nm" else None
    rows, columns = weight.shape
    text = "2:4" if pattern else "unstructured"
    operator = f"{backend.layout}_linear"
    problem = Problem(operator, x.shape[0], rows, columns, text, 50, x.dtype, "cpu", 1)
    assert backend.supports(problem) is None
    return backend.run(x, get_layout(backend.layout).pack(weight), bias, weight.shape, pattern)


@pytest.mark.parametrize("name", ["triton-nm", "triton-nm-dot", "triton-bitmap", "triton-bitmap-dot"])
@pytest.mark.parametrize(
    "tokens, rows, columns, dtype, biased",
    [
        (1, 1, 1, torch.float32, True),
        (3, 5, 7, torch.float16, True),
        (11, 10, 546, torch.float32, False),
        (2, 70, 64, torch.bfloat16, True),
    ],
)
def test_linears(name: str, tokens: int, rows: int, columns: int, dtype: torch.dtype, biased: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    weight = compressed(BACKENDS[name].layout, rows, columns, dtype)
    found = run(name, x, weight, bias)
    wide = None if bias is None else bias.double()
    expected = torch.nn.functional.linear(x.double(), weight.decompress().double(), wide)
    assert found.dtype == dtype and found.shape == (tokens, rows)
    scale = float(expected.abs().max()) + 1.0
    assert float((found.double() - expected).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("name", ["triton-nm", "triton-nm-dot"])
def test_all_six_pairs_of_positions_in_every_group(name: str) -> None:
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    mask = torch.zeros(6, 24, dtype=torch.bool)
    for row in range(6):
        for group in range(6):
            for place in pairs[(row + group) % 6]:
                mask[row, 4 * group + place] = True
    dense = torch.arange(1.0, 145.0).reshape(6, 24)
    weight = NMWeight.compress(dense, mask, TWO_OF_FOUR)
    assert torch.equal(run(name, torch.eye(24)[:16], weight, None), (dense * mask)[:, :16].T)


@pytest.mark.parametrize("name", ["triton-bitmap", "triton-bitmap-dot"])
def test_bitmaps_with_empty_and_full_rows(name: str) -> None:
    mask = torch.zeros(4, 19, dtype=torch.bool)
    mask[1] = True
    mask[3, 18] = True
    dense = torch.arange(1.0, 77.0).reshape(4, 19)
    weight = BitmapWeight.compress(dense, mask)
    assert torch.equal(run(name, torch.eye(19)[3:], weight, None), (dense * mask)[:, 3:].T)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_token_poisons_no_other(poison: float) -> None:
    weight = compressed("nm", 6, 40, torch.float32)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    clean = run("triton-nm", x, weight, None)
    x[1, 5] = poison
    found = run("triton-nm", x, weight, None)
    assert torch.equal(found[[0, 2]], clean[[0, 2]]) and not torch.isfinite(found[1]).all()


def test_strided_tensors_give_the_same() -> None:
    weight = compressed("nm", 9, 32, torch.float32)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(9.0)
    expected = run("triton-nm", x, weight, bias)
    values, indices = (tensor.T.contiguous().T for tensor in (weight.values, weight.indices))
    backend = BACKENDS["triton-nm"]
    strided = backend.run(
        x.T.contiguous().T, [values, indices], bias.repeat_interleave(2)[::2], weight.shape, TWO_OF_FOUR
    )
    assert torch.equal(strided, expected)
