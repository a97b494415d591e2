"""Regional gradients: backward through one decoder block only (Wanda++, arXiv 2503.04992, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.ops.running_statistics import add_squares


class RegionalGradient:
    """Accumulates ``G = sqrt(1/N Σ_n (∂‖f(X_n)‖₂ / ∂W)²)`` for every Linear of a block, ``[out, in]`` fp32 each.

    ``f(X_n)`` is the block's output hidden state, residual included; no labels and no target.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]):
        self._linears = linears
        self._squares = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
        self._samples = 0

    def add(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run ``forward`` on one sample, add its squared gradient, and return the block's output, detached."""
        weights = [linear.weight for linear in self._linears.values()]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                output = forward()
                loss = torch.linalg.vector_norm(output.float())
                # An expert that no token of this sample reached has no gradient.
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        for squares, gradient in zip(self._squares.values(), gradients, strict=True):
            if gradient is not None:
                add_squares(gradient, squares)
        self._samples += 1
        return output.detach()

    def root_mean_square(self) -> dict[str, torch.Tensor]:
        """Raises NonFiniteError naming the first Linear whose gradient is NaN or infinite."""
        for name, squares in self._squares.items():
            bad = int((~torch.isfinite(squares)).sum())
            if bad:
                raise NonFiniteError(
                    f"{bad} of {squares.numel()} regional gradients of {name} are NaN or infinite; "
                    "use a criterion without gradients or other calibration text"
                )
        return {name: (squares / max(self._samples, 1)).sqrt_() for name, squares in self._squares.items()}
