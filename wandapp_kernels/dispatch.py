"""Which backend runs a sparse linear: the fastest that was measured, or without a measurement a fixed rule.

Importing this module installs its runner under the operators. Nothing is measured unless :func:`tune` is called. A call
of an operator looks its backend up in a dict; files are read once per device, when the first problem of it appears.

The rule without a measurement: the first backend made for the layout that takes the problem and says that it is meant
for it (``Backend.is_default``), else decompress and multiply. See ``docs/dispatch.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from wandapp_kernels.backends import (
    BACKENDS,
    DENSE,
    DENSE_OPERATOR,
    UNAVAILABLE,
    UNSTRUCTURED,
    Backend,
    Call,
    DecompressBackend,
    Problem,
    UnusableError,
    backends_of,
    choices_changed,
    epoch,
    layouts_of,
    load_backends,
    token_bucket,
)
from wandapp_kernels.backends import problem_for as problem_for
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.layouts import CANONICAL, get_layout
from wandapp_kernels.ops.running import Weight, parse_pattern, set_runner, set_together_runner
from wandapp_kernels.tuning.best_layout import best_layout
from wandapp_kernels.tuning.measure import SampleWeight, is_complete, measure, require_here, sample_weight
from wandapp_kernels.tuning.store import Measurement, Store

_stores: dict[str, Store] = {}
_memo: dict[tuple[Any, ...], Backend] = {}
_calls: dict[tuple[Any, ...], list[Call]] = {}
# Of weights that are gone nothing is known; a large model has a thousand, each at a few numbers of tokens.
_MOST_CALLS = 1 << 14
_frozen = False
_family: str | None = None


def choose(problem: Problem, layout: str) -> Backend:
    """The backend that runs ``problem`` on a weight held in ``layout``; never fails for a known layout.

    Raises:
        UsageError: the layout is unknown, or is for another operator.
    """
    problem = replace(problem, tokens=token_bucket(problem.tokens))
    if layout != DENSE and _operator_of(layout) != problem.operator:
        raise UsageError(f"layout {layout!r} is for {_operator_of(layout)}, not for {problem.operator}")
    usable = [backend for backend in backends_of(layout) if backend.supports(problem) is None]
    if _family is not None:
        usable = [backend for backend in usable if _in_family(backend.name)] or _fallback(usable)
    meant = [backend for backend in usable if backend.is_default(problem)]
    found, _ = _store(problem.device).nearest(problem)
    timed = [backend for backend in usable if found is not None and backend.name in found.times_us]
    if found is not None and timed:
        times = found.times_us
        return min(timed, key=lambda backend: times[backend.name])
    return (meant or _fallback(usable) or usable)[0]


def choose_dense(problem: Problem) -> Backend:
    """The backend for a layer that stays dense: the fastest measured.

    Without a measurement, at 16 bit, the first kernel of our own that is meant for so few tokens; else torch's product,
    which is also what runs within :func:`only` of a family that has no dense kernel.
    """
    problem = replace(problem, tokens=token_bucket(problem.tokens))
    found, _ = _store(problem.device).nearest(problem)
    if found is None and problem.dtype.itemsize == 2:
        for backend in backends_of(DENSE):
            if backend.name != DENSE and _takes(backend, problem) and backend.is_default(problem):
                return backend
    return choose(problem, DENSE)


def bind(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    pattern: str,
    layout: str,
) -> Call:
    """What :func:`run` would do with x ``[..., K]``, prepared: see `Backend.bind`, and good until `epoch` changes."""
    return _decide(x.view(-1, shape[1]), tensors, *shape, pattern, layout).bind(
        tensors, bias, shape, parse_pattern(pattern)
    )


def choose_layout(problem: Problem, *, compressed_only: bool = False) -> str:
    """The layout to hold the weight of ``problem`` in: that of the fastest backend measured; ``"dense"`` if that wins.

    Compressed layouts within 10 % of the fastest are told apart by their times at every token count that was measured
    (`tuning.best_layout`). Without a measurement: the layout of the first backend that takes the problem, and is meant
    for so many tokens if there is such a one; else the canonical one. Ask with the token count that matters most, which
    for a language model is 1.

    Args:
        compressed_only: the weight stays compressed, even where the dense product is faster.
    """
    problem = replace(problem, tokens=token_bucket(problem.tokens))
    layouts = layouts_of(problem.operator) if compressed_only else [DENSE, *layouts_of(problem.operator)]
    store = _store(problem.device)
    found, _ = store.nearest(problem)
    asked = {} if found is None else _best_times(problem, layouts, found)
    if asked:
        return best_layout(asked, (_best_times(each, layouts, known) for each, known in store.counts(problem).items()))
    # Backends, not layouts, are in the order of preference: the first that reads a layout may be for another device.
    wanted = {layout for layout in layouts if layout != DENSE or _family == DENSE}
    usable = [backend for backend in BACKENDS.values() if backend.layout in wanted and _takes(backend, problem)]
    if usable:
        return min(usable, key=lambda backend: not backend.is_default(problem)).layout
    return CANONICAL.get(problem.operator, DENSE)


def tune(
    problems: Iterable[Problem],
    *,
    seconds: float = 1.0,
    again: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Problem, Measurement]:
    """Measure every backend that can run each problem, dense always among them, and remember the times.

    Problems that differ only in their tokens share one random weight. What was measured before is kept, unless a
    backend has come since. Within :func:`frozen` nothing is measured.

    Args:
        problems: each is measured at the upper end of its bucket of tokens; duplicates are measured once.
        seconds: about how long for each problem.
        again: measure also what was measured before.
        progress: called with (done, total) after every problem.

    Returns:
        What is known of each problem now, measured here or before; absent when nothing is.
    """
    wanted = list(dict.fromkeys(replace(problem, tokens=token_bucket(problem.tokens)) for problem in problems))
    known: dict[Problem, Measurement] = {}
    shapes: dict[Problem, list[Problem]] = {}
    for problem in wanted:
        found = None if again and not _frozen else _store(problem.device).exact(problem)
        if found is not None and (_frozen or is_complete(problem, found)):
            known[problem] = found
        elif not _frozen:
            shapes.setdefault(replace(problem, tokens=1), []).append(problem)
    for shape, group in shapes.items():
        require_here(shape)
        sample: SampleWeight = sample_weight(shape)
        for problem in group:
            known[problem] = measure(problem, sample, seconds)
            # One by one: a run that is killed keeps what it has.
            _store(problem.device).put({problem: known[problem]})
            if progress is not None:
                progress(len(known), len(wanted))
        del sample
    _changed()
    return known


@dataclass(frozen=True)
class Explanation:
    """Why a backend was chosen.

    Attributes:
        problem: the bucket of tokens it was asked for.
        layout: the layout the choice is for.
        chosen: the backend's name.
        measured_tokens: the token count of the times that decided; None when the rule without a measurement did.
        times_us: backend -> median microseconds, fastest first; empty when nothing was measured.
        left_out: backend -> why it is no candidate.
    """

    problem: Problem
    layout: str
    chosen: str
    measured_tokens: int | None
    times_us: Mapping[str, float]
    left_out: Mapping[str, str]


def explain(problem: Problem, layout: str | None = None) -> Explanation:
    """Every candidate's time, why others were left out, and what is chosen. Measures nothing.

    Args:
        problem: its tokens count as the upper end of their bucket.
        layout: how the weight is held; None asks :func:`choose_layout`.
    """
    problem = replace(problem, tokens=token_bucket(problem.tokens))
    layout = choose_layout(problem) if layout is None else layout
    stays_dense = problem.operator == DENSE_OPERATOR
    chosen = (choose_dense(problem) if stays_dense else choose(problem, layout)).name
    found, tokens = _store(problem.device).nearest(problem)
    if found is not None:
        times = dict(sorted(found.times_us.items(), key=lambda entry: entry[1]))
        return Explanation(problem, layout, chosen, tokens if chosen in times else None, times, found.left_out)
    names = [DENSE, *layouts_of(problem.operator)]
    reasons = {backend.name: backend.supports(problem) for name in names for backend in backends_of(name)}
    left_out = UNAVAILABLE | {name: reason for name, reason in reasons.items() if reason is not None}
    return Explanation(problem, layout, chosen, None, {}, left_out)


@contextmanager
def frozen() -> Iterator[None]:
    """Within it :func:`tune` measures nothing: choices come from what was measured before, or from the rule."""
    global _frozen
    before, _frozen = _frozen, True
    try:
        yield
    finally:
        _frozen = before


@contextmanager
def only(family: str | None) -> Iterator[None]:
    """Within it only backends of one family run (``"cpu"``, ``"reference"``, …; None: all).

    Where none of the family can run a problem, the weight is decompressed. The choice is the process's, not the
    thread's.

    Raises:
        UsageError: no backend is of that family.
    """
    global _family
    load_backends()
    families = {name.partition("-")[0] for name in BACKENDS} | {"decompress", "reference"}
    if family is not None and family not in families:
        reason = f" ({UNAVAILABLE[family]})" if family in UNAVAILABLE else ""
        raise UsageError(f"there is no backend {family!r}{reason}: choose one of {', '.join(sorted(families))}")
    before, _family = _family, family
    _changed()
    try:
        yield
    finally:
        _family = before
        _changed()


def forget() -> None:
    """Drop everything remembered in this process, so that files are read again; the files stay."""
    _stores.clear()
    _changed()


def run(
    x: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    out_features: int,
    in_features: int,
    pattern: str,
    layout: str,
) -> torch.Tensor:
    """The runner under the operators (``ops.running.Runner``): one dict lookup, then the backend."""
    values = tensors[0]
    bucket = (x.shape[0] - 1).bit_length()
    kinds = (x.dtype, values.dtype, x.get_device(), torch.get_num_threads())
    key = (layout, pattern, out_features, in_features, bucket, values.numel(), *kinds)
    backend = _memo.get(key)
    if backend is None:
        backend = _memo[key] = _decide(x, tensors, out_features, in_features, pattern, layout)
    try:
        return backend.run(x, tensors, bias, (out_features, in_features), parse_pattern(pattern))
    except UnusableError:
        _memo.pop(key, None)
        return DecompressBackend(layout).run(x, tensors, bias, (out_features, in_features), parse_pattern(pattern))


def run_together(
    x: torch.Tensor, weights: Sequence[Weight], in_features: int, pattern: str, layout: str
) -> list[torch.Tensor]:
    """The runner under `ops.linears` (``ops.running.TogetherRunner``): calls are kept, as layers keep theirs."""
    bucket = (x.numel() // in_features - 1).bit_length()
    marks: list[Any] = [epoch(), layout, pattern, in_features, x.dtype, bucket, torch.get_num_threads()]
    kept = True
    for tensors, bias, rows in weights:
        marks += (rows, tensors[0].numel(), None if bias is None else bias.data_ptr())
        for tensor in tensors:
            marks.append(tensor.data_ptr())
            kept = kept and tensor.is_contiguous()
        kept = kept and (bias is None or bias.is_contiguous())
    key = tuple(marks)
    calls = _calls.get(key) if kept else None
    if calls is None:
        calls = [_call_for(x, weight, in_features, pattern, layout) for weight in weights]
        if kept:
            if len(_calls) >= _MOST_CALLS:
                _calls.clear()
            _calls[key] = calls
    first = calls[0]
    if len(calls) > 1 and first.kind is not None and all(call.kind == first.kind for call in calls):
        others = [(call, weight[:2]) for call, weight in zip(calls[1:], weights[1:], strict=True)]
        return first.run_together(x, others, weights[0][:2])
    return [call(x, weight[:2]) for call, weight in zip(calls, weights, strict=True)]


def _call_for(x: torch.Tensor, weight: Weight, in_features: int, pattern: str, layout: str) -> Call:
    tensors, bias, rows = weight
    if layout != DENSE:
        return bind(x, tensors, bias, (rows, in_features), pattern, layout)
    problem = problem_for(rows, in_features, DENSE, x.numel() // in_features, x.dtype, x.device)
    return choose_dense(problem).bind(tensors, bias, (rows, in_features), None)


def _decide(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], out_features: int, in_features: int, pattern: str, layout: str
) -> Backend:
    # Kernels take one type for x and weight; storage types and autocast are cast on the way.
    if tensors[0].dtype != x.dtype:
        return DecompressBackend(layout)
    density = get_layout(layout).density(tensors, (out_features, in_features), parse_pattern(pattern))
    problem = problem_for(out_features, in_features, pattern or UNSTRUCTURED, x.shape[0], x.dtype, x.device, density)
    return choose(problem, layout)


def _changed() -> None:
    choices_changed()
    _memo.clear()
    _calls.clear()


def _store(device: str) -> Store:
    if device not in _stores:
        _stores[device] = Store(device)
    return _stores[device]


def _operator_of(layout: str) -> str:
    load_backends()
    return DENSE_OPERATOR if layout == DENSE else get_layout(layout).operator


def _takes(backend: Backend, problem: Problem) -> bool:
    return _in_family(backend.name) and backend.supports(problem) is None


def _best_times(problem: Problem, layouts: Sequence[str], found: Measurement) -> dict[str, float]:
    """Layout -> the best time measured of a backend that runs the problem on it; without layouts that have none."""
    times = {
        layout: [
            found.times_us[backend.name]
            for backend in backends_of(layout)
            if backend.name in found.times_us and _takes(backend, problem)
        ]
        for layout in layouts
    }
    return {layout: min(of_it) for layout, of_it in times.items() if of_it}


def _in_family(name: str) -> bool:
    return _family is None or name.partition("-")[0] == _family


def _fallback(usable: Sequence[Backend]) -> list[Backend]:
    """What runs every problem of a layout: decompressing, or for a dense weight the dense product."""
    return [backend for backend in usable if isinstance(backend, DecompressBackend) or backend.name == DENSE]


set_runner(run)
set_together_runner(run_together)
