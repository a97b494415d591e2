"""A GPU that records launches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_problem import CACHED
from fake_cupy import Gpu, install

from wandapp_kernels.backends.cuda import launcher


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator[Gpu]:
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path))
    for kept in ("_counters", "_slabs", "_given"):
        monkeypatch.setattr(launcher, kept, {})
    for cached in CACHED:
        cached.cache_clear()
    yield install(monkeypatch)
    for cached in CACHED:
        cached.cache_clear()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
