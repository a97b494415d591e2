"""ADMM weight update (Boža 2024, arXiv 2401.02938) and a conjugate-gradient polish on its support (ALPS, NeurIPS 2024).

In the space scaled by the input norms (``W' = W·‖X‖``, ``H' = H / (‖X‖ ‖X‖ᵀ)``, where magnitude is Wanda's score):
``Z = mask ∘ (W' + U); U += W' - Z; W' = (H' + ρI)⁻¹ (H' W'₀ + ρ (Z - U))``, ρ = 1, 20 iterations. The mask is chosen
anew from ``|W' + U|`` in the first 15, under a sparsity that grows as ``s·(1 - (1 - t/15)³)``.
"""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.hessian import damped
from wandapp_kernels.pruning.statistics import LayerStatistics
from wandapp_kernels.pruning.updates.repair import Repair
from wandapp_kernels.sparsity import Pattern, keep_highest, mask_from_scores

ITERATIONS = 20
MASK_ITERATIONS = 15
RHO = 1.0
DAMPING = 0.1
PCG_STEPS = 10


def admm(
    weight: torch.Tensor,
    statistics: LayerStatistics,
    pattern: Pattern,
    mask: torch.Tensor | None = None,
    *,
    iterations: int = ITERATIONS,
) -> Repair:
    """Prune and repair ``weight [out, in]`` given ``statistics.gram``; a given ``mask`` is kept."""
    assert statistics.gram is not None
    norm = statistics.gram.diagonal().sqrt()
    safe = torch.where(norm > 0, norm, torch.ones_like(norm))
    hessian = damped(statistics.gram / torch.outer(safe, safe), DAMPING)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + RHO * identity))
    scaled = weight.float() * norm  # a dead channel's weights become 0
    target, solution, dual = scaled @ hessian, scaled.clone(), torch.zeros_like(scaled)
    support = torch.ones_like(scaled, dtype=torch.bool) if mask is None else mask
    ramp = min(MASK_ITERATIONS, iterations)
    for step in range(iterations):
        if mask is None and step < ramp:
            support = _growing_mask((solution + dual).abs(), pattern, (step + 1) / ramp)
        projected = (solution + dual) * support
        dual += solution - projected
        solution = (target + RHO * (projected - dual)) @ inverse
    return Repair((solution + dual) * support / safe, support)


def admm_pcg(
    weight: torch.Tensor, statistics: LayerStatistics, pattern: Pattern, mask: torch.Tensor | None = None
) -> Repair:
    """ADMM, then ``PCG_STEPS`` steps of preconditioned conjugate gradients on the support it found."""
    found = admm(weight, statistics, pattern, mask)
    return Repair(least_squares(weight, statistics, found.mask, found.weight), found.mask, found.warning)


def least_squares(
    weight: torch.Tensor,
    statistics: LayerStatistics,
    mask: torch.Tensor,
    start: torch.Tensor,
    *,
    steps: int = PCG_STEPS,
    damping: float = 0.01,
) -> torch.Tensor:
    """Minimise ``tr((Ŵ - W) H (Ŵ - W)ᵀ)`` over Ŵ supported on ``mask``, all rows at once, from ``start``.

    ``H`` is the damped Hessian; the weights of dead channels aim at 0, as in every other update.
    """
    assert statistics.gram is not None
    hessian = damped(statistics.gram, damping)
    diagonal = hessian.diagonal()
    target = torch.where(statistics.gram.diagonal() > 0, weight.float(), 0.0)
    solution = start.clone()
    residual = ((target - solution) @ hessian) * mask
    direction = residual / diagonal
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ hessian) * mask
        step = energy / (direction * image).sum(1, keepdim=True).clamp_min(torch.finfo(image.dtype).tiny)
        solution += step * direction
        residual -= step * image
        preconditioned = residual / diagonal
        following = (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned + following / energy.clamp_min(torch.finfo(image.dtype).tiny) * direction
        energy = following
    return solution * mask


def _growing_mask(scores: torch.Tensor, pattern: Pattern, progress: float) -> torch.Tensor:
    """The mask of an iteration: all but the ``1 - (1 - t)³`` share of what the pattern will remove in the end.

    The n of m that the pattern protects always stay; of the others the smallest of each row go first.
    """
    columns = scores.shape[1]
    leaving = round((1 - (1 - progress) ** 3) * pattern.removed_per_row(columns))
    protected = mask_from_scores(scores, pattern)
    return keep_highest(scores.masked_fill(protected, torch.inf), columns - leaving)
