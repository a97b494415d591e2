"""The training loop: AdamW on the adapters, gradients accumulated over micro batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from wandapp_kernels.errors import NonFiniteError, UsageError
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.pruning.walk import Progress

# What the recipe leaves open, as transformers' Trainer has it.
_MOST_NORM = 1.0
_WEIGHT_DECAY = 0.0


def train(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    token_ids: torch.Tensor,
    settings: FinetuneSettings,
    progress: Callable[[Progress], None],
) -> list[float]:
    """Minimise the mean next-token cross-entropy of ``token_ids`` over ``trained``.

    A step's gradient is that of the mean over its sequences, however they are split into micro batches, clipped to norm
    1 (as ``transformers.Trainer``; no weight decay). All of torch's randomness is the caller's to seed, but the order
    of the sequences, which is of ``settings.seed``.

    Args:
        model: a causal language model in training mode.
        token_ids: int64 ``[samples, tokens]`` without padding.
        progress: called after every step, with its loss.

    Returns:
        The loss of every step in nats, before it.

    Raises:
        UsageError: there are no more steps than the warm-up has.
        NonFiniteError: a loss or a gradient is NaN or infinite.
    """
    steps = settings.steps(len(token_ids))
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: settings.rate(min(step, steps - 1), steps))
    order = torch.Generator().manual_seed(settings.seed)
    losses: list[float] = []
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(token_ids), generator=order).split(settings.batch):
            loss = _add_gradients(model, token_ids[chosen], settings.micro_batch)
            norm = float(nn.utils.clip_grad_norm_(trained, _MOST_NORM)) if math.isfinite(loss) else math.nan
            if not math.isfinite(norm):
                what = "a gradient" if math.isfinite(loss) else "the loss"
                raise NonFiniteError(
                    f"{what} of step {len(losses) + 1} of {steps} is NaN or infinite; lower the learning rate, or load "
                    "the model in a wider type"
                )
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss)
            progress(Progress("step", len(losses), steps, loss))
    return losses


def _add_gradients(model: nn.Module, token_ids: torch.Tensor, micro_batch: int) -> float:
    """Backpropagate the mean loss of the sequences, a micro batch at a time; returns it."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    total = 0.0
    for part in token_ids.split(micro_batch):
        ids = part.to(embedding.weight.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss * (len(part) / len(token_ids))
        loss.backward()
        total += loss.item()
    return total


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model trains, and nothing in it requires gradients yet; after it both are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False).train()
        yield
    finally:
        model.train(modes[0][1])  # also what was put around layers meanwhile
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)


@contextmanager
def checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within it, where ``wanted``, a block's activations are computed again in the backward pass instead of kept.

    Raises:
        UsageError: the model's blocks cannot be computed again.
    """
    if wanted and not model.supports_gradient_checkpointing:
        raise UsageError(f"{type(model).__name__} does not support gradient checkpointing; leave it out")
    with _old_names():
        switch = wanted and not model.is_gradient_checkpointing
        if switch:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if switch:
            with _old_names():
                model.gradient_checkpointing_disable()


@contextmanager
def _old_names() -> Iterator[None]:
    """transformers has called it activation checkpointing since 5.23 or a little before, and warns of the old name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
