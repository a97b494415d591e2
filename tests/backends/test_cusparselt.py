"""torch's semi-structured kernels as backends: padding, search, refusals; the libraries themselves are stood in for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fake_cupy import Gpu, install

from wandapp_kernels.backends import cusparselt
from wandapp_kernels.backends.base import Problem
from wandapp_kernels.backends.cusparselt import (
    Algorithms,
    CuSparseLtBackend,
    CuSparseLtLayout,
    CutlassBackend,
    CutlassLayout,
    pad_tokens,
)
from wandapp_kernels.errors import UsageError
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.pattern import Pattern

PATTERN = Pattern.parse("2:4")
PROBLEM = Problem("nm_linear", 512, 64, 128, "2:4", 50, torch.bfloat16, "cuda:0", 0)


class Library:
    """cuSPARSELt and CUTLASS on the CPU: a blob is the dense weight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.searched: list[tuple[int, ...]] = []
        self.algorithms: list[int] = []
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
        monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense.clone())
        monkeypatch.setattr(torch, "_cslt_sparse_mm", self.multiply)
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", self.search)
        monkeypatch.setattr(torch, "_sparse_semi_structured_mm", self.cutlass)
        monkeypatch.setattr(
            torch, "_sparse_semi_structured_addmm", lambda bias, w, meta, x: self.cutlass(w, meta, x) + bias[:, None]
        )

    def multiply(self, blob, x, bias=None, transpose_result=False, alg_id=0):
        assert x.shape[1] % 8 == 0
        self.algorithms.append(alg_id)
        out = blob.float() @ x.float()
        out = out if bias is None else out + bias.float()[:, None]
        return (out.t() if transpose_result else out).contiguous().to(blob.dtype)

    def search(self, blob, x, bias=None, transpose_result=False):
        assert transpose_result
        self.searched.append(tuple(x.shape))
        return 7

    def cutlass(self, values, metadata, x):
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

        assert x.shape[1] % 8 == 0
        dense = sparse_semi_structured_to_dense_cutlass(values, metadata)
        return (dense.float() @ x.float()).to(values.dtype)


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator[Gpu]:
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(cusparselt._SemiStructuredLayout, "_dense", lambda self, weight: weight.decompress())
    for cached in (cusparselt._probe, cusparselt.algorithms):
        cached.cache_clear()
    yield install(monkeypatch)
    for cached in (cusparselt._probe, cusparselt.algorithms):
        cached.cache_clear()


@pytest.fixture
def library(gpu, monkeypatch) -> Library:
    return Library(monkeypatch)


def weight(rows=64, columns=128, dtype=torch.bfloat16) -> NMWeight:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense.view(rows, -1, 4)[..., ::2] = 0
    dense[:, :8] = 0
    dense[0, 2] = -0.0
    dense[1, 5] = 1.0
    return NMWeight.compress(dense, pattern="2:4")


CASES = [(CuSparseLtBackend(), CuSparseLtLayout()), (CutlassBackend(), CutlassLayout())]


@pytest.mark.parametrize(("backend", "layout"), CASES, ids=["cusparselt", "cutlass"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 65])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(library, backend, layout, tokens, with_bias):
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias = torch.randn(64).bfloat16() if with_bias else None
    out = backend.run(x, layout.pack(weight()), bias, (64, 128), PATTERN)
    reference = torch.nn.functional.linear(
        x.double(), weight().decompress().double(), None if bias is None else bias.double()
    )
    assert out.shape == (tokens, 64)
    torch.testing.assert_close(out.double(), reference, rtol=2.0**-6, atol=2.0**-5)


@pytest.mark.parametrize("layout", [CuSparseLtLayout(), CutlassLayout()], ids=["cusparselt", "cutlass"])
def test_layouts_are_invertible(library, layout, monkeypatch):
    monkeypatch.setattr(cusparselt, "_TILE", 48)
    tensors = layout.pack(weight())
    assert torch.equal(layout.decompress(tensors, (64, 128), PATTERN), weight().decompress())
    back = layout.unpack(tensors, (64, 128), PATTERN)
    back.validate()
    assert torch.equal(back.decompress(), weight().decompress())


def test_the_algorithm_is_searched_once_per_bucket_and_kept(library):
    tensors, backend = CuSparseLtLayout().pack(weight()), CuSparseLtBackend()
    for tokens in (500, 512, 64):
        backend.run(torch.zeros(tokens, 128, dtype=torch.bfloat16), tensors, None, (64, 128), PATTERN)
    assert library.searched == [(128, 504), (128, 64)]
    assert library.algorithms[-3:] == [7, 7, 7]
    again = Algorithms("cpu")
    content = json.loads(again.path.read_text())
    assert content["algorithms"] == {"64x128 m512 bfloat16": 7, "64x128 m64 bfloat16": 7}
    assert again.best(tensors[0], torch.zeros(512, 128, dtype=torch.bfloat16), None, (64, 128)) == 7
    assert len(library.searched) == 2
    again.best(tensors[0], torch.zeros(512, 128, dtype=torch.bfloat16), torch.zeros(64), (64, 128))
    assert len(library.searched) == 3


def test_under_capture_nothing_is_searched(library, gpu):
    gpu.capturing = True
    tensors = CuSparseLtLayout().pack(weight())
    CuSparseLtBackend().run(torch.zeros(64, 128, dtype=torch.bfloat16), tensors, None, (64, 128), PATTERN)
    assert library.searched == []
    assert library.algorithms == [0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 9}', '{"format": 1, "algorithms": {"a": null}}'])
def test_a_file_that_is_damaged_or_of_another_gpu_is_ignored(library, content):
    first = Algorithms("cpu")
    first.path.parent.mkdir(parents=True, exist_ok=True)
    first.path.write_text(content)
    assert Algorithms("cpu")._known == {}


def test_supports(library):
    for backend, _ in CASES:
        assert backend.supports(PROBLEM) is None
        assert "2:4 only" in backend.supports(replace(PROBLEM, pattern="4:8"))
        assert "float16 and bfloat16" in backend.supports(replace(PROBLEM, dtype=torch.float32))
        assert "below 64" in backend.supports(replace(PROBLEM, tokens=32))
        assert "multiples" in backend.supports(replace(PROBLEM, in_features=100))
        assert "NVIDIA GPU" in backend.supports(replace(PROBLEM, device="cpu"))
    assert CuSparseLtBackend().supports(replace(PROBLEM, out_features=16, in_features=48)) is None
    assert CutlassBackend().supports(replace(PROBLEM, out_features=16)) is not None


def test_a_library_that_fails_at_run_time_is_a_reason(library, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("Supported only on GPUs with compute capability 8.x\nmore")

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", refuse)
    assert CutlassBackend().supports(PROBLEM).endswith("Supported only on GPUs with compute capability 8.x")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in CuSparseLtBackend().supports(PROBLEM)


def test_layouts_refuse_what_they_cannot_hold(monkeypatch):
    for layout in (CuSparseLtLayout(), CutlassLayout()):
        assert "on a GPU" in layout.supports(weight())
        assert "float32" in layout.supports(weight(dtype=torch.float32))
        four_of_eight = NMWeight.compress(torch.zeros(8, 8), torch.arange(8).expand(8, 8) < 4, "4:8")
        assert "2:4 weights only" in layout.supports(four_of_eight)
        with pytest.raises(UsageError):
            layout.pack(four_of_eight)


def test_tokens_are_padded_to_eights():
    assert [pad_tokens(torch.ones(tokens, 4)).shape[0] for tokens in (1, 8, 9)] == [8, 8, 16]
    assert pad_tokens(torch.ones(3, 4)).sum() == 12
