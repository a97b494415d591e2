"""The pruning score ``S = (α · G + ‖X‖) · |W|``: its definition, and when the fused kernels compute it."""

from __future__ import annotations

import torch

from wandapp_kernels.errors import UsageError
from wandapp_kernels.kernels import launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def scores(
    weight: torch.Tensor,
    norm: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    *,
    alpha: float = 0.0,
    samples: int | None = None,
) -> torch.Tensor:
    """The definition, in fp32: ``(α · G + ‖X‖) · |W|``; a factor that is not given is left out (Wanda, magnitude).

    Args:
        weight: W, floating ``[R, C]``.
        norm: ``‖X‖``, ``[C]``, or None.
        gradient: G ``[R, C]``, or None.
        alpha: weight of the gradient.
        samples: when given, ``gradient`` is the running sum of squares and ``G = sqrt(gradient / samples)``.

    Raises:
        UsageError: the shapes do not fit together, or ``samples`` is below 1.
    """
    check(weight, norm, gradient, samples)
    absolute = weight.float().abs()
    factor = None if norm is None else norm.float()
    if gradient is not None:
        g = gradient.float() if samples is None else (gradient.float() / samples).sqrt()
        factor = alpha * g if factor is None else alpha * g + factor
    return absolute if factor is None else factor * absolute


def why_not_fused(weight: torch.Tensor, norm: torch.Tensor | None, gradient: torch.Tensor | None) -> str | None:
    """None when the fused kernels take these tensors, else the reason in one sentence; the reference takes any."""
    for name, tensor, dtypes in (
        ("weight", weight, DTYPES),
        ("norm", norm, (torch.float32,)),
        ("gradient", gradient, DTYPES),
    ):
        if tensor is not None and tensor.dtype not in dtypes:
            return f"the {name} is {tensor.dtype}, which the kernels do not read"
        if tensor is not None and tensor.device != weight.device:
            return f"the {name} is on {tensor.device}, but the weight is on {weight.device}"
    return launch.why_not(weight.device)


def check(weight: torch.Tensor, norm: torch.Tensor | None, gradient: torch.Tensor | None, samples: int | None) -> None:
    if weight.dim() != 2:
        raise UsageError(f"the weight has {weight.dim()} dimensions: give a matrix [out, in]")
    if norm is not None and norm.shape != weight.shape[1:]:
        raise UsageError(f"the norm has shape {tuple(norm.shape)}, but the weight has {weight.shape[1]} input channels")
    if gradient is not None and gradient.shape != weight.shape:
        raise UsageError(f"the gradient has shape {tuple(gradient.shape)}, but the weight {tuple(weight.shape)}")
    if samples is not None and samples < 1:
        raise UsageError(f"samples is {samples}: a mean of squared gradients needs at least one")
