"""x Wᵀ for a 2:4 weight on sparse tensor cores: one kernel for few tokens (csrc/cuda/nm_decode.cuh), which also takes a
SwiGLU pair in one launch, and one for many (csrc/cuda/nm_gemm.cuh)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wandapp_kernels.backends.base import Backend, Call, Held, Problem
from wandapp_kernels.backends.cuda.fragment_layout import FragmentLayout
from wandapp_kernels.backends.cuda.gemm_plan import plan_gemm
from wandapp_kernels.backends.cuda.launcher import (
    Prepared,
    counters,
    is_aligned,
    launch,
    multiprocessors,
    shared_memory,
    why_not,
)
from wandapp_kernels.backends.cuda.plan import THREADS, plan, refusal, weight_refusal
from wandapp_kernels.errors import KernelError
from wandapp_kernels.sparsity.pattern import Pattern

MOST_TOKENS = 1024
DECODE_TOKENS = 16  # up to here the decode kernel is asked
SWIGLU_TOKENS = 64


def _launch(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    shape: tuple[int, int],
) -> torch.Tensor:
    """One launch for one matrix, or for two that share x ``[M, K]``; checks everything."""
    for bias in biases:
        if (reason := refusal(x, tensors, bias, shape)) is not None:
            raise KernelError(f"the 2:4 decode kernel cannot run: {reason}")
    return _launch_checked(x, x.shape[0], tensors, biases, shape, x.new_empty((x.shape[0], shape[0])))


def _launch_checked(
    x: torch.Tensor,
    tokens: int,
    tensors: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    shape: tuple[int, int],
    out: torch.Tensor,
) -> torch.Tensor:
    rows, columns = shape
    device = x.device
    cut = plan(rows, columns, tokens, multiprocessors(device), len(biases))
    partials = x.new_empty(cut.partials, dtype=torch.float32) if cut.partials else None
    arrived = counters(cut.counters, device) if cut.counters else None
    launch(
        "nm_decode",
        cut.kernel(x.dtype, len(biases)),
        (cut.grid[0], cut.grid[1]),
        THREADS,
        cut.shared_bytes,
        (*tensors, x, *biases, out, partials, arrived, rows, columns, tokens, cut.splits),
        device,
    )
    return out


def nm_decode(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor:
    """``x @ Wᵀ + bias`` for few tokens and a 2:4 weight.

    Args:
        x: ``[M, K]`` float16 or bfloat16 on a GPU, contiguous.
        tensors: the weight in layout ``"nm-mma"``, values in x's type.
        bias: ``[N]`` in x's type, or None.
        shape: ``(N, K)``.

    Raises:
        KernelError: x, weight and bias do not fit together.
    """
    return _launch(x, tensors, (bias,), shape)


def nm_gemm(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    tile: str | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """``x @ Wᵀ + bias`` for many tokens and a 2:4 weight.

    Args:
        x: ``[M, K]`` float16 or bfloat16 on a GPU, contiguous. It is copied where 16-byte loads cannot read its rows.
        tensors: the weight in layout ``"nm-mma"``, values in x's type.
        bias: ``[N]`` in x's type, or None.
        shape: ``(N, K)``.
        tile, splits: the launch, where it shall not be the predicted best (:func:`gemm_plan.plan_gemm`).

    Raises:
        KernelError: x, weight and bias do not fit together.
    """
    if (reason := refusal(x, tensors, bias, shape)) is not None:
        raise KernelError(f"the 2:4 kernel cannot run: {reason}")
    return _gemm_checked(x, x.shape[0], tensors, bias, shape, x.new_empty((x.shape[0], shape[0])), tile, splits)


def _gemm_checked(
    x: torch.Tensor,
    tokens: int,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    out: torch.Tensor,
    tile: str | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    rows, columns = shape
    if columns % 8 or not is_aligned(x):
        x = _copy_with_aligned_rows(x.view(tokens, columns))
        columns = x.shape[1]
    device = x.device
    cut = plan_gemm(rows, shape[1], tokens, multiprocessors(device), shared_memory(device), tile, splits)
    partials = x.new_empty(cut.partials, dtype=torch.float32) if cut.partials else None
    arrived = counters(cut.counters, device) if cut.counters else None
    launch(
        "nm_gemm",
        cut.kernel(x.dtype),
        (cut.grid[0], cut.grid[1]),
        cut.tile.threads,
        cut.tile.shared_bytes,
        (*tensors, x, bias, out, partials, arrived, rows, columns, tokens, cut.splits),
        device,
    )
    return out


def _copy_with_aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """x with columns of zeros up to a multiple of 8, at an aligned address; the weight's padding meets them."""
    copy = x.new_zeros(x.shape[0], -(-x.shape[1] // 8) * 8)
    copy[:, : x.shape[1]] = x
    return copy


def nm_swiglu(
    x: torch.Tensor,
    gate: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    shape: tuple[int, int],
) -> torch.Tensor:
    """``silu(x @ Gᵀ + gate_bias) * (x @ Uᵀ + up_bias)`` in one launch, summed and multiplied in fp32.

    Args:
        x: ``[..., K]`` float16 or bfloat16 on a GPU.
        gate, up: two weights of one shape in layout ``"nm-mma"``, values in x's type.
        gate_bias, up_bias: ``[N]`` in x's type, or None.
        shape: ``(N, K)`` of each.

    Returns:
        ``[..., N]`` in x's type.

    Raises:
        KernelError: the tensors do not fit together. :func:`nm_swiglu_refusal` tells before.
    """
    if x.shape[-1:] != shape[1:]:
        raise KernelError(f"the SwiGLU kernel cannot run: x has shape {tuple(x.shape)}, and the weights {shape}")
    rows = x.reshape(-1, shape[1]).contiguous()
    return _launch(rows, (*gate, *up), (gate_bias, up_bias), shape).view(*x.shape[:-1], shape[0])


def nm_swiglu_refusal(
    x: torch.Tensor,
    gate: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    shape: tuple[int, int],
) -> str | None:
    """None when :func:`nm_swiglu` takes these, else the reason in one sentence; no tensor is read.

    It refuses devices and types without the kernel, no token, more than ``SWIGLU_TOKENS`` of them, and tensors that are
    not two weights of ``shape`` in layout ``"nm-mma"`` with their biases.
    """
    if (reason := why_not(x.device, x.dtype)) is not None:
        return reason
    if len(gate) != 2 or len(up) != 2:
        return f"gate has {len(gate)} tensors and up {len(up)}: layout {FragmentLayout.name!r} has two"
    if x.shape[-1:] != shape[1:]:
        return f"x has shape {tuple(x.shape)}, and the weights {shape}"
    rows = x.reshape(-1, shape[1]).contiguous()
    if len(rows) > SWIGLU_TOKENS:
        return f"the kernel takes up to {SWIGLU_TOKENS} tokens at once, not {len(rows)}"
    return refusal(rows, gate, gate_bias, shape) or refusal(rows, up, up_bias, shape)


class NmCall(Call):
    """A weight whose tensors were checked when it was bound: a call only launches.

    Where no workspace is needed, the launches for each number of tokens are kept, too.
    """

    def __init__(self, backend: Backend, shape: tuple[int, int], pattern: Pattern | None):
        super().__init__(backend, shape, pattern)
        self._prepared: dict[int, Prepared | None] = {}

    def __call__(self, x: torch.Tensor, held: Held) -> torch.Tensor:
        rows, columns = self._shape
        out, tokens = x.new_empty((*x.shape[:-1], rows)), x.numel() // columns
        if tokens > DECODE_TOKENS:
            return _gemm_checked(x, tokens, *held, self._shape, out)
        if tokens not in self._prepared:
            self._prepared[tokens] = self._prepare(x, tokens, held)
        if (prepared := self._prepared[tokens]) is None:
            return _launch_checked(x, tokens, held[0], (held[1],), self._shape, out)
        prepared(x.data_ptr(), out.data_ptr())
        return out

    def _prepare(self, x: torch.Tensor, tokens: int, held: Held) -> Prepared | None:
        cut = plan(*self._shape, tokens, multiprocessors(x.device))
        if cut.partials:
            return None
        tensors, bias = held
        arguments = (*tensors, Prepared.X, bias, Prepared.OUT, None, None, *self._shape, tokens, cut.splits)
        grid = (cut.grid[0], cut.grid[1])
        return Prepared("nm_decode", cut.kernel(x.dtype), grid, THREADS, cut.shared_bytes, arguments, x.device)


class CudaNMBackend(Backend):
    """The kernels for 2:4 that read one layout: up to 1024 tokens, NVIDIA GPUs since compute capability 8.0.

    Beyond 256 tokens an H100 is faster when the weight is decompressed for cuBLAS (bench/results/h100).
    """

    name = "cuda-nm"
    layout = FragmentLayout.name
    default_tokens = 256

    def supports(self, problem: Problem) -> str | None:
        if problem.pattern != "2:4":
            return f"sparse tensor cores know 2:4 only, not {problem.pattern}"
        if problem.tokens > MOST_TOKENS:
            return f"the kernel takes up to {MOST_TOKENS} tokens at once"
        return why_not(problem.device, problem.dtype)

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        if x.shape[0] <= DECODE_TOKENS:
            return nm_decode(x, tensors, bias, shape)
        return nm_gemm(x, tensors, bias, shape)

    def bind(
        self,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> Call:
        unfit = weight_refusal(tensors, shape, tensors[0]) or (bias is not None and bias.shape != (shape[0],))
        return super().bind(tensors, bias, shape, pattern) if unfit else NmCall(self, shape, pattern)
