"""Launches through CuPy: grids, shared memory, arguments, streams, workspaces, and every refusal before a launch."""

from __future__ import annotations

import builtins
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_problem import bitmap_weight, nm_weight, pointers
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp_kernels.backends.base import Problem
from wandapp_kernels.backends.cuda import bitmap, launcher
from wandapp_kernels.backends.cuda import nm as nm_backend
from wandapp_kernels.backends.cuda.ahead import source_folder
from wandapp_kernels.backends.cuda.bitmap import CudaBitmapBackend, bitmap_decode, decompress, plan_decode
from wandapp_kernels.backends.cuda.bitmap_layout import panel_counts
from wandapp_kernels.backends.cuda.nm import CudaNMBackend, nm_decode, nm_gemm, nm_swiglu, nm_swiglu_refusal
from wandapp_kernels.backends.cuda.plan import plan
from wandapp_kernels.errors import KernelError


def test_bitmap_launch(gpu):
    tensors, x = bitmap_weight(), torch.randn(3, 264).bfloat16()
    bias = torch.randn(40).bfloat16()
    out = bitmap_decode(x, tensors, bias, (40, 264))
    (launch,) = gpu.launches
    assert launch.name == "bitmap_decode_bf16_8"
    assert (launch.grid, launch.block) == ((3, 1, 1), (256, 1, 1))
    assert launch.shared == 8 * 3 * (256 + 4096)
    assert launch.allowed_shared == 232448
    assert gpu.loaded == [("bitmap_decode_bf16_8", 0)]
    assert launch.stream == gpu.stream
    assert list(launch.arguments[:8]) == pointers(*tensors, x, bias, out, None, None)
    assert list(launch.arguments[8:]) == [3, 40, 264, 8]
    assert out.shape == (3, 40)
    assert out.dtype == torch.bfloat16


def test_bitmap_launch_that_splits_k_has_a_workspace(gpu):
    tensors = bitmap_weight(40, 4096, torch.float16)
    bitmap_decode(torch.randn(16, 4096).half(), tensors, None, (40, 4096))
    (launch,) = gpu.launches
    cut = plan_decode(16, (40, 4096), 132, 232448)
    assert cut.splits > 1
    assert launch.name == "bitmap_decode_fp16_16"
    assert launch.grid == (cut.ctas, cut.splits, 1)
    assert launch.arguments[4] == 0
    assert launch.arguments[6] != 0
    assert launch.arguments[7] == launcher._counters[0, gpu.stream].data_ptr()


def test_columns_that_are_no_multiple_of_8_are_padded(gpu):
    out = bitmap_decode(torch.randn(2, 131).bfloat16(), bitmap_weight(17, 131), None, (17, 131))
    assert gpu.launches[0].arguments[10] == 136
    assert out.shape == (2, 17)


def test_an_unaligned_view_is_copied(gpu):
    x = torch.randn(1 + 2 * 128).bfloat16()[1:].view(2, 128)
    assert x.data_ptr() % 16
    bitmap_decode(x, bitmap_weight(16, 128), None, (16, 128))
    assert gpu.launches[0].arguments[3] not in (0, x.data_ptr())


def test_decompress_launch(gpu):
    tensors = bitmap_weight(40, 264)
    out = decompress(tensors, (40, 264))
    (launch,) = gpu.launches
    assert (launch.grid, launch.block, launch.shared) == ((2, 1, 1), (256, 1, 1), 8 * 4352)
    assert list(launch.arguments) == [*pointers(*tensors, out), 40, 264]


def test_nm_launch(gpu):
    tensors, x = nm_weight(), torch.randn(5, 264).bfloat16()
    out = nm_decode(x, tensors, None, (40, 264))
    (launch,) = gpu.launches
    cut = plan(40, 264, 5, 132)
    assert launch.name == cut.kernel(torch.bfloat16)
    assert launch.grid == cut.grid
    assert launch.shared == cut.shared_bytes
    assert list(launch.arguments[:5]) == pointers(*tensors, x, None, out)
    assert list(launch.arguments[-4:]) == [40, 264, 5, cut.splits]


