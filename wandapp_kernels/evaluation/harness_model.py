"""A loaded model as lm-evaluation-harness sees one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from wandapp_kernels.errors import NonFiniteError, TextError
from wandapp_kernels.evaluation.perplexity import DEFAULT_SEQLEN, MAX_BATCH, MAX_LOGITS, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def harness_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None,
    progress: Callable[[int, int], None],
) -> Any:
    """An ``HFLM`` around a model that is in memory: it neither loads nor moves nor copies it.

    Log-softmax runs in fp32 whatever the model's type. It puts the model in evaluation mode.

    Args:
        tokenizer: copied, since HFLM gives it a padding token where it has none.
        batch_size: sequences at once; None takes as many as keep the logits within 512 MiB in fp32, at most 32.
        progress: ``(done, total)`` of the task's requests.

    Returns:
        With ``truncated``, the number of requests so far whose beginning did not fit the model's context.
    """
    from lm_eval.models.huggingface import HFLM

    vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]

    class InMemory(HFLM):
        truncated = 0
        _done = _total = 0
        _counts = True

        def _fit(self, longest: int) -> None:
            if batch_size is None:
                self.batch_size_per_gpu = max(1, min(MAX_BATCH, MAX_LOGITS // (longest * vocabulary)))

        def _start(self, total: int) -> None:
            self._done, self._total = 0, total

        def _advance(self, count: int) -> None:
            self._done += count
            if self._counts:
                progress(self._done, self._total)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
            found = []
            self._counts = False  # windows, of which nobody knows how many come
            for done, request in enumerate(requests, start=1):
                found += super().loglikelihood_rolling([request], disable_tqdm=True)
                progress(done, len(requests))
            self._counts = True
            return found

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
            self._fit(self.max_length)
            self._start(len(requests))
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
            lengths = [len(context) + len(continuation) for _, context, continuation in requests]
            longest = max((len(continuation) for *_, continuation in requests), default=0)
            if longest > self.max_length:
                raise TextError(
                    f"an answer of the task has {longest} tokens, but the model's context is {self.max_length}; leave "
                    "the task out"
                )
            self.truncated += sum(length > self.max_length + 1 for length in lengths)
            self._fit(min(max(lengths, default=1), self.max_length))
            # Answers of one token after the same text share a row.
            self._start(len({(*context, *continuation[:-1]) for _, context, continuation in requests}))
            found = super()._loglikelihood_tokens(requests, *args, **options)
            wrong = sum(not math.isfinite(value) for value, _ in found)
            if wrong:
                raise NonFiniteError(
                    f"the model gives NaN or infinity as the log-likelihood of {wrong} of {len(found)} answers; look "
                    "for overflow in its weights or use a wider dtype"
                )
            return found

        def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            logits = super()._model_call(inps, *args, **options)
            self._advance(len(inps))
            return logits

        def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            tokens = super()._model_generate(context, *args, **options)
            self._advance(len(context))
            return tokens

    return InMemory(
        pretrained=model,
        backend="causal",
        tokenizer=copy.deepcopy(tokenizer),
        max_length=context_length(model),
        softmax_dtype="float32",
        batch_size=batch_size or max(1, min(MAX_BATCH, MAX_LOGITS // (DEFAULT_SEQLEN * vocabulary))),
    )
