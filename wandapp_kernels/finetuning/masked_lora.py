"""LoRA under the mask: adapters that become part of the pruned weights and leave every zero where it is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from wandapp_kernels.errors import UsageError
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.runtime.sparse_linear import SparseLinear


class MaskedLora(nn.Module):
    """A parametrisation of a pruned weight::

        W  ->  W + s · mask ∘ (B A)      mask = (W ≠ 0),  A [rank, in],  B [out, rank],  s = alpha / rank

    A is drawn as PEFT draws it (Kaiming, uniform) and B is zero, so that training starts from W. A and B are fp32 (fp64
    beside a W in fp64); the sum is computed in their type and rounded to that of W, in training as when it is merged:
    the function that is trained is the one that is saved. The gradient passes the rounding as if it were not there.

    Dropout acts on the input of the adapter, ``B A (d ∘ x)``, with one draw of d ``[in]`` for every forward pass. PEFT
    draws anew for each token, which no single weight can express.

    Args:
        weight: ``[out, in]``, or ``[in, out]`` when ``transposed`` (transformers' ``Conv1D``).
    """

    pruned: torch.Tensor

    def __init__(self, weight: torch.Tensor, settings: FinetuneSettings, transposed: bool):
        super().__init__()
        rows, columns = weight.T.shape if transposed else weight.shape
        dtype, device = torch.promote_types(weight.dtype, torch.float32), weight.device
        self.a = nn.Parameter(torch.empty(settings.rank, columns, dtype=dtype, device=device))
        self.b = nn.Parameter(torch.zeros(rows, settings.rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.register_buffer("pruned", weight.detach() == 0)
        self._scale, self._dropout, self._transposed = settings.alpha / settings.rank, settings.dropout, transposed

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        a: torch.Tensor = self.a
        if self.training and self._dropout:
            a = a * functional.dropout(a.new_ones(a.shape[1]), self._dropout)
        change = self._scale * (self.b @ a)
        change = (change.T if self._transposed else change).masked_fill(self.pruned, 0)
        return (weight.to(change.dtype) + change).to(weight.dtype)


@contextmanager
def masked_lora(model: nn.Module, layers: Sequence[str], settings: FinetuneSettings) -> Iterator[list[nn.Parameter]]:
    """Within it the layers have a `MaskedLora`; at its end their weights are what those give in evaluation mode.

    When the body raises, the weights are what they were.

    Yields:
        A and B of every layer.

    Raises:
        UsageError: a layer is compressed, or shares its weight with another module, which merging would change too.
    """
    owners = Counter(id(own) for module in model.modules() for own in module.parameters(recurse=False))
    chosen = {name: model.get_submodule(name) for name in layers}
    for name, layer in chosen.items():
        if isinstance(layer, SparseLinear):
            raise UsageError(
                f"{name} is compressed and adapters cannot be merged into it; call desparsify(model) first, or leave "
                "merge out"
            )
        if owners[id(layer.weight)] > 1:
            raise UsageError(
                f"the weight of {name} is shared with another module, which merging would change too; leave it out of "
                "the targets"
            )
    trained: list[nn.Parameter] = []
    merge = False
    try:
        for layer in chosen.values():
            assert isinstance(layer.weight, torch.Tensor)
            lora = MaskedLora(layer.weight, settings, isinstance(layer, Conv1D))
            parametrize.register_parametrization(layer, "weight", lora)
            trained += [lora.a, lora.b]
        yield trained
        merge = True
    finally:
        for layer in chosen.values():
            if parametrize.is_parametrized(layer, "weight"):
                layer.eval()
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=merge)
