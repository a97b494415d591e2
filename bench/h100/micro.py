"""One linear at a time: every backend, every shape, every number of tokens, beside the dense product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from bench.h100.cases import TOKENS, Case, gpu_backends, problem, refusal, refused_always, weights
from bench.h100.clock import Section
from bench.h100.timing import Timing, copies_for, time_calls
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.tuning.measure import SampleWeight, sample_weight


def measure(section: Section, bandwidth: float, cache_bytes: int) -> None:
    """Fill the section: a row for every case, number of tokens and backend."""
    dense: dict[tuple[tuple[int, int], int], Timing] = {}
    packed: Case | None = None
    candidates: list[tuple[Any, Any]] = []
    for case, tokens in section.cases(
        [(case, tokens) for case in weights() for tokens in TOKENS], lambda one: f"{one[0]}, {one[1]} tokens"
    ):
        if case != packed:
            candidates.clear()  # frees the last weight
            sample = sample_weight(problem(case, 1))
            packed, candidates = case, _candidates(section, case, sample, cache_bytes)
        x = torch.randn(tokens, case.shape[1], device="cuda").to(sample.dense.dtype)
        if (case.shape, tokens) not in dense:
            copies = _copies([sample.dense], cache_bytes)
            calls = [partial(functional.linear, x, copy[0]) for copy in copies]
            dense[case.shape, tokens] = time_calls(calls)
            del copies, calls
            section.rows.append(
                row(case, tokens, "dense", dense[case.shape, tokens], None, sample.dense.nbytes, bandwidth)
            )
        for backend, copies in candidates:
            if refusal(backend, problem(case, tokens)) is not None:
                continue
            try:
                found = time_calls(
                    [partial(backend.run, x, copy, None, sample.shape, sample.pattern) for copy in copies]
                )
            except Exception as error:
                section.leave_out(f"{case}, {tokens} tokens, {backend.name}", f"{type(error).__name__}: {error}")
                continue
            size = sum(tensor.nbytes for tensor in copies[0])
            section.rows.append(row(case, tokens, backend.name, found, dense[case.shape, tokens], size, bandwidth))


def _candidates(section: Section, case: Case, sample: SampleWeight, cache_bytes: int) -> list[tuple[Any, Any]]:
    """Backends that take the case with few or with many tokens, each with copies of its packed weight."""
    assert sample.compressed is not None
    found, packed = [], {}
    for backend in gpu_backends(problem(case, 1).operator):
        layout = get_layout(backend.layout)
        reason = refused_always(backend, case, TOKENS) or layout.supports(sample.compressed)
        if reason is not None:
            section.leave_out(f"{case}, {backend.name}", reason)
            continue
        if layout.name not in packed:
            packed[layout.name] = _copies(layout.pack(sample.compressed), cache_bytes)
        found.append((backend, packed[layout.name]))
    return found


def _copies(tensors: Sequence[torch.Tensor], cache_bytes: int) -> list[list[torch.Tensor]]:
    size = sum(tensor.nbytes for tensor in tensors)
    free: Callable[[], tuple[int, int]] = torch.cuda.mem_get_info
    return [[tensor.clone() for tensor in tensors] for _ in range(copies_for(size, cache_bytes, free()[0]))]


def row(
    case: Case, tokens: int, backend: str, timing: Timing, dense: Timing | None, weight_bytes: int, bandwidth: float
) -> dict[str, Any]:
    """One line of the report; ``dense`` is None for the dense product itself."""
    moved = weight_bytes + 2 * tokens * sum(case.shape)
    rate = moved / (1e-6 * timing.us)
    return {
        "name": case.name,
        "shape": list(case.shape),
        "pattern": "dense" if dense is None else case.pattern,
        "density": 100 if dense is None else case.density,
        "tokens": tokens,
        "backend": backend,
        "us": timing.us,
        "low_us": timing.low_us,
        "high_us": timing.high_us,
        "graph": timing.graph,
        "weight_bytes": weight_bytes,
        "gb_per_second": 1e-9 * rate,
        "share_of_bandwidth": rate / bandwidth,
        "tflops": 2e-6 * tokens * case.shape[0] * case.shape[1] / timing.us,
        "times_dense": None if dense is None else dense.us / timing.us,
    }
