"""Packing kernels: what they launch, and what is refused before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cuda_problem import nm_weight, pointers

from wandapp_kernels.backends.cuda import CudaBitmapBackend, CudaNMBackend, compiler, launcher
from wandapp_kernels.backends.cuda.bitmap_layout import BitmapMmaLayout
from wandapp_kernels.backends.cuda.fragment_layout import FragmentLayout
from wandapp_kernels.backends.problem import problem_for
from wandapp_kernels.errors import KernelError, SparsityError
from wandapp_kernels.sparsity import Pattern
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.nm_weight import NMWeight


@pytest.fixture
def gpu_weights(gpu, monkeypatch):
    """Weights on the CPU count as weights on the GPU."""
    monkeypatch.setattr(launcher, "why_not", lambda device, dtype: None)


def test_packing_launches(gpu, gpu_weights):
    dense = torch.randn(70, 130, generator=torch.Generator().manual_seed(0)).half()
    dense.view(-1, 2)[:, 1] = 0
    weight = NMWeight.compress(dense, pattern="2:4")
    values, metadata = FragmentLayout().pack(weight)
    back = FragmentLayout().unpack([values, metadata], (70, 130), None)
    whole = FragmentLayout().decompress([values, metadata], (70, 130), None)
    packed, unpacked, decompressed = gpu.launches
    assert [launch.name for launch in gpu.launches] == ["nm_pack", "nm_unpack", "nm_decompress"]
    assert (packed.grid, packed.block, packed.shared) == ((6, 1, 1), (256, 1, 1), 0)
    assert (unpacked.grid, decompressed.grid) == ((-(-70 * 66 // 256), 1, 1), (6, 1, 1))
    assert list(packed.arguments) == [
        *pointers(weight.values, weight.indices, values, metadata),
        *(70, 130),
    ]
    assert list(unpacked.arguments[:4]) == pointers(values, metadata, back.values, back.indices)
    assert list(decompressed.arguments) == [*pointers(values, metadata, whole), 70, 130]
    assert (back.values.shape, back.indices.shape) == (weight.values.shape, weight.indices.shape)
    assert (whole.shape, whole.dtype) == ((70, 130), torch.float16)


def test_without_nvrtc_torch_packs(gpu, monkeypatch):
    """CuPy is there, but the kernels were not compiled ahead and its NVRTC does not load."""
    monkeypatch.setattr(compiler, "AHEAD", Path("nowhere"))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    why_not = launcher.why_not
    monkeypatch.setattr(launcher, "why_not", lambda device, dtype: why_not("cuda:0", dtype))
    dense = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).half()
    dense.view(-1, 4)[:, 2:] = 0
    pattern = Pattern.parse("2:4")
    for layout, weight in (
        (FragmentLayout(), NMWeight.compress(dense, pattern="2:4")),
        (BitmapMmaLayout(), BitmapWeight.compress(dense)),
    ):
        tensors = layout.pack(weight)
        assert torch.equal(layout.unpack(tensors, (16, 128), pattern).values, weight.values)
        assert torch.equal(layout.decompress(tensors, (16, 128), pattern), dense)
    for backend in (CudaNMBackend(), CudaBitmapBackend()):
        problem = problem_for(16, 128, "2:4", 1, torch.float16, "cuda:0")
        assert "wandapp_kernels[cuda13]" in backend.supports(problem)
    assert not gpu.launches


def test_packing_refuses_what_does_not_fit_before_the_launch(gpu, gpu_weights):
    weight = NMWeight.compress(torch.eye(8, 16).half(), pattern="2:4")
    with pytest.raises(SparsityError, match="indices has shape"):
        FragmentLayout().pack(NMWeight(weight.values, weight.indices[:, :1], weight.shape, weight.pattern))
    for wrong in (nm_weight(65, 64), [nm_weight(8, 16)[0], torch.zeros(1, 1, 32, 4)]):
        with pytest.raises(KernelError, match="cannot be unpacked"):
            FragmentLayout().decompress(wrong, (8, 16), None)
        with pytest.raises(KernelError, match="cannot be unpacked"):
            FragmentLayout().unpack(wrong, (8, 16), None)
    assert {launch.name for launch in gpu.launches} <= {"nm_pack"}


def test_a_weight_without_rows_is_not_launched(gpu, gpu_weights):
    weight = NMWeight.compress(torch.zeros(0, 16).half(), pattern="2:4")
    tensors = FragmentLayout().pack(weight)
    assert FragmentLayout().decompress(tensors, (0, 16), None).shape == (0, 16)
    assert not gpu.launches


def test_bitmap_values_that_do_not_fit_their_offsets_are_refused():
    weight = BitmapWeight.compress(torch.eye(16, 128).half())
    with pytest.raises(SparsityError, match="row_offsets ends at 16, but there are 15 values"):
        BitmapMmaLayout().pack(BitmapWeight(weight.values[:15], weight.bitmap, weight.row_offsets, weight.shape))
