"""The pruning score inside a kernel, rounded step by step as the reference rounds it."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

NON_FINITE = tl.constexpr(0x7F800000)


@triton.jit
def score(weight, gradient, norm, alpha, samples, GRADIENT: tl.constexpr, SQUARES: tl.constexpr, NORM: tl.constexpr):
    """``(alpha · G + ‖X‖) · |W|`` in fp32; a factor that is not given is left out.

    With SQUARES the gradient is given as ``Σ g²`` over ``samples`` samples and ``G = sqrt(Σ g² / samples)``. The kernel
    must be launched with ``enable_fp_fusion=False``: a fused multiply-add rounds once instead of twice, and two scores
    that tie on the reference would not tie here.
    """
    absolute = tl.abs(weight.to(tl.float32))
    if GRADIENT:
        g = gradient.to(tl.float32)
        if SQUARES:
            g = tl.sqrt_rn(tl.div_rn(g, samples))
        factor = alpha * g
        if NORM:
            factor = factor + norm
        absolute = factor * absolute
    elif NORM:
        absolute = norm * absolute
    return absolute


@triton.jit
def exponent(scores):
    """The exponent bits of fp32 scores; all of them are set (``NON_FINITE``) exactly in NaN and ±infinity."""
    return scores.to(tl.int32, bitcast=True) & NON_FINITE


@triton.jit
def sortable(scores):
    """fp32 → uint32 in the same order; -0.0 and +0.0 become equal. No score becomes 0, so 0 is below all of them."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


def score_arguments(
    weight: torch.Tensor,
    norm: torch.Tensor | None,
    gradient: torch.Tensor | None,
    alpha: float,
    samples: int | None,
    flag: torch.Tensor,
) -> tuple[dict, int]:
    """The arguments every scoring kernel has in common, and the columns a thread takes at once: at most 16 bytes.

    That many divide the columns and the row strides, so that a whole vector is inside the row or outside, and aligned.
    An absent tensor is never touched; another one stands for its pointer.
    """
    source = weight if gradient is None else gradient
    arguments = {
        "weight_ptr": weight,
        "weight_row_stride": weight.stride(0),
        "weight_column_stride": weight.stride(1),
        "gradient_ptr": source,
        "gradient_row_stride": source.stride(0),
        "gradient_column_stride": source.stride(1),
        "norm_ptr": flag if norm is None else norm.contiguous(),
        "flag_ptr": flag,
        "alpha": float(alpha),
        "samples": float(samples or 1),
        "GRADIENT": gradient is not None,
        "SQUARES": gradient is not None and samples is not None,
        "NORM": norm is not None,
    }
    widest = 16 // max(weight.element_size(), source.element_size())
    return arguments, math.gcd(widest, weight.shape[1], weight.stride(0), source.stride(0))
