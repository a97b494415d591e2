"""The emulation of the AMX instructions, which the AMX kernels are tested with, against their documentation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
FLAGS = ["-std=c++17", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("tiles") / "tiles"
    source = Path(__file__).with_name("tiles.cpp")
    subprocess.run([str(COMPILER), *FLAGS, str(source), "-o", str(program)], check=True)
    return program


def run(tiles: Path, check: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(tiles), check], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("check", ["products", "rounding", "correct use"])
def test_the_emulation_does_what_the_manual_says(tiles: Path, check: str):
    done = run(tiles, check)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("ninth", "a ninth tile"),
        ("palette", "the palette is not 1"),
        ("rows", "an impossible size"),
        ("reserved", "a reserved byte"),
        ("sizes", "the sizes of three tiles do not fit"),
        ("unconfigured", "before tiles are configured"),
        ("twice", "before they are released"),
        ("unreleased", "ends with configured tiles"),
    ],
)
def test_the_emulation_ends_where_a_processor_would_fault(tiles: Path, how: str, words: str):
    done = run(tiles, how)
    assert done.returncode != 0 and words in done.stderr
