from __future__ import annotations

import pytest
import torch

from wandapp_kernels.backends import Problem, ReferenceBackend
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.sparsity import BitmapWeight, NMWeight, Pattern, mask_from_scores


@pytest.mark.parametrize("layout", ["nm", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_rounds_the_exact_result_once(layout: str, dtype: torch.dtype, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn((13, 21), generator=generator).to(dtype)
    dense *= mask_from_scores(torch.rand(13, 21, generator=generator), Pattern.parse("2:4"))
    weight = NMWeight.compress(dense) if layout == "nm" else BitmapWeight.compress(dense)
    x, bias = torch.randn((5, 21), generator=generator).to(dtype), torch.randn(13, generator=generator).to(dtype)
    pattern = weight.pattern if isinstance(weight, NMWeight) else None
    backend = ReferenceBackend(layout)
    tensors = get_layout(layout).pack(weight)
    got = backend.run(x, tensors, bias if with_bias else None, (13, 21), pattern)
    wanted = x.double() @ dense.double().T + (bias.double() if with_bias else 0)
    assert got.dtype == dtype
    # Half a unit in the last place of the type, and the error of summing 21 products.
    slack = 1e-13 if dtype == torch.float64 else 1e-5
    half = torch.finfo(dtype).eps / 2
    assert bool(((got.double() - wanted).abs() <= wanted.abs() * half * 1.01 + slack).all())


def test_it_takes_everything_and_is_never_the_default() -> None:
    backend = ReferenceBackend("nm")
    assert backend.supports(Problem("nm_linear", 7, 3, 5, "2:4", 50, torch.float16, "cuda:0", 0)) is None
    assert backend.default_tokens == 0
