"""What the Makefile would do in a folder where ``.venv`` was made before; nothing is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEPT = {name: value for name, value in os.environ.items() if name not in ("TORCH", "PYTHON", "MAKEFLAGS", "MAKELEVEL")}

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def dry_run(folder: Path, *arguments: str, **environment: str) -> str:
    """What ``make -n lint`` prints."""
    command = ["make", "-n", "lint", *arguments]
    done = subprocess.run(command, cwd=folder, env=KEPT | environment, capture_output=True, text=True, check=True)
    return done.stdout


def would_install(folder: Path, *arguments: str, **environment: str) -> bool:
    """Whether it installs a torch, and then the package on it."""
    shown = dry_run(folder, *arguments, **environment)
    found = ["pip install" in line and "torch==" in line for line in shown.splitlines()]
    assert any(found) == ("pip install --quiet -e" in shown)
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


def has_python(folder: Path, tag: str) -> None:
    """Give ``.venv`` a Python that says which one it is."""
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(f"#!/bin/sh\necho {tag}\n")
    python.chmod(0o755)


def test_a_python_that_is_named_replaces_another_one_and_keeps_the_torch(made: Path) -> None:
    for name in (".torch", ".ready"):
        (made / ".venv" / name).write_text("torch==2.14.1\n")
    has_python(made, "cpython-27")
    for how in (("PYTHON=" + sys.executable,), ()):
        shown = dry_run(made, *how, **({} if how else {"PYTHON": sys.executable}))
        assert f"{sys.executable} -m venv --clear .venv" in shown and "torch==2.14.1" in shown
    assert "torch==2.12.0" in dry_run(made, f"PYTHON={sys.executable}", "TORCH=torch==2.12.0")
    assert not would_install(made)  # none is named
    has_python(made, sys.implementation.cache_tag)
    assert not would_install(made, f"PYTHON={sys.executable}")
    assert "--clear" not in dry_run(made, f"PYTHON={sys.executable}", "TORCH=torch==2.12.0")


def test_a_python_that_is_not_there_deletes_nothing(made: Path) -> None:
    has_python(made, "cpython-27")
    done = subprocess.run(["make", "lint", "PYTHON=nopython"], cwd=made, env=KEPT, capture_output=True, check=False)
    assert done.returncode != 0 and b"nopython" in done.stderr
    assert (made / ".venv" / ".ready").exists()
