"""An action that waits for an import."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from wandapp_kernels.integrations.after_import import after_import


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "waited_for").mkdir()
    (tmp_path / "waited_for" / "__init__.py").write_text("from waited_for.inner import value\nlater = value + 1\n")
    (tmp_path / "waited_for" / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for module in ("waited_for", "waited_for.inner"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return "waited_for.inner"


def test_it_is_done_inside_the_import_and_once(name: str) -> None:
    seen: list[tuple[int, bool]] = []

    def action() -> None:
        inner = importlib.import_module(name)
        seen.append((inner.value, hasattr(sys.modules["waited_for"], "later")))

    before = list(sys.meta_path)
    after_import(name, action)
    assert not seen and name not in sys.modules
    import waited_for

    assert seen == [(1, False)] and waited_for.later == 2  # before the package has used the module
    assert sys.meta_path == before
    inner = sys.modules[name]
    assert inner.__spec__.loader is inner.__loader__ and Path(inner.__file__).is_file()
    importlib.reload(inner)
    assert len(seen) == 1


def test_it_is_done_at_once_if_the_module_is_there(name: str) -> None:
    importlib.import_module(name)
    before, seen = list(sys.meta_path), []
    after_import(name, lambda: seen.append(1))
    assert seen == [1] and sys.meta_path == before


def test_a_module_that_is_nowhere_stays_nowhere(name: str) -> None:
    after_import("waited_for.nowhere", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("waited_for.nowhere")
    assert importlib.import_module(name).value == 1


def test_an_import_that_failed_is_waited_for_again(name: str, tmp_path: Path) -> None:
    inner = tmp_path / "waited_for" / "inner.py"
    seen: list[int] = []
    inner.write_text("raise RuntimeError('first')\n")
    after_import(name, lambda: seen.append(1))
    with pytest.raises(RuntimeError, match="first"):
        importlib.import_module(name)
    assert not seen
    inner.write_text("value = 1  # longer, so that no cached bytecode is taken for it\n")
    importlib.invalidate_caches()
    assert importlib.import_module(name).value == 1 and seen == [1]
