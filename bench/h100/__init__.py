"""Everything that is worth measuring on one NVIDIA GPU, in ten minutes: ``python -m bench.h100 --out FOLDER``.

Runs from a checkout that nothing was installed from, with the packages of the system's Python. First the numbers of
every GPU kernel are compared with the reference; a wrong one stops the run. Then kernels, scoring, pruning and whole
models are timed, each within a time box; what no time was left for is listed. ``results.json`` is written after every
case, the table and the plots after every section.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_KERNELS = "wandapp_kernels.kernels"


def make_importable() -> None:
    """Let ``wandapp_kernels.kernels`` mean the folder kernels/, where no installation has mapped it."""
    import wandapp_kernels

    if importlib.util.find_spec(_KERNELS) is not None:
        return
    folder = Path(__file__).parents[2] / "kernels"
    spec = importlib.util.spec_from_file_location(
        _KERNELS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_KERNELS] = wandapp_kernels.kernels = module  # type: ignore[attr-defined]
    spec.loader.exec_module(module)
