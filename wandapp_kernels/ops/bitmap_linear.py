"""``wandapp::bitmap_linear``: a linear whose weight is compressed by any mask.

``out[..., r] = bias[r] + Σ_i values[row_offsets[r] + i] · x[..., column(r, i)]``, with i over the stored weights of row
r and column(r, i) the place of the i-th set bit of bitmap row r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wandapp_kernels.ops.operator import define_linear
from wandapp_kernels.ops.running import reference_linear
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight

_call = define_linear("bitmap_linear", has_pattern=False)


def bitmap_linear(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    layout: str = "bitmap",
) -> torch.Tensor:
    """``x @ Wᵀ + bias`` with an unstructured sparse weight.

    Gradients, autocast, other storage types and NaN behave as in :func:`wandapp_kernels.ops.nm_linear`.

    Args:
        x: ``[..., in_features]``, floating, any strides; no tokens at all is allowed.
        tensors: the weight in ``layout``; for ``"bitmap"`` values, bitmap and row_offsets of a :class:`BitmapWeight`.
        bias: ``[out_features]`` in x's type, or None.
        out_features: R, rows of the weight.
        in_features: C, columns of the weight.
        layout: a name of ``ops.layouts.LAYOUTS``.

    Returns:
        ``[..., out_features]`` in x's type, accumulated in at least float32.

    Raises:
        UsageError: x, weight and bias do not fit together.
    """
    return _call(x, tensors, bias, out_features, in_features, "", layout)


def bitmap_linear_reference(x: torch.Tensor, weight: BitmapWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition in plain torch: decompress, multiply in float32 (float64 for float64), round once to x's type."""
    return reference_linear(x, weight.decompress(), bias)
