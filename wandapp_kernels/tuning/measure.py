"""Timing every backend that can run a problem, side by side.

Candidates take turns (so that a disturbance hits all of them) in an order drawn anew for every round, the median
counts, and every candidate walks through copies of its weight that together exceed the last-level cache twice: in a
model, too, a weight is no longer in the cache when it is needed again. On a CPU every turn is two calls, of which the
second counts: in a model the layer before has woken the threads.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch

from wandapp_kernels.backends import (
    BACKENDS,
    DENSE,
    UNAVAILABLE,
    UNSTRUCTURED,
    Backend,
    Call,
    Problem,
    ReferenceBackend,
    backends_of,
    layouts_of,
    load_backends,
)
from wandapp_kernels.backends.problem import DENSE_OPERATOR
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.layouts import CANONICAL, CompressedWeight, get_layout
from wandapp_kernels.ops.operator import check_linear, is_plain
from wandapp_kernels.sparsity import BitmapWeight, NMWeight, Pattern, mask_from_scores
from wandapp_kernels.tuning.device import last_level_cache
from wandapp_kernels.tuning.store import Measurement

MIN_ROUNDS, MAX_ROUNDS = 5, 50

# Candidates slower than the fastest by this factor keep the median they have: after MIN_ROUNDS, and after two rounds.
HOPELESS, ABSURD = 2.0, 10.0

# Largest relative difference to the dense result, |y - y_dense| / |y_dense|, that rounding can explain.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class SampleWeight:
    """A random weight of the problem's shape, pattern and density: dense, and compressed unless it stays dense."""

    dense: torch.Tensor
    compressed: CompressedWeight | None
    pattern: Pattern | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``"""
        return self.dense.shape[0], self.dense.shape[1]


def sample_weight(problem: Problem, seed: int = 0) -> SampleWeight:
    """A random weight for a problem; the token count does not matter."""
    generator = torch.Generator(problem.device).manual_seed(seed)
    shape = (problem.out_features, problem.in_features)
    weight = torch.randn(shape, generator=generator, device=problem.device).to(problem.dtype)
    if problem.operator == DENSE_OPERATOR:
        return SampleWeight(weight, None, None)
    pattern = None if problem.pattern == UNSTRUCTURED else Pattern.parse(problem.pattern)
    if problem.density_bucket < 100 or pattern is not None:
        scores = torch.rand(shape, generator=generator, device=problem.device)
        weight *= mask_from_scores(scores, pattern or Pattern(1 - problem.density_bucket / 100))
    if pattern is None:
        return SampleWeight(weight, BitmapWeight.compress(weight), None)
    return SampleWeight(weight, NMWeight.compress(weight, pattern=pattern), pattern)


def measure(problem: Problem, sample: SampleWeight, seconds: float = 1.0) -> Measurement:
    """Time every backend that can run ``problem``.

    A backend that raises, or whose result is not the dense one, is left out with that as its reason.

    Args:
        problem: measured at ``problem.tokens``.
        sample: a weight for it (:func:`sample_weight`).
        seconds: about how long to go on after ``MIN_ROUNDS`` rounds.
    """
    load_backends()
    device = problem.device
    generator = torch.Generator(device).manual_seed(problem.tokens)
    x = torch.randn((problem.tokens, problem.in_features), generator=generator, device=device).to(problem.dtype)
    left_out = dict(UNAVAILABLE)
    calls: dict[str, list[Callable[[], torch.Tensor]]] = {}
    expected = BACKENDS[DENSE].run(x, [sample.dense], None, sample.shape, None)
    for backend, tensors in _candidates(problem, sample, left_out):
        reason = _wrong(backend, x, tensors, sample, expected)
        if reason is None:
            calls[backend.name] = _rotating(backend, x, tensors, sample)
        else:
            left_out[backend.name] = reason
    return Measurement(_medians(calls, device, seconds), left_out)


def is_complete(problem: Problem, found: Measurement) -> bool:
    """Whether every backend that would run the problem was there when it was measured: another may be new."""
    willing = {
        backend.name
        for layout in [DENSE, *layouts_of(problem.operator)]
        for backend in backends_of(layout)
        if backend.name in BACKENDS and backend.supports(problem) is None
    }
    return willing <= found.times_us.keys() | found.left_out.keys()


def require_here(problem: Problem) -> None:
    """Raises UsageError where the problem is for another number of threads than torch uses now."""
    if problem.device.startswith("cpu") and problem.threads != torch.get_num_threads():
        raise UsageError(
            f"the problem is for {problem.threads} threads, but torch uses {torch.get_num_threads()}: set them first"
        )


def _candidates(
    problem: Problem, sample: SampleWeight, left_out: dict[str, str]
) -> Iterator[tuple[Backend, list[torch.Tensor]]]:
    """Backends that can run the problem, each with the weight in its layout; the others go into ``left_out``."""
    for backend in _willing(DENSE, problem, left_out):
        yield backend, [sample.dense]
    if sample.compressed is None:
        return
    for name in layouts_of(problem.operator):
        willing = _willing(name, problem, left_out)
        # A layout nobody computes on here would only be decompressed; the canonical one stands for all of those.
        if name != CANONICAL[problem.operator] and not any(backend.name in BACKENDS for backend in willing):
            continue
        layout = get_layout(name)
        reason = layout.supports(sample.compressed)
        if reason is None:
            try:
                tensors = layout.pack(sample.compressed)
            except Exception as error:
                reason = _sentence(error)
        if reason is not None:
            left_out.update(
                {backend.name: f"the layout {name} cannot hold this weight: {reason}" for backend in willing}
            )
            continue
        yield from ((backend, tensors) for backend in willing)


def _willing(layout: str, problem: Problem, left_out: dict[str, str]) -> list[Backend]:
    # One reference is enough to say that it was left out.
    extra = layout not in CANONICAL.values()
    backends = [backend for backend in backends_of(layout) if not (extra and isinstance(backend, ReferenceBackend))]
    reasons = {backend: _reason(backend, problem) for backend in backends}
    left_out.update({backend.name: reason for backend, reason in reasons.items() if reason is not None})
    return [backend for backend, reason in reasons.items() if reason is None]


def _reason(backend: Backend, problem: Problem) -> str | None:
    if isinstance(backend, ReferenceBackend):
        return "the reference is for checking, not for speed"
    return backend.supports(problem)


def _wrong(
    backend: Backend, x: torch.Tensor, tensors: Sequence[torch.Tensor], sample: SampleWeight, expected: torch.Tensor
) -> str | None:
    """Why the backend's result cannot be used, or None. Whatever goes wrong in a kernel must not stop the tuner."""
    try:
        got = backend.run(x, tensors, None, sample.shape, sample.pattern)
        error = float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    except Exception as failure:
        return _sentence(failure)
    if not error <= _TOLERANCE.get(x.dtype, 1e-3):
        return f"its result differs from the dense one by {error:.1e} of its norm"
    return None


