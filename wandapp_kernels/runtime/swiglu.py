"""The first half of a gated MLP, ``silu(gate(x)) * up(x)``, in one launch where a kernel does that."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.operator import is_plain
from wandapp_kernels.runtime.sparse_linear import SparseLinear

# The layout that the fused kernel reads.
LAYOUT = "nm-mma"


def swiglu(x: torch.Tensor, gate: nn.Module, up: nn.Module) -> torch.Tensor:
    """``silu(x Gᵀ + b_g) * (x Uᵀ + b_u)`` (Shazeer, arXiv 2002.05202), for serving code that writes its MLP itself.

    Two 2:4 `SparseLinear` on a GPU run as one kernel at few tokens, which multiplies the sums before they are rounded;
    everything else is ``silu(gate(x)) * up(x)``, with gradients, tracing and any kind of layer. On the CPU the two
    products are one call once the layers have been called in turn.

    Args:
        x: ``[..., K]``.
        gate, up: layers ``[N, K]``.

    Returns:
        ``[..., N]`` in x's type.

    Raises:
        UsageError: the layers have different shapes.
    """
    if isinstance(gate, nn.Linear) and isinstance(up, nn.Linear):
        shapes = [(layer.out_features, layer.in_features) for layer in (gate, up)]
        if shapes[0] != shapes[1]:
            raise UsageError(f"gate is {shapes[0]} and up is {shapes[1]}, but a SwiGLU needs two layers of one shape")
    if isinstance(gate, SparseLinear) and isinstance(up, SparseLinear):
        fused = _fused(x, gate, up)
        if fused is not None:
            return fused
    return functional.silu(gate(x)) * up(x)


def _fused(x: torch.Tensor, gate: SparseLinear, up: SparseLinear) -> torch.Tensor | None:
    if gate.layout != LAYOUT or up.layout != LAYOUT:
        return None
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in (gate, up)):
        return None
    if not is_plain(x, gate.bias) or not is_plain(x, up.bias):
        return None
    from wandapp_kernels.backends.cuda.nm import nm_swiglu, nm_swiglu_refusal

    arguments = (x, gate._tensors(), up._tensors(), gate.bias, up.bias, gate.shape)
    return None if nm_swiglu_refusal(*arguments) else nm_swiglu(*arguments)
