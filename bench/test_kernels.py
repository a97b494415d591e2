"""Time of the CPU kernels and of packing on one matrix: ``make bench``. Timings compare within one run only."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from wandapp_kernels.backends import BACKENDS, load_backends
from wandapp_kernels.ops.layouts import LAYOUTS
from wandapp_kernels.sparsity import BitmapWeight, NMWeight, Pattern, mask_from_scores
from wandapp_kernels.tuning.device import last_level_cache

load_backends()
SHAPE = (4096, 4096)
NAMES = [name for name in BACKENDS if name == "dense" or name.startswith("cpu-")]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor | NMWeight | BitmapWeight]:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(SHAPE, generator=generator).to(torch.bfloat16)
    scores = torch.rand(SHAPE, generator=generator)
    return {
        "linear": dense,
        "nm_linear": NMWeight.compress(dense * mask_from_scores(scores, Pattern.parse("2:4"))),
        "bitmap_linear": BitmapWeight.compress(dense * mask_from_scores(scores, Pattern(0.6))),
    }


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("name", NAMES)
def test_linear(benchmark, weights, name, tokens):
    """Each call on another copy of the weight, together twice the last-level cache."""
    backend = BACKENDS[name]
    operator = getattr(backend, "operator", "linear")
    tensors = [weights["linear"]] if backend.layout == "dense" else LAYOUTS[backend.layout].pack(weights[operator])
    copies = 1 + 2 * last_level_cache("cpu") // sum(tensor.nbytes for tensor in tensors)
    rotating = cycle([[tensor.clone() for tensor in tensors] for _ in range(copies)])
    x = torch.randn(tokens, SHAPE[1]).to(torch.bfloat16)
    benchmark(lambda: backend.run(x, next(rotating), None, SHAPE, None))


@pytest.mark.parametrize("name", LAYOUTS)
def test_pack_and_unpack(benchmark, weights, name):
    layout = LAYOUTS[name]
    weight = weights[layout.operator]
    if (reason := layout.supports(weight)) is not None:
        pytest.skip(reason)
    pattern = weight.pattern if layout.operator == "nm_linear" else None
    benchmark(lambda: layout.unpack(layout.pack(weight), SHAPE, pattern))


@pytest.mark.parametrize("name", ["nm_linear", "bitmap_linear"])
def test_compress(benchmark, weights, name):
    dense = weights[name].decompress()
    benchmark((NMWeight if name == "nm_linear" else BitmapWeight).compress, dense)


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("cpu-nm", "cpu-windows", "cpu-bitmap")])
def test_decompress(benchmark, weights, name):
    from wandapp_kernels.backends.cpu import compiled

    backend = BACKENDS[name]
    tensors = LAYOUTS[backend.layout].pack(weights[backend.operator])
    benchmark(lambda: compiled.decompress(backend.layout, tensors, SHAPE))
