"""Greedy generation, timed token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from wandapp_kernels.errors import UsageError

# An end of text that no model writes; None would mean the model's own.
_NO_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Generation:
    """What was generated, and when.

    Attributes:
        tokens: int64 ``[batch, new tokens]``, without the prompt.
        ttft: seconds from the call to the first new token (time to first token: the prefill).
        token_seconds: seconds of each further token (the decode).
        cpu_ttft, cpu_token_seconds: the same in CPU seconds of this process; with one thread, what a machine that does
            nothing else would take.
    """

    tokens: torch.Tensor
    ttft: float
    token_seconds: tuple[float, ...]
    cpu_ttft: float
    cpu_token_seconds: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float | None:
        """Decoded tokens of the whole batch per second, by the median token; None where only one was generated."""
        return self.tokens.shape[0] / median(self.token_seconds) if self.token_seconds else None

    @property
    def tokens_per_cpu_second(self) -> float | None:
        """The same per CPU second."""
        return self.tokens.shape[0] / median(self.cpu_token_seconds) if self.cpu_token_seconds else None


def generate_timed(
    model: PreTrainedModel,
    ids: torch.Tensor,
    max_new_tokens: int,
    *,
    cache: str = "dynamic",
    stop: bool = True,
    on_token: Callable[[torch.Tensor], None] = lambda _token: None,
) -> Generation:
    """``model.generate`` without sampling, with a clock.

    Args:
        ids: int64 ``[batch, prompt]``, no padding.
        max_new_tokens: at most; with ``stop=False`` exactly so many, past any end-of-text token.
        cache: ``"dynamic"`` or ``"static"`` (transformers' key/value caches).
        on_token: called with the new token of every sequence, int64 ``[batch]``, as soon as it is known.

    Raises:
        UsageError: ids are not ``[batch, prompt]``, the cache is unknown, or no token is asked for.
    """
    if ids.dim() != 2 or not ids.numel():
        raise UsageError(
            f"the prompt must be token ids [batch, tokens], not {list(ids.shape)}; give at least one token"
        )
    if cache not in ("dynamic", "static"):
        raise UsageError(f"cache {cache!r} is unknown; choose dynamic or static")
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens were asked for; ask for at least 1")
    own: Any = model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        cache_implementation="static" if cache == "static" else None,
        eos_token_id=own.eos_token_id if stop else _NO_TOKEN,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else 0,
        disable_compile=True,
    )
    clock = _Clock(on_token)
    with torch.no_grad():
        clock.note()
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=clock
        )
    assert isinstance(output, torch.Tensor)
    ttft, *rest = (after - before for before, after in pairwise(clock.times))
    cpu_ttft, *cpu_rest = (after - before for before, after in pairwise(clock.cpu_times))
    return Generation(output[:, ids.shape[1] :].cpu(), ttft, tuple(rest), cpu_ttft, tuple(cpu_rest))


class _Clock(BaseStreamer):
    """Notes when each token arrives; transformers hands over the prompt first."""

    def __init__(self, on_token: Callable[[torch.Tensor], None]):
        self.times: list[float] = []
        self.cpu_times: list[float] = []
        self._prompt_seen = False
        self._on_token = on_token

    def note(self) -> None:
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.note()
        self._on_token(value)

    def end(self) -> None:
        """Nothing is buffered."""
