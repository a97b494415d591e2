"""Memory really falls: measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from wandapp_kernels.pruning.memory import PeakMemory
from wandapp_kernels.runtime import memory

# 12 layers of 1024 x 4096 in fp32: 201 MB dense, 113 MB at 2:4. One layer is small beside.
SCRIPT = """
import json
import torch
from torch import nn
from wandapp_kernels.runtime import sparsify, desparsify
from wandapp_kernels.runtime.memory import peak_bytes, release_free_memory, reset_peak, resident_bytes

first = nn.Linear(128, 128)
with torch.no_grad():
    first.weight.mul_(torch.tensor([True, False, False, True]).repeat(32))
assert sparsify(nn.Sequential(first)).swapped  # loads what is loaded on first use
release_free_memory()
before = resident_bytes()
keep = torch.tensor([True, False, False, True]).repeat(1024)
model = nn.Sequential(*(nn.Linear(4096, 1024, bias=False) for _ in range(12)))
with torch.no_grad():
    for layer in model:
        layer.weight.mul_(keep)
release_free_memory()
dense = resident_bytes()
reset_peak()
report = sparsify(model)
peak, sparse = peak_bytes(), resident_bytes()
assert len(report.swapped) == 12
desparsify(model)
again = resident_bytes()
print(json.dumps([number - before for number in (dense, peak, sparse, again)] + [report.dense_bytes, report.bytes]))
"""


@pytest.fixture
def resets(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """GPUs whose peak was reset; as long as CUDA is not initialised, torch has none with a number."""
    ready, found = [], []

    def reset(device: int) -> None:
        if not ready:
            raise RuntimeError(f"Invalid device argument {device}: did you call init?")
        found.append(device)

    monkeypatch.setattr(torch._C, "_cuda_resetPeakMemoryStats", reset, raising=False)
    monkeypatch.setattr(torch.cuda, "init", lambda: ready.append(True))
    return found


def test_a_gpu_with_a_number_may_be_the_first_thing_that_is_asked_for(resets: list[int]) -> None:
    memory.reset_peak(torch.device("cuda:1"))
    PeakMemory(torch.device("cuda:0")).lap()
    assert resets == [1, 0, 0]


def test_on_a_gpu_it_is_what_torch_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, reset = torch.device("cuda:1"), []
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7 if device == gpu else 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 9 if device == gpu else 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    memory.reset_peak(gpu)
    assert (memory.resident_bytes(gpu), memory.peak_bytes(gpu), reset) == (7, 9, [gpu])
    assert memory.peak_bytes() >= memory.resident_bytes() > 10**6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_swapping_frees_each_dense_weight_before_the_next() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    dense, peak, sparse, again, dense_bytes, sparse_bytes = json.loads(done.stdout.splitlines()[-1])
    assert dense_bytes == 12 * 1024 * 4096 * 4 and sparse_bytes < 0.6 * dense_bytes
    assert dense == pytest.approx(dense_bytes, rel=0.1)
    assert sparse < 0.65 * dense
    assert peak < dense + 0.4 * dense_bytes  # two models would be more than 1.5 times one
    assert again == pytest.approx(dense_bytes, rel=0.15)
