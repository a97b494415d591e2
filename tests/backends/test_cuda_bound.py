"""Bound calls, and the 2:4 kernel for many tokens: what they launch."""

from __future__ import annotations

import pytest
import torch
from cuda_problem import bitmap_weight, nm_weight, pointers

from wandapp_kernels.backends.cuda import launcher
from wandapp_kernels.backends.cuda.bitmap import CudaBitmapBackend
from wandapp_kernels.backends.cuda.gemm_plan import plan_gemm
from wandapp_kernels.backends.cuda.nm import CudaNMBackend, nm_gemm
from wandapp_kernels.errors import KernelError


@pytest.mark.parametrize("tokens", [1, 6, 16])
@pytest.mark.parametrize("shape", [(40, 264), (40, 4096)])
@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_a_bound_call_launches_what_an_unbound_one_does(gpu, pattern, shape, tokens):
    backend, tensors = (
        (CudaNMBackend(), nm_weight(*shape)) if pattern == "2:4" else (CudaBitmapBackend(), bitmap_weight(*shape))
    )
    held = tensors, torch.randn(40).bfloat16()
    call = backend.bind(*held, shape, None)
    inputs = [torch.randn(1, tokens, shape[1]).bfloat16() for _ in range(2)]
    bound = [call(x, held) for x in inputs]
    free = [backend.run(x[0], *held, shape, None) for x in inputs]
    assert bound[0].shape == (1, tokens, 40)
    for i, x in enumerate(inputs):
        names = {address: "weight" + str(n) for n, address in enumerate(pointers(*tensors))}
        names |= {x.data_ptr(): "x", held[1].data_ptr(): "bias"}
        names |= {counters.data_ptr(): "counters" for counters in launcher._counters.values()}
        one, other = (
            [({**names, out.data_ptr(): "out"}.get(a, a) if a > 2**20 else a) for a in launch.arguments]
            for launch, out in ((gpu.launches[i], bound[i]), (gpu.launches[2 + i], free[i]))
        )
        # Only a workspace may lie elsewhere.
        assert len(one) == len(other)
        assert [a for a, b in zip(one, other, strict=True) if a != b and not (type(a) is type(b) is int)] == []
        assert {"x", "bias", "out"} <= set(one)
    known = [(launch.name, launch.grid, launch.block, launch.shared) for launch in gpu.launches]
    assert known[:2] == known[2:]


def test_a_bound_call_copies_activations_it_cannot_read(gpu):
    tensors = bitmap_weight(16, 128)
    call = CudaBitmapBackend().bind(tensors, None, (16, 128), None)
    x = torch.randn(1 + 128).bfloat16()[1:].view(1, 128)
    call(x, (tensors, None))
    assert gpu.launches[0].arguments[3] not in (0, x.data_ptr())


def test_a_weight_that_does_not_fit_is_not_bound_to_a_launch(gpu):
    x, bias = torch.randn(1, 264).bfloat16(), torch.randn(41).bfloat16()
    for backend, tensors in ((CudaNMBackend(), nm_weight()), (CudaBitmapBackend(), bitmap_weight())):
        call = backend.bind(tensors, bias, (40, 264), None)
        with pytest.raises(KernelError, match="bias"):
            call(x, (tensors, bias))
    assert not gpu.launches


def test_gemm_launch(gpu):
    tensors, x = nm_weight(), torch.randn(33, 264).bfloat16()
    out = nm_gemm(x, tensors, None, (40, 264))
    (launch,) = gpu.launches
    cut = plan_gemm(40, 264, 33, 132, launcher.shared_memory(x.device))
    assert launch.name == cut.kernel(torch.bfloat16)
    assert launch.grid == cut.grid
    assert (launch.block, launch.shared) == ((cut.tile.threads, 1, 1), cut.tile.shared_bytes)
    assert list(launch.arguments[:5]) == pointers(*tensors, x, None, out)
    assert list(launch.arguments[-4:]) == [40, 264, 33, cut.splits]


def test_gemm_takes_the_tile_and_the_splits_it_is_told(gpu):
    nm_gemm(torch.randn(33, 264).bfloat16(), nm_weight(), None, (40, 264), tile="128x128", splits=5)
    (launch,) = gpu.launches
    assert launch.name == "nm_gemm_bf16_128x128"
    assert launch.grid == (5, 1, 1)
    assert launch.arguments[-1] == 5


def test_gemm_copies_activations_that_16_byte_loads_cannot_read(gpu):
    odd = torch.randn(20, 260).bfloat16()
    nm_gemm(odd, nm_weight(40, 260), None, (40, 260))
    view = torch.randn(1 + 20 * 264).bfloat16()[1:].view(20, 264)
    nm_gemm(view, nm_weight(), None, (40, 264))
    first, second = gpu.launches
    assert first.arguments[-3] == 264
    for launch, x in ((first, odd), (second, view)):
        assert launch.arguments[2] % 16 == 0
        assert launch.arguments[2] != x.data_ptr()


@pytest.mark.parametrize(("tokens", "kernel"), [(16, "nm_decode_bf16_16"), (17, "nm_gemm_bf16_")])
def test_the_backend_calls_the_kernel_for_so_many_tokens(gpu, tokens, kernel):
    CudaNMBackend().run(torch.randn(tokens, 264).bfloat16(), nm_weight(), None, (40, 264), None)
    assert gpu.launches[0].name.startswith(kernel)
