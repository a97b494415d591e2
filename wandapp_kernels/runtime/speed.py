"""Speed of several forms of one model, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedModel

from wandapp_kernels.runtime.generation import Generation, compile_decode, generate_timed
from wandapp_kernels.runtime.prepare import Prepared


@dataclass(frozen=True)
class Contender:
    """One form of the model: its name, the model itself, how it runs (`prepare`), and whether it decodes compiled."""

    name: str
    model: PreTrainedModel
    prepared: Prepared
    compiled: bool = False

    def generate(self, ids: torch.Tensor, new_tokens: int) -> Generation:
        """A counted run."""
        with self.prepared.running():
            return generate_timed(self.model, ids, new_tokens, compiled=self.compiled, stop=False)

    def warm_up(self, ids: torch.Tensor, new_tokens: int) -> None:
        """What `generate` does only the first time."""
        with self.prepared.running():
            if self.compiled:
                compile_decode(self.model, ids, new_tokens)
            else:
                generate_timed(self.model, ids, 2, stop=False)


@dataclass(frozen=True)
class Speed:
    """One contender at one prompt length and batch size.

    Attributes:
        ttft: median seconds to the first token, over the rounds.
        tokens_per_second: of the whole batch while decoding: median over the rounds of each round's median token.
        cpu_ttft, tokens_per_cpu_second: the same in CPU seconds (`Generation`), for machines that others use too.
        tokens: the new tokens of the first round, one list per sequence.
    """

    name: str
    prompt: int
    batch: int
    ttft: float
    tokens_per_second: float
    cpu_ttft: float
    tokens_per_cpu_second: float
    tokens: list[list[int]]


def measure_speed(
    contenders: Sequence[Contender],
    prompts: Mapping[int, torch.Tensor],
    settings: Sequence[tuple[int, int]],
    new_tokens: int,
    rounds: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Speed]:
    """Generate with every contender in turn, round after round, so that a disturbance hits all of them.

    Args:
        prompts: length -> int64 ``[1, length]``; a batch repeats it.
        settings: pairs ``(prompt length, batch size)``. Contenders that decode compiled run only at the first prompt
            length: the prefill is not compiled, and compiling anew for every length would take minutes.
        new_tokens: decoded in every run, at least 2.
        rounds: after one that is not counted; the order of the contenders rotates.

    Returns:
        One entry for each setting and contender, in that order.
    """
    found: list[Speed] = []
    total = len(settings) * (rounds + 1)
    for position, (prompt, batch) in enumerate(settings):
        ids = prompts[prompt].repeat(batch, 1)
        present = [contender for contender in contenders if not contender.compiled or prompt == settings[0][0]]
        runs: dict[str, list[Generation]] = {contender.name: [] for contender in present}
        for round_ in range(rounds + 1):
            for turn in range(len(present)):
                contender = present[(round_ + turn) % len(present)]
                if round_:
                    runs[contender.name].append(contender.generate(ids, new_tokens))
                else:
                    contender.warm_up(ids, new_tokens)
            progress(position * (rounds + 1) + round_ + 1, total)
        if any(contender.compiled for contender in present):
            torch.compiler.reset()  # a function is compiled a few times, then it runs as it is
        for name, counted in runs.items():
            figures = (
                median(run.ttft for run in counted),
                median(run.tokens_per_second or 0.0 for run in counted),
                median(run.cpu_ttft for run in counted),
                median(run.tokens_per_cpu_second or 0.0 for run in counted),
            )
            found.append(Speed(name, prompt, batch, *figures, tokens=counted[0].tokens.tolist()))
    return found


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two outputs share from the start."""
    for position, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return position
    return min(len(left), len(right))
