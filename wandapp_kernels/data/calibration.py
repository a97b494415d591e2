"""Text turned into token ids: seeded windows for calibration, one stream for evaluation, and a hash of either."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from wandapp_kernels.data.sources import Split, load_documents
from wandapp_kernels.errors import TextError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT_SEPARATOR = "\n\n"


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Calibration windows and what identifies them.

    Attributes:
        ids: int64 ``[samples, seqlen]``, on the CPU.
        text_hash: :func:`token_hash` of ``ids``; equal hashes mean that two runs saw the same tokens.
        source, split, seed: where the windows came from.
    """

    ids: torch.Tensor
    text_hash: str
    source: str
    split: Split
    seed: int


def token_hash(ids: torch.Tensor) -> str:
    """First 16 hex digits of the SHA-256 over ``ids`` as little-endian int64 followed by its shape, likewise."""
    shape = torch.tensor(ids.shape, dtype=torch.int64, device="cpu")
    data = b"".join(t.detach().cpu().contiguous().numpy().astype("<i8").tobytes() for t in (ids, shape))
    return hashlib.sha256(data).hexdigest()[:16]


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    split: Split = "calibration",
    bos: bool = True,
) -> TokenSet:
    """Draw ``samples`` windows of exactly ``seqlen`` tokens from a text source.

    The documents of the split are shuffled by ``seed`` and packed: tokenised without special tokens, joined by a blank
    line as the evaluation text is, and cut into consecutive windows. With ``bos`` every window starts with BOS, when
    the tokenizer has one, and holds ``seqlen - 1`` tokens of text.

    Packing differs from the C4 protocol of GPTQ, SparseGPT and Wanda, which crops one window out of every document
    longer than ``seqlen`` and discards the shorter ones: with 2048 tokens that keeps only the few longest pages, and
    none at all of a source of short texts. Here every token counts and no padding enters the statistics; a long
    document fills several windows.

    Args:
        tokenizer: of the model that will see the ids.
        source: see :func:`wandapp_kernels.data.sources.load_documents`.
        samples: number of windows, at least 1.
        seqlen: tokens in a window, at least 1 (2 with BOS); the caller keeps it within the model's context.
        seed: of the shuffle.
        split: of the source.
        bos: start each window with BOS.

    Raises:
        UsageError: ``samples`` or ``seqlen`` is too small.
        TextError: the source cannot be read or is too short for so many windows.
    """
    bos_id = tokenizer.bos_token_id if bos else None
    text_length = seqlen if bos_id is None else seqlen - 1
    if samples < 1:
        raise UsageError(f"calibration needs at least 1 sample, not {samples}; raise the number of samples")
    if text_length < 1:
        raise UsageError(f"a calibration window of {seqlen} tokens holds no text; raise the sequence length")

    documents = list(load_documents(source, split).documents)
    random.Random(seed).shuffle(documents)
    separator = _encode(tokenizer, DOCUMENT_SEPARATOR)
    stream: list[int] = []
    for document in documents:
        if len(stream) >= samples * text_length:
            break
        if stream:
            stream += separator
        stream += _encode(tokenizer, document)
    if len(stream) < samples * text_length:
        raise TextError(
            f"the {split} split of text source {source!r} gives {len(stream) // text_length} samples of {seqlen} "
            f"tokens, not {samples}; use fewer or shorter samples, or more text"
        )

    ids = torch.tensor(stream[: samples * text_length], dtype=torch.int64, device="cpu").view(samples, text_length)
    if bos_id is not None:
        ids = torch.cat([ids.new_full((samples, 1), bos_id), ids], dim=1)
    return TokenSet(ids, token_hash(ids), source, split, seed)


def evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase, source: str, split: Split = "evaluation", max_tokens: int | None = None
) -> tuple[torch.Tensor, str]:
    """The text of a split as one stream of token ids, and its :func:`token_hash`.

    Documents keep their order, are joined by blank lines and tokenised without special tokens; the first
    ``max_tokens`` ids are kept (all, when None, or when the text is shorter).

    Returns:
        int64 ``[tokens]`` on the CPU, and the hash.

    Raises:
        UsageError: ``max_tokens`` is below 2 (one token predicts nothing).
        TextError: the source cannot be read or gives fewer than 2 tokens.
    """
    if max_tokens is not None and max_tokens < 2:
        raise UsageError(f"evaluation needs at least 2 tokens, not {max_tokens}; raise the number of tokens")
    documents = load_documents(source, split).documents
    ids = _encode(tokenizer, _joined_prefix(documents, max_tokens))
    if max_tokens is not None and len(ids) < max_tokens:
        ids = _encode(tokenizer, DOCUMENT_SEPARATOR.join(documents))
    if len(ids) < 2:
        raise TextError(f"the {split} split of text source {source!r} gives fewer than 2 tokens; give more text")
    stream = torch.tensor(ids[:max_tokens], dtype=torch.int64, device="cpu")
    return stream, token_hash(stream)


def _joined_prefix(documents: tuple[str, ...], max_tokens: int | None) -> str:
    """Enough documents, joined, for ``max_tokens`` tokens at 8 characters each: no tokenizer packs natural text so."""
    if max_tokens is None:
        return DOCUMENT_SEPARATOR.join(documents)
    length = count = 0
    while count < len(documents) and length < 8 * max_tokens:
        length += len(documents[count])
        count += 1
    return DOCUMENT_SEPARATOR.join(documents[:count])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a stream longer than the model's context is meant, the tokenizer's warning is not.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
