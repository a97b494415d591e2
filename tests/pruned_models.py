"""Tiny models whose linears hold zeros."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wandapp_kernels.sparsity import Pattern, mask_from_scores


def pruned_model(arch: str = "llama", patterns: tuple[str, ...] = ("2:4", "60%"), **config: Any) -> PreTrainedModel:
    """The linears of the blocks of `tiny_model` follow ``patterns`` in turn; embeddings and head stay dense."""
    model = tiny_model(arch, **config)
    turns = cycle(patterns)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in name:
            weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
            weight.masked_fill_(~mask_from_scores(weight.abs(), Pattern.parse(next(turns))), 0)  # no -0.0
    return model


def pruned_linear(
    rows: int = 12, columns: int = 16, pattern: str = "2:4", *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    """An ``nn.Linear`` that follows ``pattern``, with random weights."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        weight = torch.randn(rows, columns, generator=generator)
        linear.weight.copy_(weight.masked_fill(~mask_from_scores(weight.abs(), Pattern.parse(pattern)), 0))  # no -0.0
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(rows, generator=generator))
    return linear.to(dtype)
