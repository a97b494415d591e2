"""``wandapp::nm_linear``: a linear whose weight is compressed by an n:m pattern.

``out[..., r] = bias[r] + Σ_g Σ_i values[r, g·n + i] · x[..., g·m + index(r, g, i)]``, with g over the groups of m input
features and i over the n stored positions of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wandapp_kernels.ops.operator import define_linear
from wandapp_kernels.ops.running import reference_linear
from wandapp_kernels.sparsity.nm_weight import NMWeight

_call = define_linear("nm_linear", has_pattern=True)


def nm_linear(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    pattern: str = "2:4",
    layout: str = "nm",
) -> torch.Tensor:
    """``x @ Wᵀ + bias`` with an n:m weight.

    Gradients reach x and bias; the weight is frozen. Under autocast x and bias are cast to autocast's type, as
    ``F.linear`` does. A weight stored in another type than x's (int8, float8, float32 under autocast) is decompressed
    and cast to x's type. NaN or infinity in ``x[..., j]`` reaches every output whose row stores a weight for column j;
    an output whose row does not store it gets NaN as a dense linear would (0 · NaN) when the backend decompresses, and
    stays finite when the backend skips the column.

    Args:
        x: ``[..., in_features]``, floating, any strides; no tokens at all is allowed.
        tensors: the weight in ``layout``; for ``"nm"`` the values and indices of an :class:`NMWeight`.
        bias: ``[out_features]`` in x's type, or None.
        out_features: R, rows of the weight.
        in_features: C, columns of the weight.
        pattern: n:m.
        layout: a name of ``ops.layouts.LAYOUTS``.

    Returns:
        ``[..., out_features]`` in x's type, accumulated in at least float32.

    Raises:
        UsageError: x, weight and bias do not fit together.
    """
    return _call(x, tensors, bias, out_features, in_features, pattern, layout)


def nm_linear_reference(x: torch.Tensor, weight: NMWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition in plain torch: decompress, multiply in float32 (float64 for float64), round once to x's type."""
    return reference_linear(x, weight.decompress(), bias)
