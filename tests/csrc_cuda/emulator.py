"""Compiles CUDA sources for the host with the emulation of csrc/emulation, and launches kernels on numpy arrays."""

from __future__ import annotations

import os
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
HARNESS = ("simt.cpp", "shared_memory.cpp", "lanes.cpp", "runner.cpp")


class EmulationError(AssertionError):
    """A kernel broke a rule of the machine: the message of the emulation or of a sanitizer."""


@dataclass(frozen=True)
class Unaligned:
    """A buffer that starts `offset` bytes after an aligned address."""

    array: np.ndarray
    offset: int


@dataclass(frozen=True)
class Same:
    """The buffer of argument number `index`, counted over all launches of the run."""

    index: int


Argument = np.ndarray | Unaligned | Same | int | None


@dataclass(frozen=True)
class Launch:
    """One kernel launch; grid as in CUDA, `arguments` in the kernel's order.

    Results must not depend on `order`: 0 runs CTAs first to last, 1 CTAs and their threads last to first, 2 CTAs in
    strides.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: Sequence[Argument] = field(default_factory=tuple)
    order: int = 0

    def pack(self) -> bytes:
        name = self.kernel.encode()
        head = struct.pack("<I", len(name)) + name
        shape = (*self.grid, self.threads, self.shared_bytes, int(self.order), len(self.arguments))
        return head + struct.pack("<7I", *shape) + b"".join(map(_pack, self.arguments))


def _pack(argument: Argument) -> bytes:
    if argument is None:
        return b"0"
    if isinstance(argument, Same):
        return b"b" + struct.pack("<I", argument.index)
    if isinstance(argument, (int, np.integer)):
        return b"i" + struct.pack("<q", int(argument))
    array, offset = (argument.array, argument.offset) if isinstance(argument, Unaligned) else (argument, 0)
    return b"p" + struct.pack("<2Q", array.nbytes, offset) + np.ascontiguousarray(array).tobytes()


def compile_objects(sources: Sequence[Path], folder: Path, flags: Sequence[str] = SANITIZE) -> list[Path]:
    """Object files of host sources, two compilers at a time. The machine is optimised, the kernels compile fast."""
    objects = [folder / f"{source.stem}.o" for source in sources]
    pending = list(zip(sources, objects, strict=True))
    running: list[tuple[Path, subprocess.Popen[str]]] = []
    while pending or running:
        while pending and len(running) < 2:
            source, target = pending.pop(0)
            command = [
                "g++",
                "-std=c++17",
                "-g1",
                "-Wall",
                "-Wextra",
                "-Wno-unknown-pragmas",
                "-Werror",
                "-DWANDAPP_EMULATION",
                *flags,
            ]
            command.append("-O2" if source.name in HARNESS else "-O0")
            command += ["-I", str(CSRC), "-c", str(source), "-o", str(target)]
            running.append((source, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        source, process = running.pop(0)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{source} does not compile:\n{errors}")
    return objects


def link(objects: Sequence[Path], target: Path, flags: Sequence[str] = SANITIZE) -> Emulator:
    subprocess.run(["g++", *flags, *map(str, objects), "-o", str(target)], check=True)
    return Emulator(target)


@dataclass(frozen=True)
class Emulator:
    """The compiled kernels of one executable."""

    executable: Path

    def run(self, *launches: Launch, timeout: float = 60) -> list[np.ndarray]:
        """Runs the launches in one process; returns every array argument, in order, as the kernels left it.

        Raises:
            EmulationError: a kernel broke a rule (race, missing wait, out of bounds, bad metadata, deadlock, ...).
        """
        arrays = [
            argument.array if isinstance(argument, Unaligned) else argument
            for launch in launches
            for argument in launch.arguments
            if isinstance(argument, (np.ndarray, Unaligned))
        ]
        with tempfile.TemporaryDirectory() as folder:
            request, result = Path(folder) / "request", Path(folder) / "result"
            request.write_bytes(b"".join(launch.pack() for launch in launches))
            command = [str(self.executable), str(request), str(result)]
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
            if done.returncode:
                raise EmulationError(done.stderr.strip() or f"the emulation ended with status {done.returncode}")
            content = result.read_bytes()
        ends = np.cumsum([array.nbytes for array in arrays])
        return [
            np.frombuffer(content[end - array.nbytes : end], dtype=array.dtype).reshape(array.shape).copy()
            for array, end in zip(arrays, ends, strict=True)
        ]
