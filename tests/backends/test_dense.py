from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from wandapp_kernels.backends import DecompressBackend, DenseBackend
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.sparsity import BitmapWeight, NMWeight


def sparse(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randint(-5, 6, (6, 10), generator=generator).float()
    dense.view(6, 5, 2)[:, [0, 2, 4], 0] = dense.view(6, 5, 2)[:, [1, 3], 1] = 0
    dense[:, 1] = dense[:, 5] = 0
    return dense.to(dtype)


@pytest.mark.parametrize("with_bias", [False, True])
def test_dense_is_torch_linear(with_bias: bool) -> None:
    x, weight, bias = torch.randn(3, 10), torch.randn(6, 10), torch.randn(6) if with_bias else None
    assert torch.equal(DenseBackend().run(x, [weight], bias, (6, 10), None), functional.linear(x, weight, bias))


@pytest.mark.parametrize("layout", ["nm", "bitmap"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_decompressing_gives_the_dense_result_for_every_storage_type(layout: str, storage: torch.dtype) -> None:
    dense = sparse(storage)
    weight = NMWeight.compress(dense, pattern="3:4") if layout == "nm" else BitmapWeight.compress(dense)
    pattern = weight.pattern if isinstance(weight, NMWeight) else None
    x, bias = torch.randn(4, 10), torch.randn(6)
    got = DecompressBackend(layout).run(x, get_layout(layout).pack(weight), bias, (6, 10), pattern)
    assert torch.equal(got, functional.linear(x, dense.float(), bias))
