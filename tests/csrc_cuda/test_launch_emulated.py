"""The backends' own launches, carried out by the emulated kernels: arguments, grids and workspaces fit the sources."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from emulator import Emulator, Launch
from torch.nn import functional

from wandapp_kernels.backends.cuda import bitmap, bitmap_packing, launcher, nm, nm_packing
from wandapp_kernels.backends.cuda.bitmap_layout import BitmapMmaLayout
from wandapp_kernels.backends.cuda.fragment_layout import FragmentLayout
from wandapp_kernels.errors import SparsityError
from wandapp_kernels.sparsity import mask_from_scores
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.pattern import Pattern


def as_array(tensor: torch.Tensor) -> np.ndarray:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(kind).numpy()


@pytest.fixture
def gpu(emulator: Emulator, monkeypatch):
    """A GPU of eight multiprocessors that is the emulation."""

    def launch(
        source: str,
        name: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[torch.Tensor | int | None],
        device: torch.device,
    ) -> None:
        passed = [as_array(each) if isinstance(each, torch.Tensor) else each for each in arguments]
        results = emulator.run(Launch(name, (*grid, 1), threads, shared_bytes, passed))
        for array, result in zip([each for each in passed if isinstance(each, np.ndarray)], results, strict=True):
            array[...] = result

    for module in (bitmap, bitmap_packing, nm, nm_packing):
        monkeypatch.setattr(module, "launch", launch)
    for module in (bitmap, nm):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 8)
        monkeypatch.setattr(module, "counters", lambda count, device: torch.zeros(count, dtype=torch.int32))
        monkeypatch.setattr(module, "shared_memory", lambda device: 232448)


def pruned(rows: int, columns: int, pattern: str, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return weight * mask_from_scores(weight.float().abs(), Pattern.parse(pattern))


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((out.double() - expected).norm() / expected.norm()) < 4e-3


def inputs(tokens: int, columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, bias = torch.randn(tokens, columns, generator=generator), torch.randn(rows, generator=generator)
    return x.bfloat16(), bias.bfloat16()


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 40, 2048), (5, 33, 131), (16, 48, 1040)])
def test_bitmap(gpu, tokens, rows, columns):
    weight, (x, bias) = pruned(rows, columns, "50%"), inputs(tokens, columns, rows)
    tensors = BitmapMmaLayout().pack(BitmapWeight.compress(weight))
    out = bitmap.bitmap_decode(x, tensors, bias, (rows, columns))
    assert_close(out, functional.linear(x.double(), weight.double(), bias.double()))
    assert torch.equal(bitmap.decompress(tensors, (rows, columns)), weight)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (70, 130), (64, 131)])
def test_packing_2_of_4(gpu, rows, columns, monkeypatch):
    layout, weight = FragmentLayout(), pruned(rows, columns, "2:4")
    compressed = NMWeight.compress(weight, pattern="2:4")
    in_torch = layout.pack(compressed)
    monkeypatch.setattr(launcher, "why_not", lambda device, dtype: None)
    tensors = layout.pack(compressed)
    assert all(map(torch.equal, tensors, in_torch))
    back = layout.unpack(tensors, (rows, columns), compressed.pattern)
    assert torch.equal(back.values, compressed.values)
    assert torch.equal(back.indices, compressed.indices)
    assert torch.equal(layout.decompress(tensors, (rows, columns), compressed.pattern), weight)


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (70, 130), (40, 300), (0, 16), (16, 0)])
def test_packing_unstructured(gpu, rows, columns, monkeypatch):
    layout, weight = BitmapMmaLayout(), torch.randn(rows, columns).half()
    compressed = BitmapWeight.compress(weight, torch.rand(rows, columns) < 0.4)
    if rows and columns:
        compressed.values[0] = -0.0
    in_torch = layout.pack(compressed)
    monkeypatch.setattr(launcher, "why_not", lambda device, dtype: None)
    tensors = layout.pack(compressed)
    for made, expected in zip(tensors, in_torch, strict=True):
        assert made.dtype == expected.dtype and made.shape == expected.shape and made.is_contiguous()
        assert np.array_equal(as_array(made), as_array(expected))
    back = layout.unpack(tensors, (rows, columns), None)
    assert np.array_equal(as_array(back.values), as_array(compressed.values))
    assert torch.equal(back.bitmap, compressed.bitmap) and torch.equal(back.row_offsets, compressed.row_offsets)
    back.validate()


def test_packing_refuses_unstructured_weights_that_do_not_fit(gpu, monkeypatch):
    layout = BitmapMmaLayout()
    weight = BitmapWeight.compress(torch.randn(20, 140).half(), torch.rand(20, 140) < 0.5)
    monkeypatch.setattr(launcher, "why_not", lambda device, dtype: None)
    values, words, offsets = layout.pack(weight)
    more = BitmapWeight(weight.values, weight.bitmap | 1, weight.row_offsets, weight.shape)
    with pytest.raises(SparsityError, match="the bitmap keeps"):
        layout.pack(more)
    with pytest.raises(SparsityError, match="bitmap has shape"):
        layout.pack(BitmapWeight(weight.values, weight.bitmap[:, 1:], weight.row_offsets, weight.shape))
    wrong = offsets.clone()
    wrong[1] += 1
    for tensors, words_ in (
        ([values, words[1:], offsets], "bitmap is torch.int32"),
        ([values, words, offsets.long()], "offsets is torch.int64"),
        ([values, words, wrong], "do not fit together"),
        ([values[:-1], words, offsets], "do not fit together"),
    ):
        with pytest.raises(SparsityError, match=words_):
            layout.unpack(tensors, (20, 140), None)


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 70, 512), (9, 64, 200)])
def test_nm(gpu, tokens, rows, columns):
    weight, (x, bias) = pruned(rows, columns, "2:4"), inputs(tokens, columns, rows)
    tensors = FragmentLayout().pack(NMWeight.compress(weight, pattern="2:4"))
    out = nm.nm_decode(x, tensors, bias, (rows, columns))
    assert_close(out, functional.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(17, 40, 131), (33, 130, 72), (70, 70, 200)])
def test_nm_with_many_tokens(gpu, tokens, rows, columns):
    weight, (x, bias) = pruned(rows, columns, "2:4"), inputs(tokens, columns, rows)
    tensors = FragmentLayout().pack(NMWeight.compress(weight, pattern="2:4"))
    out = nm.nm_gemm(x, tensors, bias, (rows, columns))
    assert_close(out, functional.linear(x.double(), weight.double(), bias.double()))
    forced = nm.nm_gemm(x, tensors, bias, (rows, columns), tile="128x32", splits=2)
    assert_close(forced, functional.linear(x.double(), weight.double(), bias.double()))


def test_swiglu(gpu):
    gate, up, (x, bias) = pruned(70, 200, "2:4"), pruned(70, 200, "2:4", 1), inputs(3, 200, 70)
    packed = [FragmentLayout().pack(NMWeight.compress(weight, pattern="2:4")) for weight in (gate, up)]
    out = nm.nm_swiglu(x, *packed, bias, None, (70, 200))
    wide = functional.linear(x.double(), gate.double(), bias.double())
    assert_close(out, functional.silu(wide) * functional.linear(x.double(), up.double()))
