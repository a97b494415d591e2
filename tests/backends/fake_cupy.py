"""The small part of CuPy and torch.cuda that the launcher uses, recording instead of running."""

from __future__ import annotations

import ctypes
import itertools
import sys
import threading
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch


@dataclass
class Launched:
    name: str
    path: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple[Any, ...]
    shared: int
    allowed_shared: int
    stream: int


@dataclass
class Gpu:
    """What the fake GPU was asked to do, and what it says of itself."""

    launches: list[Launched] = field(default_factory=list)
    stream: int = 77
    capturing: bool = False
    capability: tuple[int, int] = (9, 0)
    active_stream: int | None = None
    refuses: bool = False
    threads: set[int] | None = None  # those that have a context; None: all
    compilations: list[tuple[str, ...]] = field(default_factory=list)
    nvrtc_version: tuple[int, int] = (13, 0)
    nvrtc_fails: bool = False
    device: int | None = None
    loaded: list[tuple[str, int | None]] = field(default_factory=list)
    kernels: dict[int, Any] = field(default_factory=dict)

    def mem_get_info(self, device=None):
        if self.threads is not None:
            self.threads.add(threading.get_ident())
        return 1 << 30, 1 << 30

    def launch(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        """``cuLaunchKernel``: an array of addresses of the arguments, 8 bytes each, that ends with a null pointer."""
        if self.refuses:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE")
        if self.threads is not None and threading.get_ident() not in self.threads:
            raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        assert extra == 0
        kernel = self.kernels[function]
        places = (ctypes.c_void_p.from_address(parameters + 8 * i).value for i in itertools.count())
        values = tuple(ctypes.c_uint64.from_address(place).value for place in itertools.takewhile(bool, places))
        allowed = kernel.max_dynamic_shared_size_bytes
        launched = Launched(kernel.name, kernel.path, (gx, gy, gz), (bx, by, bz), values, shared, allowed, stream)
        self.launches.append(launched)


class _Kernel:
    def __init__(self, gpu: Gpu, path: str, name: str):
        self.path, self.name = path, name
        self.max_dynamic_shared_size_bytes = 0
        self.shared_size_bytes = 0
        self.kernel = types.SimpleNamespace(ptr=1000 + len(gpu.kernels))
        gpu.kernels[self.kernel.ptr] = self


class _Device:
    def __init__(self, gpu: Gpu, index: int):
        self.gpu, self.index = gpu, index

    def __enter__(self):
        self.before, self.gpu.device = self.gpu.device, self.index

    def __exit__(self, *error):
        self.gpu.device = self.before


class _Stream:
    def __init__(self, gpu: Gpu, pointer: int):
        self.gpu, self.pointer = gpu, pointer

    def __enter__(self):
        self.gpu.active_stream = self.pointer

    def __exit__(self, *error):
        self.gpu.active_stream = None


class Nvrtc(types.ModuleType):
    def __init__(self, gpu: Gpu):
        super().__init__("nvrtc")
        self.gpu = gpu

    def getVersion(self):
        return self.gpu.nvrtc_version

    def getSupportedArchs(self):
        return (75, 80, 86, 89, 90, 100)

    def createProgram(self, source, name, headers, include_names):
        assert isinstance(source, str)
        assert all(isinstance(item, bytes) for item in [*headers, *include_names])
        return name

    def compileProgram(self, program, options):
        if self.gpu.nvrtc_fails:
            raise RuntimeError("NVRTC_ERROR_COMPILATION")
        self.gpu.compilations.append((program, *options))

    def getProgramLog(self, program):
        return "line 3: no such thing"

    def getCUBIN(self, program):
        return b"cubin of " + program.encode()

    def getPTX(self, program):
        return b"ptx of " + program.encode()

    def destroyProgram(self, program):
        pass


def install(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Put a fake GPU and a fake CuPy in place; undone at the end of the test."""
    gpu = Gpu()
    cupy: Any = types.ModuleType("cupy")

    def get_function(path: str, name: str) -> _Kernel:
        gpu.loaded.append((name, gpu.device))
        return _Kernel(gpu, path, name)

    cupy.RawModule = lambda path: types.SimpleNamespace(get_function=lambda name: get_function(path, name))
    cupy.zeros = lambda count, dtype: torch.zeros(count, dtype=torch.int32)
    cupy.cuda = types.SimpleNamespace(
        ExternalStream=lambda pointer, device: _Stream(gpu, pointer),
        driver=types.SimpleNamespace(launchKernel=gpu.launch),
    )
    libs: Any = types.ModuleType("cupy_backends.cuda.libs")
    libs.nvrtc = Nvrtc(gpu)
    for name in ("cupy_backends", "cupy_backends.cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libs)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    properties = types.SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
    for name, answer in {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: gpu.capability,
        "current_device": lambda: 0,
        "device": lambda index: _Device(gpu, index),
        "is_current_stream_capturing": lambda: gpu.capturing,
        "get_device_properties": lambda device: properties,
        "get_device_name": lambda device=None: "Fake H100",
        "mem_get_info": gpu.mem_get_info,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: gpu.stream, raising=False)
    return gpu
