"""Few tokens times a 2:4 weight on sparse tensor cores (csrc/cuda/nm_decode.cuh), and the SwiGLU pair in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wandapp_kernels.backends.base import Backend, Call, Held, Problem
from wandapp_kernels.backends.cuda.fragment_layout import FragmentLayout
from wandapp_kernels.backends.cuda.launcher import counters, launch, multiprocessors, why_not
from wandapp_kernels.backends.cuda.plan import THREADS, plan, refusal, weight_refusal
from wandapp_kernels.errors import KernelError
from wandapp_kernels.sparsity.pattern import Pattern

MOST_TOKENS = 64


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
    """None when :func:`nm_swiglu` takes these and is worth calling, else the reason in one sentence; no tensor is read.

    It refuses devices and types without the kernel, no token, more than ``MOST_TOKENS`` of them, and tensors that are
    not two weights of ``shape`` in layout ``"nm-mma"`` with their biases.
    """
    if (reason := why_not(x.device, x.dtype)) is not None:
        return reason
    if len(gate) != 2 or len(up) != 2:
        return f"gate has {len(gate)} tensors and up {len(up)}: layout {FragmentLayout.name!r} has two"
    if x.shape[-1:] != shape[1:]:
        return f"x has shape {tuple(x.shape)}, and the weights {shape}"
    rows = x.reshape(-1, shape[1]).contiguous()
    if len(rows) > MOST_TOKENS:
        return f"the kernel takes up to {MOST_TOKENS} tokens at once, not {len(rows)}"
    return refusal(rows, gate, gate_bias, shape) or refusal(rows, up, up_bias, shape)


class NmCall(Call):
    """A weight whose tensors were checked when it was bound: a call only launches."""

    def __call__(self, x: torch.Tensor, held: Held) -> torch.Tensor:
        (tensors, bias), (rows, columns) = held, self._shape
        out = x.new_empty((*x.shape[:-1], rows))
        return _launch_checked(x, x.numel() // columns, tensors, (bias,), self._shape, out)


class CudaNMBackend(Backend):
    """The decode kernel for 2:4: up to 64 tokens, NVIDIA GPUs since compute capability 8.0."""

    name = "cuda-nm"
    layout = FragmentLayout.name
    default_tokens = MOST_TOKENS

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
        return nm_decode(x, tensors, bias, shape)

    def bind(
        self,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> Call:
        unfit = weight_refusal(tensors, shape, tensors[0]) or (bias is not None and bias.shape != (shape[0],))
        return super().bind(tensors, bias, shape, pattern) if unfit else NmCall(self, shape, pattern)