def test_swiglu_launch(gpu):
    gate, up, x = nm_weight(), nm_weight(), torch.randn(2, 264).bfloat16()
    out = nm_swiglu(x, gate, up, None, None, (40, 264))
    (launch,) = gpu.launches
    assert launch.name == "nm_swiglu_bf16_8"
    assert list(launch.arguments[:8]) == pointers(*gate, *up, x, None, None, out)


def test_counters_are_kept_by_stream(gpu):
    device = torch.device("cpu")
    first = launcher.counters(10, device)
    assert launcher.counters(4000, device) is first
    assert launcher.counters(5000, device).numel() == 5000
    gpu.stream = 78
    assert launcher.counters(10, device).data_ptr() != launcher._counters[0, 77].data_ptr()


def test_every_captured_launch_has_counters_of_its_own_and_fills_nothing(gpu, monkeypatch):
    device = torch.device("cpu")
    eager = launcher.counters(10, device)
    monkeypatch.setattr(torch, "zeros", pytest.fail)
    gpu.capturing = True
    captured = [launcher.counters(count, device) for count in (10, 33, 10)]
    starts = [tensor.data_ptr() - captured[0].data_ptr() for tensor in captured]
    assert starts == [0, 4 * 32, 4 * (32 + 64)]
    assert not any(tensor.any() for tensor in captured)
    assert eager.untyped_storage().data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in captured}


def test_counters_for_captured_launches_are_laid_in_stock_by_calls_that_are_not_captured(gpu, monkeypatch):
    monkeypatch.setattr(launcher, "_SLAB", 128)
    device = torch.device("cpu")
    gpu.capturing = True
    assert not launcher.counters(10, device).any()  # nothing in stock: the graph zeroes its own
    assert not launcher._slabs
    gpu.capturing = False
    launcher.counters(10, device)
    gpu.capturing = True
    launcher.counters(60, device)
    last = launcher.counters(64, device)
    first_slab = launcher._slabs[0][0]
    assert last.data_ptr() == first_slab.data_ptr() + 4 * 64
    assert launcher.counters(1, device).untyped_storage().data_ptr() != first_slab.untyped_storage().data_ptr()
    gpu.capturing = False
    launcher.counters(10, device)
    assert launcher._slabs[0][0] is first_slab
    assert len(launcher._slabs[0]) == 2
    gpu.capturing = True
    assert launcher.counters(1, device).data_ptr() == launcher._slabs[0][1].data_ptr()


def test_what_outlives_a_call_is_memory_of_cupy(gpu, monkeypatch):
    made = []
    zeros = sys.modules["cupy"].zeros
    monkeypatch.setattr(sys.modules["cupy"], "zeros", lambda *a, **k: made.append(gpu.active_stream) or zeros(*a, **k))
    bitmap_decode(torch.randn(16, 4096).half(), bitmap_weight(40, 4096, torch.float16), None, (40, 4096))
    assert made == [gpu.stream, gpu.stream]  # the stock and the stream's own, zeroed on torch's stream


def test_swiglu_takes_any_leading_dimensions_and_views(gpu, monkeypatch):
    monkeypatch.setattr(nm_backend, "why_not", lambda device, dtype: None)
    gate, up = nm_weight(), nm_weight()
    x = torch.randn(264, 2, 3).bfloat16().permute(1, 2, 0)
    assert nm_swiglu_refusal(x, gate, up, None, None, (40, 264)) is None
    assert nm_swiglu(x, gate, up, None, None, (40, 264)).shape == (2, 3, 40)
    assert list(gpu.launches[0].arguments[-4:-1]) == [40, 264, 6]


