"""Test helpers lie in this folder (`from tiny_models import tiny_model`); no test may reach a model hub."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)
CACHE = os.environ.get("WANDAPP_CACHE")


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What was measured on this machine, or by another test, decides nothing; a test may name a cache of its own."""
    from wandapp_kernels import cache, dispatch
    from wandapp_kernels.tuning import store

    def cache_dir() -> Path:
        return tmp_path / "measured" if os.environ.get("WANDAPP_CACHE") == CACHE else cache.cache_dir()

    monkeypatch.setattr(store, "cache_dir", cache_dir)
    dispatch.forget()
    yield
    dispatch.forget()
