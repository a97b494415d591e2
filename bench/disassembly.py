"""What the compiler made of a CUDA kernel: registers, spills, and the instructions of its main loop."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from wandapp_kernels.backends.cuda.ahead import source_folder, source_hash
from wandapp_kernels.cache import cache_dir

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One instruction of the machine code: its address, name with modifiers, and operands."""

    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Compiled:
    """One kernel of a cubin."""

    name: str
    registers: int
    stack_bytes: int
    instructions: tuple[Instruction, ...]

    def count(self, *prefixes: str) -> int:
        """Instructions whose name starts with one of ``prefixes``."""
        return sum(instruction.name.startswith(prefixes) for instruction in self.instructions)

    def loop_with(self, prefix: str) -> tuple[Instruction, ...]:
        """The smallest loop that holds the most instructions named ``prefix``: a kernel's main loop."""
        found: list[tuple[int, int, tuple[Instruction, ...]]] = []
        for branch in self.instructions:
            target = re.search(r"0x([0-9a-f]+)", branch.operands)
            if branch.name.startswith("BRA") and target and (start := int(target[1], 16)) < branch.address:
                body = tuple(each for each in self.instructions if start <= each.address <= branch.address)
                wanted = sum(each.name.startswith(prefix) for each in body)
                if wanted:
                    found.append((-wanted, len(body), body))
        return min(found, key=lambda item: item[:2])[2] if found else ()


def missing_tools() -> str | None:
    """None when kernels can be compiled and disassembled here, else what is missing."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    return None if _cuobjdump() else "cuobjdump is neither on the PATH nor in a triton package"


@lru_cache(maxsize=1)
def _cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        tool = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    return None


@lru_cache(maxsize=32)
def cubin(source: str, architecture: str) -> Path:
    """``csrc/cuda/source.cu`` as machine code for ``sm_80``, ``sm_90a``, …; kept in the cache folder."""
    folder = source_folder()
    target = cache_dir() / "cuda" / f"{source}-{source_hash(folder, source)}-{architecture}-nvcc.cubin"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        generate = f"arch=compute_{architecture.removeprefix('sm_')},code={architecture}"
        partial = target.with_suffix(f".{hashlib.sha256(str(target).encode()).hexdigest()[:8]}")
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-gencode", generate, str(folder / f"{source}.cu")]
        subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True)
        partial.replace(target)
    return target


@lru_cache(maxsize=64)
def disassemble(source: str, kernel: str, architecture: str) -> Compiled:
    """One kernel of a source, compiled for ``architecture``."""
    path, tool = cubin(source, architecture), _cuobjdump()
    assert tool is not None, missing_tools()
    listing = _run(tool, "-sass", "-fun", kernel, str(path))
    usage = _run(tool, "-res-usage", "-fun", kernel, str(path))
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    instructions = tuple(
        Instruction(int(found[1], 16), found[2], found[3])
        for line in listing.splitlines()
        if (found := _INSTRUCTION.match(line))
    )
    return Compiled(kernel, int(resources["REG"]), int(resources["STACK"]), instructions)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
