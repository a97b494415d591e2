"""Who runs an operator. Until something better is installed, the reference does.

``dispatch`` installs its runner with :func:`set_runner` when it is imported; operators never import it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from wandapp_kernels.ops.layouts import DENSE, get_layout
from wandapp_kernels.sparsity.pattern import Pattern

# x [M, K] contiguous, tensors, bias, N, K, pattern ("" when unstructured), layout -> [M, N]
Runner = Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor | None, int, int, str, str], torch.Tensor]

# The tensors of a weight, its bias and N.
Weight = tuple[Sequence[torch.Tensor], torch.Tensor | None, int]
# x [..., K] contiguous, with one row or more; weights with N ≥ 1; K, pattern, layout -> one [..., N] each
TogetherRunner = Callable[[torch.Tensor, Sequence[Weight], int, str, str], list[torch.Tensor]]


@lru_cache(maxsize=64)
def parse_pattern(pattern: str) -> Pattern | None:
    """``"2:4"`` as a Pattern, ``""`` as None."""
    return Pattern.parse(pattern) if pattern else None


def reference_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ weightᵀ + bias`` computed in float32 (float64 when x is float64), rounded once to x's type.

    Args:
        x: ``[..., K]``.
        weight: dense ``[N, K]``, any storage type.
        bias: ``[N]`` or None.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    bias = None if bias is None else bias.to(wide)
    return torch.nn.functional.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)


def run_reference(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    pattern: str,
    layout: str,
) -> torch.Tensor:
    """The runner that works for every layout, type and device: decompress, then :func:`reference_linear`."""
    shape = (out_features, in_features)
    return reference_linear(x, get_layout(layout).decompress(tensors, shape, parse_pattern(pattern)), bias)


def run_together_reference(
    x: torch.Tensor, weights: Sequence[Weight], in_features: int, pattern: str, layout: str
) -> list[torch.Tensor]:
    """The runner for several weights that works for every layout: one after the other, with `run`."""
    return [
        reference_linear(x, tensors[0], bias)
        if layout == DENSE
        else run(x, tensors, bias, rows, in_features, pattern, layout)
        for tensors, bias, rows in weights
    ]


_runner: Runner = run_reference
_together: TogetherRunner = run_together_reference


def set_runner(runner: Runner) -> Runner:
    """Let ``runner`` run all operators from now on. Returns the one it replaces."""
    global _runner
    previous, _runner = _runner, runner
    return previous


def set_together_runner(runner: TogetherRunner) -> TogetherRunner:
    """Let ``runner`` run `linears` from now on. Returns the one it replaces."""
    global _together
    previous, _together = _together, runner
    return previous


def run_together(
    x: torch.Tensor, weights: Sequence[Weight], in_features: int, pattern: str, layout: str
) -> list[torch.Tensor]:
    """Run several weights on one input with the installed runner: as `run`, and layout ``"dense"`` too."""
    if x.numel() and all(rows for _, _, rows in weights):
        return _together(x.contiguous(), weights, in_features, pattern, layout)
    return run_together_reference(x, weights, in_features, pattern, layout)


def run(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    pattern: str,
    layout: str,
) -> torch.Tensor:
    """Run with the installed runner: any leading dimensions, any strides, no tokens, no features."""
    if x.dim() == 2 and x.is_contiguous() and x.numel() and out_features:
        return _runner(x, tensors, bias, out_features, in_features, pattern, layout)
    leading = x.shape[:-1]
    tokens = x.reshape(leading.numel(), in_features).contiguous()
    if not tokens.shape[0] or not out_features:
        return x.new_empty((*leading, out_features))
    runner = _runner if in_features else run_reference
    out = runner(tokens, tensors, bias, out_features, in_features, pattern, layout)
    return out.reshape(*leading, out_features)
