"""A loaded model made ready to run with one family of kernels."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from wandapp_kernels import dispatch
from wandapp_kernels.backends import DENSE
from wandapp_kernels.runtime.swap import desparsify, sparse_layers, sparsify


@dataclass(frozen=True)
class Prepared:
    """A model that `prepare` has swapped.

    Attributes:
        layers: what its linears are now, in words: ``"210 × 2:4"``.
        family: of kernels that may run, None for all.
    """

    layers: str
    family: str | None

    def running(self) -> AbstractContextManager[None]:
        """Within it only kernels of the family run."""
        return dispatch.only(self.family)


def prepare(
    model: nn.Module, backend: str = "auto", *, tune: bool = False, device: torch.device | None = None
) -> Prepared:
    """Swap a model, dense or compressed, in place, so that ``backend`` runs it.

    Args:
        backend: ``"auto"`` swaps what is sparse and lets dispatch choose; ``"dense"`` gives every layer its dense
            weight back; another name is a family of backends (``"cpu"``, ``"cuda"``, …): layouts are chosen for it.
        tune: see `swap.sparsify`.
        device: where the model goes first, since layouts are chosen for the device it is on; None: it stays.

    Raises:
        UsageError: there is no backend of that family here.
    """
    if device is not None:
        model.to(device)
    if backend == DENSE:
        desparsify(model)
        return Prepared("all layers dense", None)
    family = None if backend == "auto" else backend
    with dispatch.only(family):
        sparsify(model, tune=tune)
    return Prepared(describe(model), family)


def describe(model: nn.Module) -> str:
    """How many layers are compressed, by pattern."""
    kinds = Counter(layer.pattern for _, layer in sparse_layers(model))
    return ", ".join(f"{count} × {pattern}" for pattern, count in kinds.items()) or "no layer is sparse"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())
