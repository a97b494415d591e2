"""What the sparse linear operators share: checks, tracing, gradients, autocast, and a short way in eager mode.

An operator ``wandapp::NAME(x, tensors, bias, out_features, in_features[, pattern], layout)`` computes
``x @ Wᵀ + bias`` with ``W [out_features, in_features]`` held as ``tensors`` in ``layout``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.ops.running import parse_pattern, run

DEVICES = ("CPU", "CUDA")
# Bound here: the chain of attributes would take longer than the calls.
is_compiling, _grad_enabled, _any_autocast = (
    torch.compiler.is_compiling,
    torch.is_grad_enabled,
    torch._C._is_any_autocast_enabled,
)
_tracing, _modes = torch._C._get_tracing_state, torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

AUTOCAST = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

torch.library.define(
    "wandapp::decompress",
    "(Tensor[] tensors, SymInt out_features, SymInt in_features, str pattern, str layout, ScalarType dtype) -> Tensor",
)


@torch.library.impl("wandapp::decompress", DEVICES)
def _decompress(
    tensors: Sequence[torch.Tensor],
    out_features: int,
    in_features: int,
    pattern: str,
    layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    weight = get_layout(layout).decompress(tensors, (out_features, in_features), parse_pattern(pattern))
    return weight.to(dtype)


@torch.library.register_fake("wandapp::decompress")
def _decompress_shape(
    tensors: Sequence[torch.Tensor],
    out_features: int,
    in_features: int,
    pattern: str,
    layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return tensors[0].new_empty((out_features, in_features), dtype=dtype)


def decompress(
    tensors: Sequence[torch.Tensor],
    out_features: int,
    in_features: int,
    pattern: str,
    layout: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense weight ``[out_features, in_features]`` in ``dtype``, as an operator that can be traced.

    ``pattern`` is ``""`` for an unstructured weight. No gradient: compressed weights are frozen.
    """
    return torch.ops.wandapp.decompress.default(list(tensors), out_features, in_features, pattern, layout, dtype)


def check_linear(
    name: str, x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None, n: int, k: int
) -> None:
    """Raise UsageError unless x, the weight and the bias fit together."""
    if not x.is_floating_point():
        raise UsageError(f"{name}: x is {x.dtype}, but only floating types can be multiplied")
    if x.dim() == 0 or x.shape[-1] != k:
        raise UsageError(f"{name}: x has shape {tuple(x.shape)}, but its last dimension must be in_features = {k}")
    for tensor in tensors:
        if tensor.device != x.device:
            raise UsageError(f"{name}: x is on {x.device}, but the weight is on {tensor.device}")
    if bias is None:
        return
    if bias.device != x.device or bias.dtype != x.dtype or tuple(bias.shape) != (n,):
        raise UsageError(
            f"{name}: bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, but {x.dtype} {(n,)} on {x.device} "
            "is needed"
        )


def define_linear(name: str, has_pattern: bool) -> Callable[..., torch.Tensor]:
    """Register ``wandapp::NAME`` with kernels, shapes, gradients to x and bias, and autocast; return a function for it.

    The function takes ``(x, tensors, bias, out_features, in_features, pattern, layout)`` with ``pattern=""`` when the
    operator has none. In plain eager mode without gradients it calls the kernel directly: the way through the
    dispatcher costs 10 to 25 µs, as much as a small linear itself.
    """
    qualified = f"wandapp::{name}"
    pattern_argument = "str pattern, " if has_pattern else ""
    torch.library.define(
        qualified,
        "(Tensor x, Tensor[] tensors, Tensor? bias, SymInt out_features, SymInt in_features, "
        f"{pattern_argument}str layout) -> Tensor",
    )
    operator = getattr(torch.ops.wandapp, name).default

    def arguments(pattern: str, layout: str) -> tuple[str, ...]:
        return (pattern, layout) if has_pattern else (layout,)

    def kernel(x: torch.Tensor, tensors: Any, bias: Any, n: int, k: int, *rest: str) -> torch.Tensor:
        check_linear(name, x, tensors, bias, n, k)
        return run(x, tensors, bias, n, k, rest[0] if has_pattern else "", rest[-1])

    def shape(x: torch.Tensor, tensors: Any, bias: Any, n: int, k: int, *rest: str) -> torch.Tensor:
        check_linear(name, x, tensors, bias, n, k)
        return x.new_empty((*x.shape[:-1], n))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, tensors, _, *ctx.sizes = inputs
        ctx.save_for_backward(*tensors)

    def gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        n, k, *rest = ctx.sizes
        tensors = ctx.saved_tensors  # once: checkpointing unpacks them anew every time they are read
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            pattern = rest[0] if has_pattern else ""
            grad_x = grad @ decompress(tensors, n, k, pattern, rest[-1], grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, n).sum(0)
        return (grad_x, [None] * len(tensors), grad_bias, None, None, *[None] * len(rest))

    torch.library.impl(qualified, DEVICES)(kernel)
    torch.library.register_fake(qualified)(shape)
    torch.library.register_autograd(qualified, gradient, setup_context=keep)
    for device, key in AUTOCAST.items():
        torch.library.impl(qualified, key)(_autocast(operator, device))

    def call(
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        in_features: int,
        pattern: str,
        layout: str,
    ) -> torch.Tensor:
        if is_plain(x, bias):
            check_linear(name, x, tensors, bias, out_features, in_features)
            return run(x, tensors, bias, out_features, in_features, pattern, layout)
        return operator(x, list(tensors), bias, out_features, in_features, *arguments(pattern, layout))

    return call


def _autocast(operator: Any, device: str) -> Callable[..., torch.Tensor]:
    def cast(x: torch.Tensor, tensors: Any, bias: torch.Tensor | None, *rest: Any) -> torch.Tensor:
        # As F.linear: float64 is left alone. The weight keeps its type; the kernel casts it where it must.
        if x.is_floating_point() and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return operator(x, tensors, bias, *rest)

    return cast


def is_plain(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """True when nothing but the kernel would see the call: no tracing, gradient, autocast, mode, subclass or vmap."""
    if is_compiling() or type(x) is not torch.Tensor or not (x.is_cpu or x.is_cuda):
        return False
    if _tracing() is not None or forward_ad._current_level >= 0 or _modes() or _function_modes():
        return False
    if _is_wrapped(x) or x.is_neg():
        return False
    if _grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return not _any_autocast() or not torch.is_autocast_enabled(x.device.type)
