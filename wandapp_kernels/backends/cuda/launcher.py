"""Launches the kernels of csrc/cuda through CuPy on torch's current stream: no host synchronisation, no copies.

A layer's product takes a few microseconds on the GPU, so the host must not take more: arguments are addresses in a
buffer that is kept for each kernel, and CuPy hands them to the driver as they are.

Safe inside CUDA graphs: outputs come from torch's allocator, and a launch under capture has counters of its own. The
first launch of a kernel loads it, which a capture may forbid: call a layer once before it is captured.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from wandapp_kernels.backends.cuda import compiler
from wandapp_kernels.errors import KernelError

OLDEST_CAPABILITY = (8, 0)  # cp.async, mma.m16n8k16 on bfloat16, mma.sp
ALIGNMENT = 16
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}

Argument = torch.Tensor | int | None


def why_not(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """None when kernels for 16-bit ``dtype`` can be launched on ``device``, else the reason in a sentence."""
    device = torch.device(device)
    if dtype not in DTYPES:
        return f"the CUDA kernels compute in float16 and bfloat16, not {dtype}"
    if device.type != "cuda":
        return f"the CUDA kernels need an NVIDIA GPU, and the tensors are on {device}"
    if not torch.cuda.is_available():
        return "this torch sees no GPU"
    if torch.version.hip is not None:
        return "the CUDA kernels need an NVIDIA GPU, and this torch is built for ROCm"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is too old: the CUDA kernels need 8.0"
    return _cupy_missing() or _not_compiled(capability)


@lru_cache(maxsize=16)
def _not_compiled(capability: tuple[int, int]) -> str | None:
    return compiler.why_not(capability)


@lru_cache(maxsize=1)
def _cupy_missing() -> str | None:
    try:
        import cupy  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "cupy":
            return 'CuPy is not installed: pip install "wandapp_kernels[cuda13]" (or [cuda12])'
        return _cupy_broken(error)
    except Exception as error:  # two of its packages at once, another CUDA than the driver's, a missing library, ...
        return _cupy_broken(error)
    return None


def _cupy_broken(error: Exception) -> str:
    return (
        f"CuPy cannot be imported ({type(error).__name__}: {' '.join(str(error).split())[:200]}): install the one of "
        "cupy-cuda13x and cupy-cuda12x that fits the driver, and no other"
    )


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether 16-byte loads may start at ``tensor``."""
    return tensor.data_ptr() % ALIGNMENT == 0


def check_tensor(tensor: torch.Tensor, name: str, dtype: torch.dtype, like: torch.Tensor, aligned: bool = True) -> None:
    """Raise KernelError unless ``tensor`` has that type, lies on ``like``'s device, contiguous and 16-byte aligned."""
    if tensor.dtype != dtype:
        raise KernelError(f"{name} is {tensor.dtype}, but this kernel takes {dtype}")
    if tensor.device != like.device:
        raise KernelError(f"{name} is on {tensor.device}, but the activations are on {like.device}")
    if not tensor.is_contiguous():
        raise KernelError(f"{name} is not contiguous: pack the weight again")
    if aligned and not is_aligned(tensor):
        raise KernelError(f"{name} does not start at a multiple of {ALIGNMENT} bytes: pack the weight again")


class _Arguments:
    """The arguments of a launch, 8 bytes each: the driver reads the first 4 of a 32-bit one, and copies them all."""

    def __init__(self, count: int):
        self.values = (ctypes.c_uint64 * count)()
        first = ctypes.addressof(self.values)
        self._places = (ctypes.c_void_p * (count + 1))(*(first + 8 * i for i in range(count)))
        self.address = ctypes.addressof(self._places)
        self.lock = threading.Lock()  # from writing them until the driver has copied them


class _Kernel:
    """A loaded kernel, and arguments for launches that are not prepared."""

    def __init__(self, source: str, name: str, device: int, arguments: int):
        import cupy

        path = compiler.compiled(source, torch.cuda.get_device_capability(device))
        with torch.cuda.device(device):  # the module is loaded into this device's context
            self.loaded = cupy.RawModule(path=str(path)).get_function(name)
            # A limit, not a reservation: every launch says what it uses. What the kernel declares itself counts too.
            most = shared_memory(torch.device("cuda", device))
            self.loaded.max_dynamic_shared_size_bytes = most - self.loaded.shared_size_bytes
            self.function = int(self.loaded.kernel.ptr)
        self.arguments = _Arguments(arguments)
        self.driver = cupy.cuda.driver.launchKernel


_kernel = lru_cache(maxsize=256)(_Kernel)


@lru_cache(maxsize=64)
def _cupy_stream(device: int, pointer: int) -> Any:
    import cupy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return cupy.cuda.ExternalStream(pointer, device)


def device_index(device: torch.device) -> int:
    """The number of a GPU; the current one where ``device`` says none."""
    return torch.cuda.current_device() if device.index is None else device.index


