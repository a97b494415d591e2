"""Which layers of a pruned model get an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from wandapp_kernels.errors import ModelError, UsageError
from wandapp_kernels.models.checks import adapter_wrappers
from wandapp_kernels.models.names import matches
from wandapp_kernels.runtime.sparse_linear import SparseLinear
from wandapp_kernels.sparsity.mask import sparsity_of

# Stands for every pruned layer.
ALL = "all"

# A dense weight in 16 bit has exact zeros too, a few in ten thousand.
_LEAST_ZEROS = 0.01


def choose_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names, in the model's order, of the ``nn.Linear`` and ``Conv1D`` that the targets choose.

    Args:
        targets: as PEFT's ``target_modules``: a layer's full name or last components (``q_proj``), also ``re:``
            patterns (`models.names.matches`); ``all`` chooses every layer of which at least 1 % are zeros.

    Raises:
        UsageError: no layer is pruned, the model has adapters already, or a target is no layer's; says what there is.
        ModelError: the weight of a chosen layer is not in memory, or of a type that gradients do not pass.
    """
    wrapped = next((name for name, _ in adapter_wrappers(model)), None)
    if wrapped is not None:
        raise UsageError(f"{wrapped} has an adapter already; merge it or take it off (unload()) first")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = getattr(model, "get_output_embeddings", lambda: None)()  # never pruned, but embeddings may hold zeros
    pruned = {name for name, module in layers.items() if module is not head and _is_pruned(module)}
    if not pruned:
        raise UsageError(
            "no nn.Linear or Conv1D of the model is pruned (experts that share one tensor get no adapters): prune the "
            "model first, with wandapp prune or wk.prune"
        )
    if not targets:
        raise UsageError(f"no targets are given; there are {_kinds(layers)}, or {ALL} for every pruned layer")
    for target in targets:
        if target != ALL and not any(matches(name, [target]) for name in layers):
            raise UsageError(
                f"the target {target!r} is no linear layer of the model; there are {_kinds(layers)}, or {ALL} for "
                "every pruned one"
            )
    patterns = [target for target in targets if target != ALL]
    chosen = [name for name in layers if matches(name, patterns) or (ALL in targets and name in pruned)]
    for name in chosen:
        _check_trainable(name, layers[name])
    return chosen


def _is_pruned(layer: nn.Module) -> bool:
    if isinstance(layer, SparseLinear):
        return True
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return not weight.is_meta and sparsity_of(weight) >= _LEAST_ZEROS


def _kinds(layers: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def _check_trainable(name: str, layer: nn.Module) -> None:
    if isinstance(layer, SparseLinear):
        dtype = layer.dtype
    else:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise ModelError(f"the weight {name} is not in memory; load the model without off-loading")
        dtype = weight.dtype
    if dtype == torch.float16:
        raise ModelError(
            f"the weight {name} is float16, in which gradients vanish; load the model in bfloat16 or float32 (--dtype)"
        )
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ModelError(f"the weight {name} is stored as {dtype}; give the model unquantised")
