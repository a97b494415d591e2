"""The linear layers of a model by name, and names a user gives that choose none of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from .blocks import stacked_parameters
from .names import matches


def layer_names(model: nn.Module) -> Iterator[str]:
    """Dotted name of every linear layer; of fused experts that of their module and of every matrix of every expert."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name
        elif stacked := stacked_parameters(module):
            yield name
            for matrix, parameter in stacked.items():
                yield from (f"{name}.{expert}.{matrix}" for expert in range(len(parameter)))


def check_ignored(model: nn.Module, ignore: Sequence[str]) -> None:
    """Refuse a pattern (`names.matches`) that is no layer's.

    Raises:
        UsageError: names the pattern, and a layer that there is.
    """
    names = list(layer_names(model))
    for pattern in ignore:
        if not any(matches(name, [pattern]) for name in names):
            there = f"; there is {names[-1]}, for example" if names else ""
            raise UsageError(f"the name to ignore, {pattern!r}, is that of no linear layer of the model{there}")
