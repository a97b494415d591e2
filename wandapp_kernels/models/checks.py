"""What is asked of a model before anything is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from wandapp_kernels.errors import UsageError

# What PEFT's wrappers call the layer that they are put around; their other layers are what is trained.
WRAPPED = ("base_layer", "original_module")


def require_module(model: Any) -> None:
    """Raise UsageError for what is no module; ``load`` returns a model together with its tokenizer."""
    if not isinstance(model, nn.Module):
        hint = "give its .model" if isinstance(getattr(model, "model", None), nn.Module) else "give a torch module"
        raise UsageError(f"the model is a {type(model).__name__}, which is no torch module; {hint}")


def adapter_wrappers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of everything that an adapter (PEFT) has put around a layer."""
    for name, module in model.named_modules():
        if any(own in module._modules for own in WRAPPED):
            yield name, module


def refuse_adapters(model: nn.Module) -> None:
    """Raise UsageError for a model with adapters, whose own matrices are Linears too.

    Pruning would take weights out of the adapter, and score the base layer as if it ran alone.
    """
    for name, _ in adapter_wrappers(model):
        raise UsageError(
            f"{name} has an adapter, which would be pruned too; merge it (merge_and_unload), or prune the model "
            "first and add it then"
        )


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model's configuration allows, or None where it names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def require_tokens(model: nn.Module, ids: torch.Tensor, what: str = "calibration") -> None:
    """Raise UsageError for what are no tokens of the model to learn from: ``[samples, tokens]``, in its vocabulary."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.numel() == 0:
        raise UsageError(f"{what} must be integer token ids [samples, tokens], not {ids.dtype} {list(ids.shape)}")
    if ids.shape[1] < 2:
        raise UsageError(f"{what} samples have 1 token, which predicts nothing; give longer ones")
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    vocabulary = getattr(embedding, "num_embeddings", None)
    if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise UsageError(
            f"{what} token ids run from {int(ids.min())} to {int(ids.max())}, outside the vocabulary of "
            f"{vocabulary}; use the model's own tokenizer"
        )
    context = context_length(model) if isinstance(model, PreTrainedModel) else None
    if context is not None and ids.shape[1] > context:
        raise UsageError(f"{what} samples have {ids.shape[1]} tokens, but the model's context is {context}")
