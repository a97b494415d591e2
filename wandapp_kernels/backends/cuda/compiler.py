"""From a CUDA source in csrc/cuda to something a GPU loads: compiled ahead by ``setup.py``, else by NVRTC at first use.

Everything compiled carries the hash of its source (with all headers) in its name, so nothing stale is ever loaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from wandapp_kernels.backends.cuda.ahead import AHEAD, fatbin_name, headers, source_folder, source_hash, sources
from wandapp_kernels.cache import cache_dir
from wandapp_kernels.errors import KernelError

NO_JIT = "WANDAPP_NO_JIT"


def why_not(capability: tuple[int, int]) -> str | None:
    """None when every kernel was compiled ahead, or can be for a GPU of ``capability``; else the reason in a sentence.

    It is asked before anything is compiled, so that a layer is given to another backend: inside a product, or while a
    weight is packed, it would be too late.
    """
    folder = source_folder()
    if all((AHEAD / fatbin_name(folder, name)).exists() for name in sources(folder)):
        return None
    try:
        _find_nvrtc(capability)
    except KernelError as error:
        return str(error)
    return None


def compiled(name: str, capability: tuple[int, int]) -> Path:
    """A file with the kernels of ``name.cu`` that a GPU of ``capability`` loads.

    Args:
        name: a source of csrc/cuda, without ``.cu``.
        capability: compute capability, ``(9, 0)`` for an H100.

    Raises:
        KernelError: nothing was compiled ahead and NVRTC is disabled (``$WANDAPP_NO_JIT``), missing or fails.
    """
    ahead = AHEAD / fatbin_name(source_folder(), name)
    if ahead.exists():
        return ahead
    return _compile_at_first_use(name, capability)


def _compile_at_first_use(name: str, capability: tuple[int, int]) -> Path:
    nvrtc, version, architecture, is_binary = _find_nvrtc(capability)
    folder = source_folder()
    stem = f"{name}-{source_hash(folder, name)}-{architecture}-nvrtc{version[0]}.{version[1]}"
    result = cache_dir() / "cuda" / f"{stem}.{'cubin' if is_binary else 'ptx'}"
    result.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{result}.lock"):
        if not result.exists():
            image = _run_nvrtc(nvrtc, folder, name, architecture, is_binary)
            partial = result.with_suffix(f".{os.getpid()}")
            partial.write_bytes(image)
            partial.replace(result)
    return result


def target(capability: tuple[int, int], supported: list[int]) -> tuple[str, bool]:
    """NVRTC's name of the target, and whether it is machine code (else PTX for a GPU newer than the compiler)."""
    wanted = 10 * capability[0] + capability[1]
    if wanted in supported:
        return f"sm_{wanted}{'a' if wanted >= 90 else ''}", True
    older = [architecture for architecture in supported if architecture < wanted]
    if not older:
        raise KernelError(f"this NVRTC knows no target for compute capability {capability[0]}.{capability[1]}")
    return f"compute_{max(older)}", False


def _find_nvrtc(capability: tuple[int, int]) -> tuple[Any, tuple[int, int], str, bool]:
    """NVRTC, its version, and its `target`.

    Raises:
        KernelError: it is forbidden, not there, does not load, or is too old for the GPU.
    """
    if os.environ.get(NO_JIT):
        raise KernelError(
            f"the CUDA kernels were not compiled when the package was installed, and ${NO_JIT} forbids compiling them "
            "now: unset it, or install with nvcc on the PATH"
        )
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        raise KernelError(
            f'CUDA kernels are launched through CuPy: pip install "wandapp_kernels[cuda13]" ({error})'
        ) from error
    try:
        version, supported = nvrtc.getVersion(), list(nvrtc.getSupportedArchs())
    except Exception as error:
        raise KernelError(
            f"the CUDA kernels cannot be compiled: NVRTC does not load ({' '.join(str(error).split())}); install nvcc "
            'and this package again, or pip install "cupy-cuda13x[ctk]"'
        ) from error
    return nvrtc, version, *target(capability, supported)


def _run_nvrtc(nvrtc: Any, folder: Path, name: str, architecture: str, is_binary: bool) -> bytes:
    included = headers(folder)
    source = (folder / f"{name}.cu").read_text(encoding="utf-8")
    texts, names = [text.encode() for text in included.values()], [header.encode() for header in included]
    program = nvrtc.createProgram(source, f"{name}.cu", texts, names)
    try:
        nvrtc.compileProgram(program, ("--std=c++17", f"--gpu-architecture={architecture}"))
        image = nvrtc.getCUBIN(program) if is_binary else nvrtc.getPTX(program)
    except Exception as error:
        raise KernelError(f"NVRTC cannot compile {name}.cu: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    return bytes(image)
