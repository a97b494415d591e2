"""Running statistics of calibration, fp32: ``Σ x²`` of every input channel and ``Σ g²`` of every weight.

The reference computes them by torch; on a GPU that Triton serves a kernel reads x or g once, in the type it has.
"""

from __future__ import annotations

import torch

from wandapp_kernels.errors import UsageError
from wandapp_kernels.kernels import launch
from wandapp_kernels.ops.score import DTYPES


def add_channel_squares(x: torch.Tensor, sum_squares: torch.Tensor) -> None:
    """``sum_squares[j] += Σ_t x[t, j]²`` in place, in an order that does not depend on the device.

    Args:
        x: floating ``[tokens, channels]``.
        sum_squares: fp32 ``[channels]``.

    Raises:
        UsageError: the shapes do not fit together.
    """
    if x.dim() != 2 or sum_squares.shape != x.shape[1:]:
        raise UsageError(f"x is {tuple(x.shape)} and sum_squares {tuple(sum_squares.shape)}: give [T, C] and [C]")
    if _fused(x, sum_squares):
        from wandapp_kernels.kernels.running_statistics import add_channel_squares as kernel

        kernel(x, sum_squares)
    else:
        sum_squares += x.float().square().sum(0)


def add_squares(gradient: torch.Tensor, sum_squares: torch.Tensor) -> None:
    """``sum_squares += gradient²`` in place, rounded once as a fused multiply-add rounds.

    Args:
        gradient: floating, any shape.
        sum_squares: fp32, the same shape.

    Raises:
        UsageError: the shapes differ.
    """
    if gradient.shape != sum_squares.shape:
        raise UsageError(f"gradient is {tuple(gradient.shape)}, but sum_squares {tuple(sum_squares.shape)}")
    if gradient.is_contiguous() and _fused(gradient, sum_squares):
        from wandapp_kernels.kernels.running_statistics import add_squares as kernel

        kernel(gradient, sum_squares)
    else:
        wide = gradient.float()
        sum_squares.addcmul_(wide, wide)


def _fused(source: torch.Tensor, sums: torch.Tensor) -> bool:
    fits = source.dtype in DTYPES and sums.dtype == torch.float32 and sums.is_contiguous()
    return fits and sums.device == source.device and launch.why_not(source.device) is None
