from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import wandapp_kernels.backends as backends
from tests.fake_backends import FakeLayout
from wandapp_kernels import dispatch
from wandapp_kernels.backends import Backend, base
from wandapp_kernels.ops import layouts
from wandapp_kernels.tuning import measure as measuring


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, only torch's dense product, and short measurements."""
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path))
    backends.load_backends()  # a module that is imported later would register its backends here, for this test only
    dense = base.BACKENDS["dense"]
    registry: dict[str, Backend] = {"dense": dense}
    unavailable: dict[str, str] = {}
    for module in (backends, base, dispatch, measuring):
        monkeypatch.setattr(module, "BACKENDS", registry)
    known = {name: layouts.LAYOUTS[name] for name in ("nm", "bitmap")} | {"fake-nm": FakeLayout()}
    for module in (backends, layouts):
        monkeypatch.setattr(module, "LAYOUTS", known)
    monkeypatch.setattr(backends, "_loaded", True)
    for module in (backends, dispatch, measuring):
        monkeypatch.setattr(module, "UNAVAILABLE", unavailable)
    monkeypatch.setattr(measuring, "last_level_cache", lambda device: 4096)
    dispatch.forget()
    yield
    dispatch.forget()
