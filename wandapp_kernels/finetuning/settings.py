"""The recipe of a fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wandapp_kernels.errors import UsageError


@dataclass(frozen=True)
class FinetuneSettings:
    """Wanda's recipe for LoRA after pruning (arXiv 2306.11695, ``lora_ft``) by default.

    Attributes:
        rank, alpha: a layer's adapter is ``s · B A`` with ``A [rank, in]``, ``B [out, rank]``, ``s = alpha / rank``.
        dropout: of the adapter's input.
        targets: layers that get one, see `targets.choose_layers`.
        lr: AdamW's peak learning rate; step t (from 0) of T has ``lr · min((t + 1) / warmup, (T - t) / (T - warmup))``.
        warmup: steps in which the rate rises.
        batch: sequences of a step; the last step of an epoch takes what is left.
        micro_batch: sequences in memory at once; their gradients are added up to those of the batch.
        epochs: how often every sequence is seen.
        seed: of A, the order of the sequences and dropout.
        gradient_checkpointing: compute every block's activations again in the backward pass instead of keeping them.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    lr: float = 1e-4
    warmup: int = 5
    batch: int = 128
    micro_batch: int = 1
    epochs: int = 1
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "micro_batch", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{_words(name)} is {getattr(self, name)}, but must be at least 1")
        if self.micro_batch > self.batch:
            raise UsageError(
                f"the micro batch of {self.micro_batch} sequences is larger than the batch of {self.batch}; lower it"
            )
        for name in ("alpha", "lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{_words(name)} is {value:g}, but must be above 0 and finite")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout is {self.dropout:g}, but must be at least 0 and below 1")
        if self.warmup < 0:
            raise UsageError(f"warmup is {self.warmup}, but must be 0 or more steps")
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"seed is {self.seed}, but must be a number of at most 64 bits")

    def steps(self, samples: int) -> int:
        """Optimiser steps of the whole run.

        Raises:
            UsageError: they end before the warm-up does.
        """
        steps = math.ceil(samples / self.batch) * self.epochs
        if steps <= self.warmup:
            raise UsageError(
                f"{samples} sequence{'s' * (samples > 1)} in batches of {self.batch}, {self.epochs} times, are {steps} "
                f"step{'s' * (steps > 1)}, no more than the {self.warmup} of the warm-up; give more sequences, a "
                "smaller batch or a shorter warm-up"
            )
        return steps

    def rate(self, step: int, steps: int) -> float:
        """The share of ``lr`` that step ``step`` of ``steps`` takes."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        return min(rising, (steps - step) / (steps - self.warmup))


def _words(name: str) -> str:
    return name.replace("_", " ")
