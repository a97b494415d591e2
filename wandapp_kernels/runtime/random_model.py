"""Randomly initialised models of known shapes, pruned by magnitude: for speed and memory, not for text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from wandapp_kernels.errors import UsageError
from wandapp_kernels.sparsity import Pattern, mask_from_scores

# Sizes as their authors published them, but no head is tied to the embedding; llama-1b is TinyLlama's, the LLaMA
# architecture at 1.1 billion parameters.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    },
    "llama-1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "llama-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
}


@torch.no_grad()
def random_model(shape: str, sparsity: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A LLaMA of ``SHAPES[shape]`` whose block linears are pruned to ``sparsity`` by magnitude.

    Raises:
        UsageError: the shape is unknown, or the sparsity impossible.
    """
    if shape not in SHAPES:
        raise UsageError(f"the shape {shape!r} is unknown; choose one of {', '.join(SHAPES)}")
    pattern = Pattern.parse(sparsity)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.mul_(mask_from_scores(module.weight.abs(), pattern))
    return model.eval()
