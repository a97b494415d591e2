"""The regional optimiser: pull the pruned block's output back to the dense block's (Wanda++, section 4).

``L = Σ (f(X_m) - f_k(X_m))²`` over a sample's tokens and channels, minimised over the block's Linear weights.

The learning rate is relative to each matrix: RMSprop and Adam move every weight by about ``lr`` a step whatever the
gradient's size, so ``lr = ρ · rms(W)`` moves every matrix by the same fraction of itself. The paper's absolute 3e-7 is
ρ ≈ 1.5e-5 for a 7B model, whose weights have an rms near 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.pruning.latent import LatentWeights
from wandapp_kernels.pruning.regional_loss import regional_loss
from wandapp_kernels.pruning.settings import OptimizerSettings

# The masks settle in the last quarter of the rounds.
RECHOOSE_SHARE = 0.75

Forward = Callable[[Sequence[int]], torch.Tensor]


class RegionalOptimizer:
    """Optimises ``parameters`` (and holds ``masks`` over them when the settings keep the mask) on one block.

    Args:
        name: the block's, for messages.
        forward: indices of calibration samples -> the pruned block's output for them.
        target: indices -> the dense output to reach, same shape.
        weights: the Linears' weights by name.
        extra: further parameters to train (norm weights, biases).
        count: how many calibration samples there are.
        generator: draws the samples of each round.
        latent: the latent weights, for ``rechoose``.
    """

    def __init__(
        self,
        settings: OptimizerSettings,
        name: str,
        forward: Forward,
        target: Forward,
        weights: Mapping[str, nn.Parameter],
        extra: Iterable[nn.Parameter],
        count: int,
        generator: torch.Generator,
        latent: LatentWeights | None = None,
    ):
        self._settings, self._name = settings, name
        self._forward, self._target = forward, target
        self._weights = dict(weights)
        self._latent = latent
        self._count, self._generator = count, generator
        self._parameters = [*self._weights.values(), *extra]
        self._samples = min(settings.samples or count, count)
        self._steps_per_round = math.ceil(self._samples / settings.batch)
        self._step = 0
        self._optimizer: torch.optim.Optimizer | None = None

    def run(self, masks: dict[str, torch.Tensor], reprune: Callable[[list[int]], dict[str, torch.Tensor]]) -> float:
        """All rounds. Returns the last round's loss divided by the target's energy.

        Args:
            masks: name -> bool mask; ``rechoose`` changes it in place.
            reprune: samples of the round -> new masks, applied by the callee; called every round under ``regrow``.
        """
        loss = math.nan
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        try:
            for round_ in range(self._settings.rounds):
                if self._latent is not None and 0 < round_ <= RECHOOSE_SHARE * self._settings.rounds:
                    self._latent.rechoose()
                order = torch.randperm(self._count, generator=self._generator, device="cpu")
                drawn = order[: self._samples].tolist()
                if self._settings.mask == "regrow":
                    masks = reprune(drawn)
                if self._optimizer is None:
                    self._optimizer = self._build_optimizer(masks)
                loss = self._round(drawn, masks)
        finally:
            for parameter in self._parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
        return loss

    def _round(self, drawn: list[int], masks: Mapping[str, torch.Tensor]) -> float:
        assert self._optimizer is not None
        difference = energy = 0.0
        self._optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(drawn), self._settings.batch):
            chosen = drawn[start : start + self._settings.batch]
            target = self._target(chosen)
            with torch.enable_grad():
                loss, loss_of_zero = regional_loss(self._settings.loss, self._forward(chosen), target)
            loss.backward()
            if self._latent is not None:
                self._latent.take_gradients()
            self._schedule()
            self._optimizer.step()
            if self._settings.zero_grad == "sample":
                self._optimizer.zero_grad(set_to_none=True)
            self._hold(masks)
            difference += loss.item()
            energy += loss_of_zero
        if not math.isfinite(difference):
            raise NonFiniteError(
                f"the regional optimiser's loss in {self._name} became NaN or infinite; lower the learning rate "
                "(--relative-lr)"
            )
        return difference / max(energy, 1e-30)

    @torch.no_grad()
    def _hold(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Bring the weights back under their masks after a step; under ``regrow`` they are free."""
        if self._latent is not None:
            self._latent.project()
        elif self._settings.mask == "keep":
            for name, weight in self._weights.items():
                weight.mul_(masks[name])

    def _build_optimizer(self, masks: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        groups = []
        stepped = self._weights if self._latent is None else self._latent.parameters
        for name, weight in self._weights.items():
            groups.append({"params": [stepped[name]], "lr": self._rate(weight.detach()[masks[name]])})
        for parameter in self._parameters[len(self._weights) :]:
            groups.append({"params": [parameter], "lr": self._rate(parameter.detach())})
        for group in groups:
            group["initial_lr"] = group["lr"]
        if self._settings.algorithm == "adam":
            return torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        return torch.optim.RMSprop(groups, alpha=0.99, eps=1e-8)

    def _rate(self, values: torch.Tensor) -> float:
        if self._settings.absolute_lr is not None:
            return self._settings.absolute_lr
        return self._settings.relative_lr * float(values.square().mean().sqrt()) if values.numel() else 0.0

    def _schedule(self) -> None:
        assert self._optimizer is not None
        progress = self._step / (self._settings.rounds * self._steps_per_round)
        self._step += 1
        factor = {
            "constant": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self._settings.schedule]
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
