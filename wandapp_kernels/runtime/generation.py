"""Greedy generation, timed token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from wandapp_kernels.errors import KernelError, UsageError
from wandapp_kernels.models.generation_config import plain_generation_config
from wandapp_kernels.runtime.compiling import compile_config

# An end of text that no model writes; None would mean the model's own.
_NO_TOKEN = 2**31 - 1

# The prefill writes the first token; a CUDA graph is recorded at the second or third run of what is compiled.
_WARM_STEPS = 5


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
    cache: str | None = None,
    compiled: bool = False,
    stop: bool = True,
    on_token: Callable[[torch.Tensor], None] = lambda _token: None,
) -> Generation:
    """``model.generate``, always the most likely token whatever the model's own generation settings say, with a clock.

    Args:
        ids: int64 ``[batch, prompt]``, no padding; on any device.
        max_new_tokens: at most; with ``stop=False`` exactly so many, past any end-of-text token.
        cache: ``"dynamic"`` or ``"static"`` (transformers' key/value caches); None: static when compiled, else dynamic.
        compiled: the decode step runs compiled (`compiling.compile_config`), the prefill does not. Compiling takes a
            minute or more and happens at the second token, unless `compile_decode` did it before.
        on_token: called with the new token of every sequence, int64 ``[batch]``, as soon as it is known.

    Raises:
        UsageError: ids are not ``[batch, prompt]``, the cache is unknown or, compiled, dynamic, or no token is asked
            for.
    """
    return _generate(model, ids, max_new_tokens, cache, compiled, stop, _Clock(on_token))


def compile_decode(model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int) -> None:
    """Compile the decode step that ``generate_timed(model, ids, max_new_tokens, compiled=True)`` will run.

    The step is compiled for the batch size and the length of the cache, which is that of the prompt and the new tokens.

    Raises:
        KernelError: it cannot be compiled; says why.
        UsageError: as `generate_timed`.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    stopping = StoppingCriteriaList([_AfterSteps(_WARM_STEPS)])
    try:
        _generate(model, ids, max_new_tokens, None, True, False, _Clock(lambda _: None), stopping)
    except TorchDynamoException as error:
        reason = " ".join(str(error).split("\n")[:2]).strip()  # the second says why where a backend failed
        raise KernelError(f"the decode step cannot be compiled ({reason}); run it as it is") from error
    # Only what transformers did compile is there.
    if max_new_tokens > 1 and not hasattr(model, "_compiled_call"):
        raise KernelError(
            f"transformers does not compile the decode step of {type(model).__name__}, which has no cache of fixed "
            "size; run it as it is"
        )


def _generate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    max_new_tokens: int,
    cache: str | None,
    compiled: bool,
    stop: bool,
    clock: _Clock,
    stopping: StoppingCriteriaList | None = None,
) -> Generation:
    if ids.dim() != 2 or not ids.numel():
        raise UsageError(
            f"the prompt must be token ids [batch, tokens], not {list(ids.shape)}; give at least one token"
        )
    cache = cache or ("static" if compiled else "dynamic")
    if cache not in ("dynamic", "static"):
        raise UsageError(f"cache {cache!r} is unknown; choose dynamic or static")
    if compiled and cache != "static":
        raise UsageError("a compiled decode step needs a cache of fixed size; choose the static cache")
    if max_new_tokens < 1:
        raise UsageError(f"{max_new_tokens} new tokens were asked for; ask for at least 1")
    ids = ids.to(model.device)
    own: Any = model.generation_config
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        cache_implementation="static" if cache == "static" else None,
        eos_token_id=own.eos_token_id if stop else _NO_TOKEN,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else 0,
        disable_compile=not compiled,
        compile_config=compile_config(model.device) if compiled else None,
    )
    with torch.no_grad(), plain_generation_config(model):
        clock.note()
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=stopping,
            streamer=clock,
        )
    assert isinstance(output, torch.Tensor)
    ttft, *rest = (after - before for before, after in pairwise(clock.times))
    cpu_ttft, *cpu_rest = (after - before for before, after in pairwise(clock.cpu_times))
    return Generation(output[:, ids.shape[1] :].cpu(), ttft, tuple(rest), cpu_ttft, tuple(cpu_rest))


class _AfterSteps(StoppingCriteria):
    """Stops generation after a number of tokens, where the cache must have room for more."""

    def __init__(self, steps: int):
        self._left = steps

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        self._left -= 1
        return torch.full((input_ids.shape[0],), self._left <= 0, device=input_ids.device)  # type: ignore[return-value]


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
