"""Doing something once a module has been imported, without importing it: transformers takes seconds."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call ``action`` now if the module ``name`` has been imported, else right after it is, inside that import."""
    finder = _Finder(name, action)
    sys.meta_path.insert(0, finder)
    if name in sys.modules:
        sys.meta_path.remove(finder)
        action()


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and lets its loader call ``action``, until an import has succeeded."""

    def __init__(self, name: str, action: Callable[[], object]):
        self.name = name
        self._action = action
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._done)
        return spec

    def _done(self) -> None:
        with suppress(ValueError):
            sys.meta_path.remove(self)
        self._action()


class _Loader(Loader):
    def __init__(self, loader: Loader, done: Callable[[], object]):
        self.loader = loader
        self.done = done

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # get_source and the like

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader  # the wrapper leaves no trace
        self.loader.exec_module(module)
        self.done()
