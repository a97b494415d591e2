"""What the Makefile would do in a folder where ``.venv`` was made before; nothing is run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEPT = {name: value for name, value in os.environ.items() if name not in ("TORCH", "MAKEFLAGS", "MAKELEVEL")}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def would_install(folder: Path, *arguments: str, **environment: str) -> bool:
    """Whether ``make -n lint`` installs a torch, and then the package on it."""
    command = ["make", "-n", "lint", *arguments]
    done = subprocess.run(command, cwd=folder, env=KEPT | environment, capture_output=True, text=True, check=True)
    found = ["pip install" in line and "torch==" in line for line in done.stdout.splitlines()]
    assert any(found) == ("pip install --quiet -e" in done.stdout)
    return any(found)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A checkout whose ``.venv`` is ready, with torch 2.13.0."""
    for name in ("Makefile", "requirements-bundled.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    assert would_install(tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in (".torch", ".ready"):
        (tmp_path / ".venv" / name).write_text("torch==2.13.0\n")
    return tmp_path


def test_a_torch_that_is_named_is_installed_over_another_one(made: Path) -> None:
    assert would_install(made, "TORCH=torch==2.14.1")
    assert would_install(made, TORCH="torch==2.14.1")
    assert not would_install(made, "TORCH=torch==2.13.0")


def test_what_was_made_is_kept_where_no_torch_is_named(made: Path) -> None:
    assert not would_install(made)
    default = made / "Makefile"
    default.write_text(default.read_text().replace("TORCH ?= torch==2.13.0", "TORCH ?= torch==2.14.1"))
    assert not would_install(made)
