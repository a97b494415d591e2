"""An MLP's gate and up, ``silu(x Gᵀ) · (x Uᵀ)``: the fused kernel beside two 2:4 products and two dense ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from bench.h100.cases import Case, gpu_backends, problem, refusal
from bench.h100.clock import Section
from bench.h100.timing import copies_for, time_calls
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.tuning.measure import sample_weight

SHAPES = (("LLaMA-3-8B", (14336, 4096)), ("LLaMA-7B", (11008, 4096)))
TOKENS = (1, 8, 16, 64)


def measure(section: Section, cache_bytes: int) -> None:
    """A row for every shape and number of tokens."""
    from wandapp_kernels.backends.cuda import nm_swiglu
    from wandapp_kernels.backends.cuda.nm import CudaNMBackend

    (backend,) = [each for each in gpu_backends("nm_linear") if isinstance(each, CudaNMBackend)]
    for name, shape in section.cases(SHAPES):
        case = Case(name, shape, "2:4", 50)
        if (reason := refusal(backend, problem(case, 1))) is not None:
            section.leave_out(name, reason)
            continue
        gate, up = sample_weight(problem(case, 1), 1), sample_weight(problem(case, 1), 2)
        assert gate.compressed is not None and up.compressed is not None
        count = copies_for(2 * gate.dense.nbytes, cache_bytes, torch.cuda.mem_get_info()[0])
        dense = [(gate.dense.clone(), up.dense.clone()) for _ in range(count)]
        packed = [[get_layout(backend.layout).pack(each.compressed) for each in (gate, up)] for _ in range(count)]

        def product(linear: Callable[[torch.Tensor, object], torch.Tensor], x: torch.Tensor, pair: tuple) -> object:
            return functional.silu(linear(x, pair[0])) * linear(x, pair[1])

        def sparse(x: torch.Tensor, tensors: list[torch.Tensor], shape: tuple[int, int] = shape) -> torch.Tensor:
            return backend.run(x, tensors, None, shape, None)

        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1], device="cuda").to(gate.dense.dtype)
            found = {
                "dense_us": time_calls([partial(product, functional.linear, x, pair) for pair in dense]).us,
                "two_us": time_calls([partial(product, sparse, x, pair) for pair in packed]).us,
                "fused_us": time_calls([partial(nm_swiglu, x, *pair, None, None, shape) for pair in packed]).us,
            }
            times = {"fused_times_dense": found["dense_us"] / found["fused_us"]}
            section.rows.append({"model": name, "shape": list(shape), "tokens": tokens, **found, **times})