def launch(
    source: str,
    name: str,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Argument],
    device: torch.device,
) -> None:
    """Launch ``name`` of ``source.cu`` on torch's current stream of ``device``.

    Args:
        source: a file of csrc/cuda, without ``.cu``.
        name: the kernel.
        grid: CTAs in x and y.
        threads: threads of a CTA.
        shared_bytes: dynamic shared memory of a CTA.
        arguments: in the kernel's order; a tensor is its address, None a null pointer, an int is 32 bits.
        device: where all tensors are.

    Raises:
        KernelError: the kernel cannot be compiled, or the driver refuses the launch.
    """
    index = device_index(device)
    if index != torch.cuda.current_device():  # the driver launches in the context of the current device
        with torch.cuda.device(index):
            return launch(source, name, grid, threads, shared_bytes, arguments, device)
    values = [a if type(a) is int else 0 if a is None else a.data_ptr() for a in arguments]  # type: ignore[union-attr]
    try:
        kernel = _kernel(source, name, index, len(values))
        with kernel.arguments.lock:
            kernel.arguments.values[:] = values
            kernel.driver(
                *(kernel.function, grid[0], grid[1], 1, threads, 1, 1, shared_bytes),
                *(_stream(index), kernel.arguments.address, 0),
            )
    except KernelError:
        raise
    except Exception as error:
        if not _has_context_now(error, index):
            raise _refused(name, grid, threads, shared_bytes, error) from error
        launch(source, name, grid, threads, shared_bytes, arguments, device)


_thread = threading.local()


def _has_context_now(error: Exception, index: int) -> bool:
    """Whether a launch failed only because its thread had no CUDA context, and may be tried again.

    The driver launches in the calling thread's context. A thread gets one with its first call of the CUDA runtime,
    which torch's operators make, but handing out cached memory does not.
    """
    made = _thread.__dict__.setdefault("made", set())
    if "CUDA_ERROR_INVALID_CONTEXT" not in str(error) or index in made:
        return False
    made.add(index)
    torch.cuda.mem_get_info(index)
    return True


def _refused(name: str, grid: tuple[int, int], threads: int, shared_bytes: int, error: Exception) -> KernelError:
    capturing = " (a graph is being captured: call it once before the capture)"
    return KernelError(
        f"{name} cannot be launched with a grid of {grid}, {threads} threads and {shared_bytes} bytes of shared "
        f"memory: {error}{capturing if torch.cuda.is_current_stream_capturing() else ''}"
    )


class Prepared:
    """A launch of which only two addresses differ from call to call: the activations' and the output's.

    Args:
        arguments: as for :func:`launch`, with ``X`` and ``OUT`` for those two.
    """

    X, OUT = object(), object()

    def __init__(
        self,
        source: str,
        name: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Any],
        device: torch.device,
    ):
        self._index = device_index(device)
        self._how = (name, grid, threads, shared_bytes)
        try:
            self._kernel = kernel = _kernel(source, name, self._index, len(arguments))
        except KernelError:
            raise
        except Exception as error:
            raise _refused(*self._how, error) from error
        self._arguments = _Arguments(len(arguments))
        self._x, self._out = ([a is each for a in arguments].index(True) for each in (self.X, self.OUT))
        known = [0 if a is None or a is self.X or a is self.OUT else a for a in arguments]
        self._arguments.values[:] = [a if isinstance(a, int) else a.data_ptr() for a in known]
        self._launch = (kernel.function, grid[0], grid[1], 1, threads, 1, 1, shared_bytes)

    def __call__(self, x: int, out: int) -> None:
        """Launch on torch's current stream.

        Args:
            x, out: addresses on the device it was prepared for.

        Raises:
            KernelError: the driver refuses the launch.
        """
        if self._index != torch.cuda.current_device():
            with torch.cuda.device(self._index):
                return self(x, out)
        arguments = self._arguments
        try:
            with arguments.lock:
                arguments.values[self._x] = x
                arguments.values[self._out] = out
                self._kernel.driver(*self._launch, _stream(self._index), arguments.address, 0)
        except Exception as error:
            if not _has_context_now(error, self._index):
                raise _refused(*self._how, error) from error
            self(x, out)


def _stream(index: int) -> int:
    """torch's current stream of a GPU; without the object around it, which takes longer than a launch."""
    return int(torch._C._cuda_getCurrentRawStream(index))


_SLAB = 1 << 20  # words that captured launches are given, 4 MiB at a time; a launch takes a few hundred
_counters: dict[tuple[int, int], torch.Tensor] = {}
_slabs: dict[int, list[torch.Tensor]] = {}  # of each device, kept for ever: graphs hold addresses inside them
_given: dict[int, int] = {}  # words of the last slab that captured launches have


def counters(count: int, device: torch.device) -> torch.Tensor:
    """At least ``count`` zeros (int32) that every kernel leaves as zeros.

    They are kept for each device and stream, since launches on one stream follow each other. A captured launch has its
    own for ever, since its graph may be replayed on any stream; they are laid in stock by calls outside of a capture.
    """
    index = device_index(device)
    if torch.cuda.is_current_stream_capturing():
        given, last = _given.get(index, 0), -(-count // 32) * 32
        if index not in _slabs or given + last > _SLAB:  # nothing ran before the capture, or very much was captured
            return torch.zeros(count, dtype=torch.int32, device=device)
        _given[index] = given + last
        return _slabs[index][-1][given : given + count]
    if index not in _slabs or _given.get(index, 0) > _SLAB // 2:
        _slabs.setdefault(index, []).append(_zeros(_SLAB, index))
        _given[index] = 0
    key = (index, _stream(index))
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        kept = _counters[key] = _zeros(max(count, 4096), index)
    return kept


def _zeros(count: int, index: int) -> torch.Tensor:
    """CuPy's memory: what outlives a call must not lie in a pool of torch's, which may belong to a graph."""
    import cupy

    with torch.cuda.device(index), _cupy_stream(index, _stream(index)):
        return torch.from_dlpack(cupy.zeros(count, dtype=np.int32))


@lru_cache(maxsize=16)
def shared_memory(device: torch.device) -> int:
    """The most dynamic shared memory a CTA may ask for, in bytes."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
