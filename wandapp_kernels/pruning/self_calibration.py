"""Self-calibration: text sampled from the dense model itself, so that few calibration samples go further.

A regional optimiser sees every calibration token many times and fits them better than text it has not seen. The dense
model can write more of the same kind: each new sample starts with a short piece of the given text and is continued by
sampling at temperature 1 (Williams et al., "Self-calibration for Language Model Quantization and Pruning",
arXiv 2410.17170). No text from elsewhere is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from wandapp_kernels.errors import ModelError, NonFiniteError
from wandapp_kernels.models.bundled import quiet_transformers
from wandapp_kernels.models.capture import evaluating
from wandapp_kernels.models.generation_config import plain_generation_config

# Tokens of the given text that a sample starts with: enough to set its subject, few enough to leave room.
PROMPT_TOKENS = 16
_BATCH = 64


@torch.no_grad()
def self_calibration(
    model: nn.Module, token_ids: torch.Tensor, count: int, *, seed: int, device: torch.device
) -> torch.Tensor:
    """Sample ``count`` sequences as long as those of ``token_ids [samples, tokens]``; int64 ``[count, tokens]``.

    The first token of every given sample (BOS, where the tokenizer has one) stays first; the rest of the prompt is a
    random piece of the sample. The same seed gives the same sequences; torch's global random state is left alone.

    Raises:
        ModelError: the model has no ``generate``.
        NonFiniteError: the logits are NaN or infinite.
    """
    if not (isinstance(model, PreTrainedModel) and model.can_generate()):
        raise ModelError(
            f"{type(model).__name__} cannot generate text; set self_calibration to 0 (--self-calibration 0)"
        )
    samples, length = token_ids.shape
    generator = torch.Generator().manual_seed(seed)
    width = min(PROMPT_TOKENS, max(length // 4, 1))
    prompts = []
    for i in range(count):
        given = token_ids[i % samples]
        start = int(torch.randint(1, max(length - width, 1) + 1, (), generator=generator, device="cpu"))
        prompts.append(torch.cat([given[:1], given[start : start + width - 1]]))
    whole: nn.Module = model
    home = next(whole.parameters()).device
    whole.to(device)
    try:
        forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with forked, evaluating(whole), quiet_transformers():
            torch.manual_seed(seed)
            written = [
                _continue(model, torch.stack(prompts[i : i + _BATCH]).to(device), length)
                for i in range(0, count, _BATCH)
            ]
    finally:
        whole.to(home)
    return torch.cat(written).to(token_ids.device)


def _continue(model: Any, prompts: torch.Tensor, length: int) -> torch.Tensor:
    new = length - prompts.shape[1]
    settings: dict[str, Any] = {
        "do_sample": True,
        "top_k": 0,
        "min_new_tokens": new,  # none of them an end of text
        "max_new_tokens": new,
        "eos_token_id": getattr(model.generation_config, "eos_token_id", None),
        "pad_token_id": 0,
    }
    try:
        # transformers would take from the model's own settings what is not given: min_p, no_repeat_ngram_size, ...
        with plain_generation_config(model):
            return model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **settings)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NonFiniteError(
            "the logits of the dense model are NaN or infinite; load it in float32, or set self_calibration to 0 "
            "(--self-calibration 0)"
        ) from error
