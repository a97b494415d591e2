"""All settings of a pruning run, with the published version of Wanda++ as the default."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from wandapp_kernels.errors import UsageError
from wandapp_kernels.sparsity import Pattern

# Where a source leaves a detail open, the switch that decides it says so in its comment ("open in the paper").


@dataclass(frozen=True)
class OptimizerSettings:
    """The regional optimiser: gradient steps that pull the pruned block's output to the dense block's (Wanda++,
    section 4).

    Attributes:
        rounds: K, how often M samples are drawn and worked through.
        samples: M, samples of a round; 0 means all of them.
        batch: samples per step.
        algorithm: ``rmsprop`` (torch's defaults) or ``adam`` (β = 0.9, 0.99).
        relative_lr: step as a fraction of the root mean square of each matrix's kept weights.
        absolute_lr: step in weight units, the paper's 3e-7; overrides ``relative_lr`` when set.
        schedule: ``constant``, or ``linear``/``cosine`` decay to zero over all steps of the block.
        mask: ``regrow`` prunes anew every round and leaves the weights free in between (the paper); ``keep`` holds the
            first mask; ``rechoose`` optimises latent dense weights behind the masked ones and chooses the mask anew
            from ``|θ|·‖X‖`` before each round of the first three quarters.
        zero_grad: ``sample`` clears gradients every step; ``round`` accumulates them over a round (open in the paper).
        target: ``pruned`` compares on the pruned stream (the paper); ``dense`` with the dense model's own block output.
        loss: ``sum`` of squared differences (the paper); ``token`` divides each token's by the energy of its target, so
            that the few tokens with massive activations do not drown the others.
        norms: also train the block's norm weights and the pruned Linears' biases (a bias that is all zero has no scale
            to step by and stays zero).
    """

    rounds: int = 5
    samples: int = 32
    batch: int = 1
    algorithm: str = "rmsprop"
    relative_lr: float = 1e-3
    absolute_lr: float | None = None
    schedule: str = "constant"
    mask: str = "regrow"
    zero_grad: str = "sample"
    target: str = "pruned"
    loss: str = "sum"
    norms: bool = False

    def __post_init__(self) -> None:
        _choice("algorithm", self.algorithm, ("rmsprop", "adam"))
        _choice("schedule", self.schedule, ("constant", "linear", "cosine"))
        _choice("mask", self.mask, ("regrow", "keep", "rechoose"))
        _choice("zero_grad", self.zero_grad, ("sample", "round"))
        _choice("target", self.target, ("pruned", "dense"))
        _choice("loss", self.loss, ("sum", "token"))
        if self.rounds < 1 or self.batch < 1 or self.samples < 0:
            raise UsageError("the regional optimiser needs at least one round, one sample a step and samples >= 0")
        if not 0 < (self.absolute_lr if self.absolute_lr is not None else self.relative_lr) < math.inf:
            raise UsageError("the regional optimiser's learning rate must be above 0 and finite; leave it out instead")


@dataclass(frozen=True)
class PruneSettings:
    """One pruning run.

    Attributes:
        method: the name it is reported under.
        criterion: a row of ``CRITERIA``.
        update: a row of ``UPDATES``, or None to keep the remaining weights as they are.
        optimizer: the regional optimiser's settings, or None.
        group: ``row`` or ``layer``, what unstructured scores are compared within.
        alpha: weight of the gradient in ``rgs`` and ``gblm``.
        x_norm: ``sum`` (the page) or ``mean`` (divided by the sequences, as Wanda's code) for ‖X‖ in ``rgs`` (open).
        recompute_gradient: take the regional gradient again before the last prune of ``regrow`` (community code; the
            page takes it once).
        sequential: prune a block's Linears in the order they run, statistics taken anew for each (community code); the
            page takes them once.
        self_calibration: the dense model writes more samples, until calibration holds at least this many tokens.
        ignore: module names, suffixes or ``re:`` patterns that stay dense.
        seed: of the samples the optimiser draws.
    """

    pattern: Pattern
    method: str = "custom"
    criterion: str = "wanda"
    update: str | None = None
    optimizer: OptimizerSettings | None = None
    group: str = "row"
    alpha: float = 100.0
    x_norm: str = "sum"
    recompute_gradient: bool = False
    sequential: bool = False
    self_calibration: int = 0
    ignore: tuple[str, ...] = field(default=())
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("group", self.group, ("row", "layer"))
        _choice("x_norm", self.x_norm, ("sum", "mean"))
        if self.self_calibration < 0:
            raise UsageError(f"self_calibration is {self.self_calibration} tokens; give 0 or more")
        if not 0 <= self.alpha < math.inf:
            raise UsageError(f"alpha is {self.alpha:g}; it weighs the gradient and must be a number from 0 up")
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"seed is {self.seed}, but must be a number of at most 64 bits")


def recorded_settings(settings: PruneSettings) -> dict[str, Any]:
    """What reports say of the settings: every field, the pattern as text."""
    return {**asdict(settings), "pattern": str(settings.pattern)}


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")