def _sentence(error: Exception) -> str:
    return f"it fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _rotating(
    backend: Backend, x: torch.Tensor, tensors: list[torch.Tensor], sample: SampleWeight
) -> list[Callable[[], torch.Tensor]]:
    """Calls of the backend, each on another copy of its weight and prepared for it, as a layer keeps them."""
    size = max(sum(tensor.nbytes for tensor in tensors), 1)
    # More than the calls of all rounds, two in a turn, would not be reached.
    copies = min(1 + -(-2 * last_level_cache(str(x.device)) // size), 2 * MAX_ROUNDS)

    def dense(copy: list[torch.Tensor], call: Call) -> torch.Tensor:
        return backend.run(x, copy, None, sample.shape, sample.pattern)

    def checked(copy: list[torch.Tensor], call: Call) -> torch.Tensor:
        # What every call of a layer pays: a small one that wins only without it does not win.
        is_plain(x, None)
        check_linear(backend.name, x, copy, None, *sample.shape)
        return call(x, (copy, None))

    run = dense if backend.name == DENSE else checked
    clones = [[tensor.clone() for tensor in tensors] for _ in range(copies)]
    return [partial(run, copy, backend.bind(copy, None, sample.shape, sample.pattern)) for copy in clones]


def _medians(calls: dict[str, list[Callable[[], torch.Tensor]]], device: str, seconds: float) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    turns = {name: cycle(copies) for name, copies in calls.items()}
    stop = time.perf_counter() + seconds
    order = random.Random(0)
    for round_ in range(MAX_ROUNDS):
        if round_ in (2, MIN_ROUNDS):
            # The rest of the time is for those that may win. Of two times the lower: the other may be a disturbance.
            medians = {name: statistics.median_low(samples[name]) for name in names}
            most = (ABSURD if round_ < MIN_ROUNDS else HOPELESS) * min(medians.values())
            names = [name for name in names if medians[name] <= most]
        if round_ >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        order.shuffle(names)
        for name in names:
            samples[name].append(_time(turns[name], device))
    return {name: statistics.median(times) for name, times in samples.items()}


def _time(calls: Iterator[Callable[[], torch.Tensor]], device: str) -> float:
    """Microseconds of the next call, on a CPU of the one after it; on a GPU between two events on its stream."""
    call = next(calls)
    if torch.device(device).type != "cuda":
        call()
        call = next(calls)
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    with torch.cuda.device(device):  # events are recorded on the current GPU, wherever the call runs
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # The stream is kept busy while the call is issued, so that its time on the host is not counted.
        torch.cuda._sleep(500_000)
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
    return first.elapsed_time(last) * 1e3
