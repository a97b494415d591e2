"""The CUDA kernels compiled for the host, once per session, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from emulator import CSRC, Emulator, compile_objects, link


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    if shutil.which("g++") is None:
        pytest.skip("g++ is needed to compile the kernels for the host")
    folder = tmp_path_factory.mktemp("emulation")
    sources = [path for path in sorted((CSRC / "emulation").glob("*.cpp")) if not path.name.startswith("avx512")]
    sources += sorted(Path(__file__).parent.glob("*.cpp"))
    return link(compile_objects(sources, folder), folder / "emulate")