def test_swiglu_says_why_it_refuses(gpu, monkeypatch):
    gate, up, x = nm_weight(), nm_weight(), torch.randn(2, 264).bfloat16()

    def refused(x=x, gate=gate, up=up, gate_bias=None, up_bias=None, shape=(40, 264)):
        return nm_swiglu_refusal(x, gate, up, gate_bias, up_bias, shape)

    assert "on cpu" in refused()
    monkeypatch.setattr(nm_backend, "why_not", lambda device, dtype: None)
    assert refused() is None
    assert "64 tokens" in refused(x=torch.zeros(5, 13, 264).bfloat16())
    assert "weight wants [tokens, 264]" in refused(x=torch.zeros(0, 264).bfloat16())
    assert "(40, 264)" in refused(x=torch.zeros(2, 260).bfloat16())
    assert "gate has 4 tensors" in refused(gate=[*gate, *up], up=[])
    assert "float16" in refused(up=nm_weight(dtype=torch.float16))
    assert "values is" in refused(up=nm_weight(104, 264))
    assert "bias is" in refused(up_bias=torch.zeros(41).bfloat16())
    with pytest.raises(KernelError, match=r"\(40, 264\)"):
        nm_swiglu(torch.zeros(2, 260).bfloat16(), gate, up, None, None, (40, 264))
    assert not gpu.launches


def test_a_refused_launch_names_the_kernel(gpu):
    gpu.refuses = True
    with pytest.raises(KernelError, match=r"bitmap_decode_bf16_8 cannot be launched.*CUDA_ERROR_INVALID_VALUE"):
        bitmap_decode(torch.randn(1, 128).bfloat16(), bitmap_weight(16, 128), None, (16, 128))


@pytest.mark.parametrize("bound", [False, True])
def test_a_thread_that_has_run_nothing_on_the_gpu_gets_a_context(gpu, bound):
    x, tensors = torch.randn(1, 128).bfloat16(), bitmap_weight(16, 128)
    call = CudaBitmapBackend().bind(tensors, None, (16, 128), None)

    def run() -> None:
        if bound:
            call(x, (tensors, None))
        else:
            bitmap_decode(x, tensors, None, (16, 128))

    run()
    gpu.threads = {threading.get_ident()}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
        assert len(gpu.launches) == 2
        gpu.threads.clear()  # making one did not help: no endless attempts
        with pytest.raises(KernelError, match="CUDA_ERROR_INVALID_CONTEXT"):
            pool.submit(run).result()


def test_a_kernel_that_cannot_be_loaded_under_capture_says_what_to_do(gpu, monkeypatch):
    def refuse(path):
        raise RuntimeError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    monkeypatch.setattr(sys.modules["cupy"], "RawModule", refuse)
    gpu.capturing = True
    x = torch.randn(1, 128).bfloat16()
    with pytest.raises(KernelError, match=r"CAPTURE_UNSUPPORTED.*call it once before the capture"):
        bitmap_decode(x, bitmap_weight(16, 128), None, (16, 128))
    for backend, tensors in ((CudaNMBackend(), nm_weight(16, 128)), (CudaBitmapBackend(), bitmap_weight(16, 128))):
        with pytest.raises(KernelError, match=r"CAPTURE_UNSUPPORTED.*call it once before the capture"):
            backend.bind(tensors, None, (16, 128), None)(x, (tensors, None))


@pytest.mark.parametrize(
    "failure",
    [
        ImportError("libnvrtc.so.13:\n cannot open shared object file"),
        ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"),
        RuntimeError("CUDA driver version is insufficient"),
    ],
)
def test_a_broken_cupy_is_a_reason_and_no_crash(gpu, monkeypatch, failure):
    real = builtins.__import__

    def importing(name, *arguments, **options):
        if name == "cupy":
            raise failure
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
    launcher._cupy_missing.cache_clear()
    reason = CudaBitmapBackend().supports(problem())
    assert " ".join(str(failure).split()) in reason
    assert "cupy-cuda13x" in reason
    assert "\n" not in reason


def broken_weights() -> dict[str, list[torch.Tensor]]:
    values, words, offsets = bitmap_weight(16, 128)
    return {
        "values is torch.float16": [values.half(), words, offsets],
        "offsets is torch.int64": [values, words, offsets.long()],
        "bitmap is not contiguous": [values, words.expand(2, 1, 32, 2)[:, 0].transpose(1, 2), offsets],
        "does not start at a multiple of 16": [torch.cat([values[:1], values])[1:], words, offsets],
        "has 1 panels": [values, words.repeat(2, 1, 1), offsets],
        "offsets is on meta": [values, words, offsets.to("meta")],
    }


