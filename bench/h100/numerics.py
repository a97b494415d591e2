"""Every GPU kernel against the reference in float64: the first thing that runs, and a wrong result ends the run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from bench.h100.cases import VENDOR, Case, gpu_backends, problem, refusal, refused_always
from bench.h100.clock import Section
from wandapp_kernels.backends import UNSTRUCTURED, Backend
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.tuning.measure import SampleWeight, sample_weight

# Relative error of the whole result, ‖y − y_ref‖ / ‖y_ref‖, that rounding explains.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = ((17, 200), (64, 128), (1000, 520), (1024, 4096), (4096, 4096), (4096, 11008))  # the awkward ones first
TOKENS = (1, 3, 8, 11, 16, 17, 33, 64, 65, 200, 515)
Row = dict[str, Any]


def check_linears(section: Section) -> Iterator[str]:
    """Compare every backend on every shape; yields a sentence for each failure."""
    for shape in section.cases(SHAPES):
        for pattern in ("2:4", UNSTRUCTURED):
            for dtype in (torch.bfloat16, torch.float16):
                case = Case("numerics", shape, pattern, 50)
                sample = sample_weight(problem(case, 1, dtype))
                for backend in gpu_backends(problem(case, 1).operator):
                    if backend.name in VENDOR and dtype == torch.float16:
                        continue  # each search takes a while, and compares what it found with the dense product itself
                    try:
                        yield from _check_backend(section, backend, case, sample, dtype)
                    except Exception as error:
                        sentence = f"{backend.name} {shape} {dtype}: {type(error).__name__}: {error}"
                        if backend.name not in VENDOR:
                            yield sentence
                        section.leave_out(f"{backend.name} {shape}", sentence)


def _check_backend(
    section: Section, backend: Backend, case: Case, sample: SampleWeight, dtype: torch.dtype
) -> Iterator[str]:
    assert sample.compressed is not None
    layout, name = get_layout(backend.layout), f"{backend.name} {case.shape[0]}x{case.shape[1]} {dtype}"
    reason = refused_always(backend, case, TOKENS, dtype) or layout.supports(sample.compressed)
    if reason is not None:
        section.leave_out(name, reason)
        return
    tensors = layout.pack(sample.compressed)
    dense = layout.decompress(tensors, sample.shape, sample.pattern)
    if not torch.equal(dense, sample.dense):
        yield f"{name}: the layout does not give the weight back"
        return
    if not torch.equal(layout.unpack(tensors, sample.shape, sample.pattern).decompress(), sample.dense):
        yield f"{name}: the unpacked layout is not the weight"
        return
    for tokens in TOKENS:
        if refusal(backend, problem(case, tokens, dtype)) is not None:
            continue
        bias = torch.randn(case.shape[0], device="cuda").to(dtype) if tokens % 2 else None
        x = torch.randn(tokens, case.shape[1], device="cuda").to(dtype)
        expected = functional.linear(x.double(), sample.dense.double(), None if bias is None else bias.double())
        got = backend.run(x, tensors, bias, sample.shape, sample.pattern)
        error = float((got.double() - expected).norm() / expected.norm())
        again = backend.run(x, tensors, bias, sample.shape, sample.pattern)
        row = {"kernel": name, "tokens": tokens, "error": error, "same_twice": bool(torch.equal(got, again))}
        section.rows.append(row)
        if not error <= TOLERANCE[dtype]:
            yield f"{name}, {tokens} tokens: the result is off by {error:.2e} of its norm"
        elif backend.name.startswith("cuda") and not row["same_twice"]:
            yield f"{name}, {tokens} tokens: two runs differ, and this kernel is to be deterministic"


def check_swiglu(section: Section) -> Iterator[str]:
    """The fused gate and up product."""
    from wandapp_kernels.backends.cuda import nm_swiglu

    case = Case("swiglu", (1000, 520), "2:4", 50)
    (backend,) = [each for each in gpu_backends("nm_linear") if each.name == "cuda-nm"]
    if (reason := refusal(backend, problem(case, 1))) is not None:
        section.leave_out("swiglu", reason)
        return
    gate, up = sample_weight(problem(case, 1), 1), sample_weight(problem(case, 1), 2)
    assert gate.compressed is not None and up.compressed is not None
    layout = get_layout(backend.layout)
    gate_tensors, up_tensors = layout.pack(gate.compressed), layout.pack(up.compressed)
    for tokens in (1, 8, 16, 40):
        x = torch.randn(tokens, 520, device="cuda").bfloat16()
        wide = [functional.linear(x.double(), each.dense.double()) for each in (gate, up)]
        expected = functional.silu(wide[0]) * wide[1]
        got = nm_swiglu(x, gate_tensors, up_tensors, None, None, case.shape)
        error = float((got.double() - expected).norm() / expected.norm())
        section.rows.append({"kernel": "swiglu", "tokens": tokens, "error": error})
        if not error <= TOLERANCE[torch.bfloat16]:
            yield f"swiglu, {tokens} tokens: the result is off by {error:.2e} of its norm"


def check_graph(section: Section) -> Iterator[str]:
    """A captured and replayed call gives what an eager one gives, also after its input has changed."""
    for pattern in ("2:4", UNSTRUCTURED):
        case = Case("graph", (1024, 4096), pattern, 50)
        sample = sample_weight(problem(case, 1))
        assert sample.compressed is not None
        for backend in gpu_backends(problem(case, 1).operator):
            if not backend.name.startswith("cuda") or refusal(backend, problem(case, 1)) is not None:
                continue
            tensors = get_layout(backend.layout).pack(sample.compressed)
            x = torch.randn(4, 4096, device="cuda").bfloat16()
            backend.run(x, tensors, None, sample.shape, sample.pattern)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = backend.run(x, tensors, None, sample.shape, sample.pattern)
            x.copy_(torch.randn(4, 4096, device="cuda"))
            for _ in range(3):
                graph.replay()
            same = bool(torch.equal(out, backend.run(x, tensors, None, sample.shape, sample.pattern)))
            section.rows.append({"kernel": f"{backend.name} in a graph", "tokens": 4, "same": same})
            if not same:
                yield f"{backend.name}: a replayed graph does not give what a call gives"
