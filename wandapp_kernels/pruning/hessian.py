"""The layer-wise Hessian ``H = X Xᵀ`` and its damped inverse (SparseGPT, arXiv 2301.00774, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wandapp_kernels.errors import NonFiniteError

DAMPING = 0.01
_RAISE = 10.0
_ATTEMPTS = 6


@dataclass(frozen=True)
class DampedInverse:
    """``H⁻¹``, its upper Cholesky factor ``U`` (``H⁻¹ = Uᵀ U``), and the damping it took.

    Attributes:
        damping: fraction of the mean diagonal that was added; above the requested one when the Hessian was not
            positive definite.
        dead: bool ``[in]``, channels that were never active; their diagonal is set to the mean of the others.
    """

    inverse: torch.Tensor
    factor: torch.Tensor
    damping: float
    dead: torch.Tensor


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """``H + damping · mean(diag H) · I`` as a new tensor ``[in, in]``.

    Dead channels' diagonal is set to the mean of the others (1 when all are dead). SparseGPT sets 1, which would make
    the damping depend on the scale of the activations.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    live = diagonal != 0
    mean = diagonal.sum() / live.sum() if live.any() else diagonal.new_ones(())
    diagonal.copy_(torch.where(live, diagonal, mean) + damping * mean)
    return hessian


def damped_inverse(gram: torch.Tensor, damping: float = DAMPING) -> DampedInverse:
    """Invert ``gram [in, in]``, multiplying the damping by 10 while the matrix is not positive definite.

    Raises:
        NonFiniteError: still not positive definite at 10^6 times the requested damping.
    """
    dead = gram.diagonal() == 0
    for attempt in range(_ATTEMPTS + 1):
        level = damping * _RAISE**attempt
        lower, failed = torch.linalg.cholesky_ex(damped(gram, level))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return DampedInverse(inverse, factor, level, dead)
    raise NonFiniteError(
        f"the Hessian of a layer with {len(gram)} inputs is not positive definite even with damping {level:g}; "
        "use more calibration text"
    )
