"""Perplexity of a causal language model on a stream of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from wandapp_kernels.data.calibration import evaluation_tokens, token_hash
from wandapp_kernels.data.sources import Split
from wandapp_kernels.errors import NonFiniteError, TextError, UsageError
from wandapp_kernels.models.checks import context_length as context_length
from wandapp_kernels.models.checks import require_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SEQLEN = 2048

# Logits of one batch of windows: 2^27 of them are 512 MiB in fp32.
MAX_LOGITS = 2**27
MAX_BATCH = 32
# Rows whose logits are held in fp32 at once, beside the model's own copy.
_ROWS_IN_FP32 = 256


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it takes to compare it with another one.

    Attributes:
        value: exp(mean negative log-likelihood in nats).
        tokens: how many tokens were scored.
        seqlen: tokens in a window, BOS included.
        text_hash: :func:`~wandapp_kernels.data.calibration.token_hash` of the stream before it was cut into windows.
        source, split: of the text; empty when the tokens were given directly.
    """

    value: float
    tokens: int
    seqlen: int
    text_hash: str
    source: str = ""
    split: str = ""


def perplexity(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    seqlen: int,
    bos_token_id: int | None,
    batch_size: int | None = None,
    source: str = "",
    split: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of ``model`` on a stream of tokens, in non-overlapping windows.

    ::

        perplexity = exp( - 1/n * sum_t ln p(x_t | tokens before x_t in its window) )

    With BOS the stream is cut into chunks of ``seqlen - 1`` tokens, each is prefixed with BOS, and every token of the
    stream is scored. Without BOS the chunks have ``seqlen`` tokens and the first of each only serves as context, as in
    the literature's WikiText-2 figures. The last chunk is shorter when the stream does not divide; it is scored too,
    unless it is a single token. Logits go to fp32, the sum is kept in fp64. Windows of one length are batched, so
    nothing is ever padded and the batch size changes nothing but rounding.

    Args:
        model: any causal language model whose output has ``logits``; put in evaluation mode for the call.
        token_ids: int64 ``[tokens]``, without special tokens.
        seqlen: tokens in a window, BOS included; at least 2.
        bos_token_id: the token to start each window with, or None.
        batch_size: windows at once; None takes as many as keep the logits within 512 MiB in fp32, at most 32.
        source, split: copied into the result.
        progress: called after every batch as ``progress(windows_done, windows)``.

    Returns:
        The result; ``value`` is infinite when the mean exceeds what exp can hold.

    Raises:
        UsageError: ``seqlen`` or ``batch_size`` is out of range, or a token is not in the model's vocabulary.
        TextError: there are fewer than 2 tokens.
        NonFiniteError: the model gives NaN or infinite log-likelihoods.
    """
    context = context_length(model)
    if seqlen < 2:
        raise UsageError(f"a window of {seqlen} tokens predicts nothing; use a sequence length of at least 2")
    if context is not None and seqlen > context:
        raise UsageError(f"the sequence length {seqlen} exceeds the model's context of {context} tokens; lower it")
    if token_ids.ndim != 1:
        raise UsageError(f"token_ids must have one dimension, not shape {tuple(token_ids.shape)}; flatten it")
    if len(token_ids) < 2:
        raise TextError(f"perplexity needs at least 2 tokens, not {len(token_ids)}; give more text")
    embedding = cast(torch.Tensor, model.get_input_embeddings().weight)
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= embedding.shape[0]:
        raise UsageError(
            f"token ids from {lowest} to {highest} do not fit the model's vocabulary of {embedding.shape[0]}; use the "
            "tokenizer that belongs to the model"
        )
    if batch_size is None:
        batch_size = max(1, min(MAX_BATCH, MAX_LOGITS // (seqlen * embedding.shape[0])))
    if batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, not {batch_size}; raise it")

    windows = _windows(token_ids, seqlen, bos_token_id)
    done, total_windows = 0, sum(len(group) for group in windows)
    total, tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        for group in windows:
            for batch in group.split(batch_size):
                nll = _negative_log_likelihood(model, batch.to(embedding.device))
                if not math.isfinite(nll):
                    raise NonFiniteError(
                        f"the model gives a NaN or infinite log-likelihood in windows {done} to "
                        f"{done + len(batch) - 1} of {total_windows}; look for overflow in its weights or use a wider "
                        "dtype"
                    )
                total += nll
                tokens += batch.shape[0] * (batch.shape[1] - 1)
                done += len(batch)
                if progress is not None:
                    progress(done, total_windows)
    finally:
        model.train(training)
    mean = total / tokens
    value = math.exp(mean) if mean < 709 else math.inf
    return Perplexity(value, tokens, seqlen, token_hash(token_ids), source, split)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str = "wiki",
    *,
    seqlen: int | None = None,
    split: Split = "evaluation",
    max_tokens: int | None = 16384,
    bos: bool = True,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of ``model`` on the first ``max_tokens`` tokens of a text source (see :func:`perplexity`).

    Args:
        source: see :func:`wandapp_kernels.data.sources.load_documents`.
        seqlen: tokens in a window; None takes the model's context, at most 2048.
        max_tokens: of the text; None takes all of it.
        bos: start each window with the tokenizer's BOS token, when it has one. The literature's WikiText-2 figures are
            ``source="wikitext2", max_tokens=None, bos=False``, up to the one BOS some tokenizers put before the text.

    Raises:
        UsageError, TextError, NonFiniteError: as :func:`perplexity` and the source.
    """
    require_module(model)
    if seqlen is None:
        seqlen = min(context_length(model) or DEFAULT_SEQLEN, DEFAULT_SEQLEN)
    ids, _ = evaluation_tokens(tokenizer, source, split, max_tokens)
    bos_token_id = tokenizer.bos_token_id if bos else None
    return perplexity(
        model,
        ids,
        seqlen=seqlen,
        bos_token_id=bos_token_id,
        batch_size=batch_size,
        source=source,
        split=split,
        progress=progress,
    )


def _windows(token_ids: torch.Tensor, seqlen: int, bos_token_id: int | None) -> list[torch.Tensor]:
    """The windows, grouped by length: the full ones ``[n, seqlen]`` and the shorter last one ``[1, tail]``."""
    length = seqlen if bos_token_id is None else seqlen - 1
    full = len(token_ids) // length * length
    groups = [token_ids[:full].view(-1, length)] if full else []
    if len(token_ids) - full >= 2:
        groups.append(token_ids[full:].view(1, -1))
    if bos_token_id is None:
        return groups
    return [F.pad(group, (1, 0), value=bos_token_id) for group in groups]


@torch.inference_mode()
def _negative_log_likelihood(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Summed over every token of ``windows`` but the first of each, in nats."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = windows[:, 1:].flatten()
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, target in zip(logits.split(_ROWS_IN_FP32), targets.split(_ROWS_IN_FP32), strict=True):
        nll = F.cross_entropy(rows.float(), target.to(rows.device), reduction="none")
        total += nll.sum(dtype=torch.float64)
    return total.item()
