"""Conversion of glassllm's 0.85M-parameter LLaMA-like models to a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SPACE = "\u2581"
# In the order of their ids.
_SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
_VECTORS = {"norm1.gamma": "input_layernorm.weight", "norm2.gamma": "post_attention_layernorm.weight"}
_MATRICES = {
    "attn.W_Q": "self_attn.q_proj.weight",
    "attn.W_K": "self_attn.k_proj.weight",
    "attn.W_V": "self_attn.v_proj.weight",
    "attn.W_O": "self_attn.o_proj.weight",
    "ffn.W1": "mlp.gate_proj.weight",
    "ffn.W3": "mlp.up_proj.weight",
    "ffn.W2": "mlp.down_proj.weight",
}


def convert_glass(package: Path, target: Path, *, language: str) -> None:
    """Write `config.json`, `model.safetensors` (fp32) and the tokenizer of glassllm's `language` model into `target`.

    Args:
        package: folder of the installed package glassllm; it is read, not imported.
        target: existing empty folder.
        language: "en" or "pt".
    """
    with np.load(package / "weights" / f"{language}.npz") as archive:
        options = json.loads(str(archive["__config__"]))
        arrays = {key: archive[key] for key in archive.files if key != "__config__"}
    tokenizer = _tokenizer(json.loads((package / "weights" / f"{language}.tokenizer.json").read_text("utf-8")))
    tokenizer.model_max_length = options["max_len"]
    config = LlamaConfig(
        vocab_size=options["vocab_size"],
        hidden_size=options["d_model"],
        intermediate_size=arrays["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=options["n_layers"],
        num_attention_heads=options["n_heads"],
        num_key_value_heads=options["n_kv_heads"],
        max_position_embeddings=options["max_len"],
        rms_norm_eps=options["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": options["rope_base"]},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_state_dict(arrays, options))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _state_dict(arrays: dict[str, np.ndarray], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    state = {
        "model.embed_tokens.weight": weights["E"],
        "lm_head.weight": weights["E"],
        "model.norm.weight": weights["norm_f.gamma"],
    }
    heads = {"attn.W_Q": options["n_heads"], "attn.W_K": options["n_kv_heads"]}
    for layer in range(options["n_layers"]):
        source, target = f"blocks.{layer}.", f"model.layers.{layer}."
        for ours, theirs in _VECTORS.items():
            state[target + theirs] = weights[source + ours]
        for ours, theirs in _MATRICES.items():
            # glassllm multiplies x @ W: its matrices are (in, out).
            matrix = weights[source + ours].T.contiguous()
            state[target + theirs] = _halves_from_pairs(matrix, heads[ours]) if ours in heads else matrix
    return state


def _halves_from_pairs(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the output rows of each head from (0, 1, 2, 3, ...) to (0, 2, ..., 1, 3, ...).

    glassllm's rotary embedding rotates adjacent pairs, LLaMA's in transformers rotates halves. `matrix` is (out, in).
    """
    return matrix.view(heads, -1, 2, matrix.shape[1]).transpose(1, 2).reshape(matrix.shape)


def _tokenizer(table: dict[str, Any]) -> PreTrainedTokenizerFast:
    merges = [(left, right) for left, right in table["merges"]]
    words = [*_SPECIALS, *table["alphabet"], *(left + right for left, right in merges)]
    core = Tokenizer(BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", _SPACE)])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\n|{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+"), behavior="isolated")
    core.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
