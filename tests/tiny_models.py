"""Tiny randomly initialised models of each architecture, for tests.

Weights are larger than at the usual initialisation and biases and norm weights are random too, so that every part of a
block changes its output visibly.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False}

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 5},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma3_text": {
        **_GROUPED,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    "opt": {
        **{name: size for name, size in _SIZES.items() if name not in ("intermediate_size", "initializer_range")},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "init_std": 0.2,
    },
    "gpt2": {**_SIZES, "n_inner": 48, "intermediate_size": None},
    "phi": {**_SIZES, "partial_rotary_factor": 0.5},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_GROUPED,
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
}
ARCHITECTURES = tuple(name.removesuffix("_text") for name in _CONFIGS)


def tiny_model(arch: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model of one of `ARCHITECTURES` (or any other causal ``model_type``) in fp32 and evaluation mode.

    `config` overrides or adds settings. The same seed gives the same weights; the global random state is left alone.
    """
    kind = "gemma3_text" if arch == "gemma3" else arch
    settings = {name: value for name, value in {**_CONFIGS.get(kind, {}), **config}.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("_bias"):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_ids(samples: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[samples, tokens]``, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, tokens), generator=generator)
