"""What is asked of a model before anything is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

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