@pytest.mark.parametrize("message", list(broken_weights()))
def test_a_wrong_weight_is_refused_before_the_launch(gpu, message):
    with pytest.raises(KernelError, match=message):
        bitmap_decode(torch.randn(1, 128).bfloat16(), broken_weights()[message], None, (16, 128))
    assert not gpu.launches


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.zeros(17, 128, dtype=torch.bfloat16), None),
        (torch.zeros(0, 128, dtype=torch.bfloat16), None),
        (torch.zeros(1, 127, dtype=torch.bfloat16), None),
        (torch.zeros(128, 2, dtype=torch.bfloat16).t(), None),
        (torch.zeros(1, 128), None),
        (torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(15, dtype=torch.bfloat16)),
        (torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(16)),
    ],
)
def test_wrong_activations_are_refused_before_the_launch(gpu, x, bias):
    with pytest.raises(KernelError):
        bitmap_decode(x, bitmap_weight(16, 128), bias, (16, 128))
    with pytest.raises(KernelError):
        nm_decode(x[:, :0], nm_weight(16, 128), bias, (16, 128))
    with pytest.raises(KernelError):
        nm_gemm(x[:, :0], nm_weight(16, 128), bias, (16, 128))
    assert not gpu.launches


def problem(**changes) -> Problem:
    settled = {
        "operator": "bitmap_linear",
        "tokens": 8,
        "out_features": 64,
        "in_features": 128,
        "pattern": "unstructured",
        "density_bucket": 50,
        "dtype": torch.bfloat16,
        "device": "cuda:0",
        "threads": 0,
    }
    return Problem(**{**settled, **changes})


def test_supports_says_why_not(gpu, monkeypatch):
    backend = CudaBitmapBackend()
    assert backend.supports(problem()) is None
    assert CudaNMBackend().supports(problem(operator="nm_linear", pattern="2:4")) is None
    assert "16 tokens" in backend.supports(problem(tokens=32))
    assert CudaNMBackend().supports(problem(operator="nm_linear", pattern="2:4", tokens=1024)) is None
    assert "1024 tokens" in CudaNMBackend().supports(problem(pattern="2:4", tokens=2048))
    assert "2:4 only" in CudaNMBackend().supports(problem(pattern="4:8"))
    assert "float16 and bfloat16" in backend.supports(problem(dtype=torch.float32))
    assert "on cpu" in backend.supports(problem(device="cpu"))
    gpu.capability = (7, 5)
    assert "7.5 is too old" in backend.supports(problem())
    gpu.capability = (9, 0)
    launcher._cupy_missing.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "wandapp_kernels[cuda13]" in backend.supports(problem())


def test_supports_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in CudaBitmapBackend().supports(problem())


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(1, 16),
    rows=st.integers(1, 40000),
    columns=st.integers(1, 40000),
    sms=st.sampled_from([20, 108, 132]),
    shared=st.sampled_from([101376, 166912, 232448]),
)
def test_plans_cover_the_weight_and_fit(tokens, rows, columns, sms, shared):
    cut = plan_decode(tokens, (rows, columns), sms, shared)
    slabs, panels = panel_counts((rows, columns))
    assert (cut.ctas - 1) * cut.slabs_per_cta < slabs <= cut.ctas * cut.slabs_per_cta
    assert cut.splits >= 1
    assert cut.splits == 1 or cut.splits * cut.warps_per_slab * 2 <= panels
    assert cut.threads <= 256
    assert cut.shared_bytes <= shared
    assert tokens <= 8 * cut.token_tiles
    assert cut.ctas < 2**31
    assert cut.splits < 65536


def test_the_constants_are_those_of_the_kernel():
    folder = source_folder()
    panel = (folder / "bitmap_panel.cuh").read_text()
    decode = (folder / "bitmap_decode.cuh").read_text()
    assert f"kStages = {bitmap.STAGES};" in decode
    assert f"kMostThreads = {32 * bitmap.WARPS};" in decode
    assert "kSlabRows = 16;" in panel
    assert "kPanelColumns = 128;" in panel
    assert bitmap.SLOT_BYTES == 32 * 8 + 16 * 128 * 2
    assert nm_backend.SWIGLU_TOKENS % 32 == 0
