"""Latent weights: a dense tensor behind every masked weight, so that the mask can change while it is optimised.

The forward pass uses ``θ ∘ mask``; its gradient goes to all of θ, the pruned entries included (straight-through
estimator, Bengio et al., arXiv 1308.3432; for n:m masks Zhou et al., arXiv 2102.04010). Pruned entries start from the
dense model's values, so one that the block misses grows until it displaces a kept one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn


class LatentWeights:
    """Latent ``θ`` of each weight ``[out, in]``.

    Args:
        weights: the masked, repaired weights; overwritten by ``project``.
        dense: the weights before pruning.
        masks: name -> bool mask, True where kept; changed in place by ``rechoose``.
        choose: ``(name, θ) -> mask``.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        dense: Mapping[str, torch.Tensor],
        masks: dict[str, torch.Tensor],
        choose: Callable[[str, torch.Tensor], torch.Tensor],
    ):
        self._weights, self._masks, self._choose = weights, masks, choose
        self.parameters = {
            name: nn.Parameter(torch.where(masks[name], weight.detach(), dense[name]))
            for name, weight in weights.items()
        }

    def take_gradients(self) -> None:
        """Add the gradients of the masked weights, which are dense, to those of their latents."""
        for name, theta in self.parameters.items():
            gradient, self._weights[name].grad = self._weights[name].grad, None
            if gradient is not None:  # None: an expert that no token of the batch reached
                theta.grad = gradient if theta.grad is None else theta.grad + gradient

    @torch.no_grad()
    def rechoose(self) -> None:
        """Choose every mask anew from the latents."""
        for name, theta in self.parameters.items():
            self._masks[name] = self._choose(name, theta)
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """``weight = θ ∘ mask``"""
        for name, theta in self.parameters.items():
            torch.mul(theta, self._masks[name], out=self._weights[name].data)
