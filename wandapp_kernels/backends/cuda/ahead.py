"""Compiling csrc/cuda ahead of time with nvcc: one fat binary a source, for every GPU there are kernels for.

``setup.py`` runs this file by its path, before anything is installed: it needs the standard library only.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
AHEAD = HERE / "cubins"

# Machine code for A100, for RTX 40 and L4, for H100; PTX for what comes later.
TARGETS = (
    "arch=compute_80,code=sm_80",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_90,code=compute_90",
)


def source_folder() -> Path:
    """Where the CUDA sources are: beside this file when installed, csrc/cuda in a checkout."""
    installed = HERE / "sources"
    return installed if installed.is_dir() else HERE.parents[2] / "csrc" / "cuda"


def sources(folder: Path) -> list[str]:
    """Names of the sources of ``folder``, without ``.cu``."""
    return [path.stem for path in sorted(folder.glob("*.cu"))]


def headers(folder: Path) -> dict[str, str]:
    """Text of every header, by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))}


@lru_cache(maxsize=64)
def source_hash(folder: Path, name: str) -> str:
    """16 hex digits of everything ``name.cu`` is compiled from."""
    digest = hashlib.sha256((folder / f"{name}.cu").read_bytes())
    for header, text in headers(folder).items():
        digest.update(f"\0{header}\0{text}".encode())
    return digest.hexdigest()[:16]


def fatbin_name(folder: Path, name: str) -> str:
    """The file ``name.cu`` is compiled to; a changed source has another name, so nothing stale is loaded."""
    return f"{name}-{source_hash(folder, name)}.fatbin"


def build(package: Path) -> list[Path]:
    """Compile every source into ``package/cubins``, those that are there already excepted.

    Args:
        package: the folder of ``wandapp_kernels.backends.cuda`` that is being installed.

    Returns:
        The fat binaries there are now. One that is missing (no nvcc, or one too old) is compiled by NVRTC at first use.
    """
    folder, target = source_folder(), package / "cubins"
    if package.resolve() != HERE.resolve():
        shutil.copytree(folder, package / "sources", dirs_exist_ok=True)
    if (nvcc := shutil.which("nvcc")) is None:
        return []
    target.mkdir(parents=True, exist_ok=True)
    wanted = [target / fatbin_name(folder, name) for name in sources(folder)]
    for stale in set(target.glob("*.fatbin")) - set(wanted):
        stale.unlink()
    for name, path in zip(sources(folder), wanted, strict=True):
        if not path.exists():
            partial = path.with_suffix(".partial")
            generate = [option for each in TARGETS for option in ("-gencode", each)]
            command = [nvcc, "-std=c++17", "-O3", "--threads", "0", "-fatbin", *generate]
            if subprocess.run([*command, str(folder / f"{name}.cu"), "-o", str(partial)]).returncode == 0:
                partial.replace(path)
    return [path for path in wanted if path.exists()]
