"""Timing every backend that can run a problem, side by side.

Candidates take turns (so that a disturbance hits all of them) in an order drawn anew for every round, the median
counts, and candidates of one layout walk together through copies of the weight that exceed the last-level cache twice:
in a model, too, a weight is no longer in the cache when it is needed again. On a CPU every turn is two calls, of which
the second counts: in a model the layer before has woken the threads.

To take turns, layouts must be held at the same time. Of a large weight only as many are as fit in `HELD_BYTES`: then
the next ones are packed, which are compared with the median of the fastest so far. A call of theirs takes so long that
what disturbs it is part of every call.
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

# One call of a backend.
Run = Callable[[], torch.Tensor]

# Candidates slower than the fastest by this factor keep the median they have: after MIN_ROUNDS, and after two rounds.
HOPELESS, ABSURD = 2.0, 10.0

# Packed forms of one weight that are held at once, copies to exceed the cache not counted; one always is.
HELD_BYTES = 1 << 30

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
        seconds: about how long to go on after ``MIN_ROUNDS`` rounds; for each group, where not all layouts are held at
            once.
    """
    load_backends()
    device = problem.device
    generator = torch.Generator(device).manual_seed(problem.tokens)
    x = torch.randn((problem.tokens, problem.in_features), generator=generator, device=device).to(problem.dtype)
    left_out = dict(UNAVAILABLE)
    expected = BACKENDS[DENSE].run(x, [sample.dense], None, sample.shape, None)
    times: dict[str, float] = {}
    calls: dict[str, Iterator[Run]] = {}
    held = 0
    for name in [DENSE, *(layouts_of(problem.operator) if sample.compressed is not None else [])]:
        willing = _candidates(name, problem, sample, left_out)
        # A packed form takes no more than the dense one, or little; the canonical one is the sample's own.
        if willing and name != CANONICAL.get(problem.operator) and held and held + sample.dense.nbytes > HELD_BYTES:
            times |= _medians(calls, device, seconds, times)
            calls, held = {}, 0  # no form of this group is left when the next one is packed
        packed = _packed(name, sample) if willing else ""
        if isinstance(packed, str):
            reason = f"the layout {name} cannot hold this weight: {packed}"
            left_out.update({backend.name: reason for backend in willing})
            continue
        wrong = {backend.name: _wrong(backend, x, packed, sample, expected) for backend in willing}
        left_out.update({backend: reason for backend, reason in wrong.items() if reason is not None})
        willing = [backend for backend in willing if wrong[backend.name] is None]
        if willing:
            calls |= _rotating(willing, x, packed, sample)
            held += 0 if _is_given(packed, sample) else _bytes(packed)
        del packed
    return Measurement(times | _medians(calls, device, seconds, times), left_out)


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


def _candidates(layout: str, problem: Problem, sample: SampleWeight, left_out: dict[str, str]) -> list[Backend]:
    """Backends that can run the problem on this layout; the others go into ``left_out``."""
    willing = _willing(layout, problem, left_out)
    # A layout nobody computes on here would only be decompressed; the canonical one stands for all of those.
    kept = (DENSE, CANONICAL.get(problem.operator))
    return willing if layout in kept or any(backend.name in BACKENDS for backend in willing) else []


def _packed(name: str, sample: SampleWeight) -> list[torch.Tensor] | str:
    """The weight in a layout, or why it cannot be."""
    if name == DENSE:
        return [sample.dense]
    layout, weight = get_layout(name), sample.compressed
    assert weight is not None
    reason = layout.supports(weight)
    if reason is not None:
        return reason
    try:
        return layout.pack(weight)
    except Exception as error:
        return _sentence(error)


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


def _is_given(tensors: Sequence[torch.Tensor], sample: SampleWeight) -> bool:
    """Whether they are the sample's own, and not another form of it."""
    own = [sample.dense] if sample.compressed is None else [sample.dense, sample.compressed.values]
    return tensors[0].data_ptr() in [tensor.data_ptr() for tensor in own]


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _rotating(
    backends: Sequence[Backend], x: torch.Tensor, tensors: list[torch.Tensor], sample: SampleWeight
) -> dict[str, Iterator[Run]]:
    """Endless calls of every backend of a layout, each prepared for a copy of the weight, as a layer keeps them.

    The next call, of whichever backend, takes the next copy. ``tensors`` are the first; a weight that exceeds the cache
    twice has no other.
    """
    # More than the calls of all rounds, two in a turn, would not be reached.
    copies = min(1 + 2 * last_level_cache(str(x.device)) // max(_bytes(tensors), 1), 2 * MAX_ROUNDS)
    held = [tensors, *([tensor.clone() for tensor in tensors] for _ in range(copies - 1))]
    places = cycle(range(copies))

    def dense(backend: Backend, copy: list[torch.Tensor], call: Call) -> torch.Tensor:
        return backend.run(x, copy, None, sample.shape, sample.pattern)

    def checked(backend: Backend, copy: list[torch.Tensor], call: Call) -> torch.Tensor:
        # What every call of a layer pays: a small one that wins only without it does not win.
        is_plain(x, None)
        check_linear(backend.name, x, copy, None, *sample.shape)
        return call(x, (copy, None))

    def turns(backend: Backend) -> Iterator[Run]:
        run = dense if backend.name == DENSE else checked
        calls = [partial(run, backend, copy, backend.bind(copy, None, sample.shape, sample.pattern)) for copy in held]
        return (calls[place] for place in places)

    return {backend.name: turns(backend) for backend in backends}


def _medians(
    turns: dict[str, Iterator[Run]], device: str, seconds: float, before: dict[str, float] | None = None
) -> dict[str, float]:
    """Microseconds of each; ``before``: of those that were timed in groups before, which may be the fastest."""
    samples: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    stop = time.perf_counter() + seconds
    order = random.Random(0)
    for round_ in range(MAX_ROUNDS if names else 0):
        if round_ in (2, MIN_ROUNDS):
            # The rest of the time is for those that may win. Of two times the lower: the other may be a disturbance.
            medians = {name: statistics.median_low(samples[name]) for name in names}
            most = (ABSURD if round_ < MIN_ROUNDS else HOPELESS) * min([*medians.values(), *(before or {}).values()])
            names = [name for name in names if medians[name] <= most]
        if round_ >= MIN_ROUNDS and time.perf_counter() > stop:
            break
        order.shuffle(names)
        for name in names:
            samples[name].append(_time(turns[name], device))
    return {name: statistics.median(times) for name, times in samples.items()}


def _time(calls: Iterator[Run], device: str) -> float:
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
