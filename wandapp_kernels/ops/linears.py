"""``wandapp::linears``: several linears on one input, without gradients. What compiled models call on the CPU.

``out[i] = x @ W[i]ᵀ + bias[i]`` with all ``W[i] [out_features[i], in_features]`` in one layout and type. The operators
of one weight (`nm_linear`, `bitmap_linear`) also know gradients and autocast, and that costs every call as much as a
small linear; a graph of a decode step needs neither, and has q, k and v, or gate and up, on the same input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.operator import check_linear
from wandapp_kernels.ops.running import Weight, run_together

torch.library.define(
    "wandapp::linears",
    "(Tensor x, Tensor[] tensors, Tensor?[] biases, SymInt[] out_features, SymInt in_features, str pattern, "
    "str layout) -> Tensor[]",
)


def _weights(
    tensors: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], out_features: Sequence[int]
) -> list[Weight]:
    each, left = divmod(len(tensors), max(len(out_features), 1))
    if left or not each or len(biases) != len(out_features):
        raise UsageError(
            f"linears: {len(tensors)} tensors and {len(biases)} biases cannot be those of {len(out_features)} weights"
        )
    return [
        (tensors[i * each : (i + 1) * each], bias, rows)
        for i, (bias, rows) in enumerate(zip(biases, out_features, strict=True))
    ]


def _check(x: torch.Tensor, weights: Sequence[Weight], in_features: int) -> None:
    for tensors, bias, rows in weights:
        check_linear("linears", x, tensors, bias, rows, in_features)
        if tensors[0].dtype != x.dtype:
            raise UsageError(f"linears: x is {x.dtype}, but the weight is {tensors[0].dtype}")


@torch.library.impl("wandapp::linears", "CPU")
def _linears(
    x: torch.Tensor, tensors: Any, biases: Any, out_features: Sequence[int], in_features: int, *held: str
) -> list[torch.Tensor]:
    weights = _weights(tensors, biases, out_features)
    _check(x, weights, in_features)
    return run_together(x, weights, in_features, *held)


@torch.library.register_fake("wandapp::linears")
def _shapes(
    x: torch.Tensor, tensors: Any, biases: Any, out_features: Sequence[int], in_features: int, *_: str
) -> list[torch.Tensor]:
    _check(x, _weights(tensors, biases, out_features), in_features)
    return [x.new_empty((*x.shape[:-1], rows)) for rows in out_features]


def linears(
    x: torch.Tensor, weights: Sequence[Weight], in_features: int, pattern: str, layout: str
) -> list[torch.Tensor]:
    """``x @ Wᵀ + bias`` of several weights, with the kernel that dispatch chooses, in one call where it can.

    Args:
        x: ``[..., in_features]`` on the CPU, floating, any strides.
        weights: of each its tensors in ``layout``, the first in x's type; its bias ``[N]`` or None; N.
        in_features: K, of all weights.
        pattern: n:m; ``""`` for unstructured and dense weights.
        layout: a name of ``ops.layouts.LAYOUTS``, or ``"dense"``: the tensor is the weight ``[N, K]``.

    Returns:
        One ``[..., N]`` for each weight, in x's type. No gradient flows through it.

    Raises:
        UsageError: x, weights and biases do not fit together.
    """
    tensors = [tensor for own, _, _ in weights for tensor in own]
    biases, rows = [bias for _, bias, _ in weights], [rows for _, _, rows in weights]
    return torch.ops.wandapp.linears.default(x, tensors, biases, rows, in_features, pattern, layout)


def linears_now(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    out_features: Sequence[int],
    in_features: int,
    pattern: str,
    layout: str,
) -> list[torch.Tensor]:
    """The operator without torch's dispatcher, for code that was generated for shapes checked while it was traced."""
    return run_together(x, _weights(tensors, biases, out_features), in_features, pattern, layout)


# Where generated code finds it (`runtime.compiling`), in a process that reads it from a cache too.
torch.ops.wandapp.linears_now = linears_now  # type: ignore[attr-defined]


def traced_without_gradients(x: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether a model being compiled may call `linears` here: on the CPU, no gradients, no autocast, one type."""
    if not torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return x.is_cpu and values.is_cpu and x.dtype == values.dtype and x.is_floating_point()
