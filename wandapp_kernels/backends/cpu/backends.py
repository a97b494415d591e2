"""The backends over the compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch.nn import functional

from wandapp_kernels.backends.base import DENSE, UNLIMITED, Backend, Call, Held, Problem
from wandapp_kernels.backends.cpu import compiled
from wandapp_kernels.sparsity.pattern import Pattern

# A matrix of run_many: tensors in the backend's layout, bias, (N, K).
Matrix = tuple[Sequence[torch.Tensor], torch.Tensor | None, tuple[int, int]]

# Of a strip, which every thread works on. glibc gives blocks of 32 MB back at once, and they would be faulted in anew,
# page by page, at the next call.
_STRIP_BYTES, _STRIP_BYTES_PER_THREAD, _MOST_STRIP_BYTES = 8 << 20, 3 << 19, 24 << 20

# Without a measurement, where the processor multiplies bf16 natively: strips for the dense library are faster beyond.
_FAST_BF16_TOKENS, _OTHER_TOKENS = 16, 64


class CompiledBackend(Backend):
    """Runs the compiled kernel of its layout: fp32 accumulation, any shape, the same with any number of threads.

    Where x holds NaN or infinity the weight is decompressed, and torch multiplies.

    Attributes:
        variant: whose kernel; None: that of the variant in use.
    """

    variant: str | None = None

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        return self.run_many(x, [(tensors, bias, shape)])[0]

    def run_many(self, x: torch.Tensor, matrices: Sequence[Matrix]) -> list[torch.Tensor]:
        """Several matrices that share the input ``x [M, K]`` (q, k, v; gate, up) in one call: one ``[M, N]`` each.

        The threads are woken once and x is prepared once.
        """
        (first, held), *others = [
            (CpuCall(self, (tensors, bias), shape, x.dtype), (tensors, bias)) for tensors, bias, shape in matrices
        ]
        return first.run_together(x, others, held)

    def bind(
        self,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> CpuCall:
        return CpuCall(self, (tensors, bias), shape, tensors[0].dtype)


class CpuLinear(CompiledBackend):
    """The kernel of one sparse layout."""

    def __init__(self, name: str, operator: str, layout: str):
        self.name = name
        self.operator = operator
        self.layout = layout
        # Without native bf16 these kernels are faster than strips for the dense library at any number of tokens. But
        # spreading a bitmap for a few tokens at a time costs more than once for all of them.
        self.default_tokens = 128 if layout == "bitmap" else UNLIMITED

    def supports(self, problem: Problem) -> str | None:
        if problem.operator != self.operator:
            return f"it runs {self.operator}, not {problem.operator}"
        if self.operator == "nm_linear" and problem.pattern != "2:4":
            return f"its kernel is for 2:4, not for {problem.pattern}"
        return _reason(problem)

    def is_default(self, problem: Problem) -> bool:
        fast = _FAST_BF16_TOKENS if problem.dtype == torch.bfloat16 else _OTHER_TOKENS
        return problem.tokens <= (fast if compiled.has_fast_bf16_gemm() else self.default_tokens)


class CpuWindows(CpuLinear):
    """The kernel of the layout ``bitmap_windows``, for weights that it does not make much larger."""

    # Of a weight of which 60 % is kept the layout takes 0.83 of the dense bytes, at 70 % 0.94, at 80 % 1.06.
    _MOST_KEPT = 60

    def supports(self, problem: Problem) -> str | None:
        reason = super().supports(problem)
        if reason is None and problem.in_features > compiled.WINDOW_COLUMNS:
            return f"its layout holds at most {compiled.WINDOW_COLUMNS:,} columns"
        if reason is None and problem.density_bucket > self._MOST_KEPT:
            return f"its padding is not worth it where more than {self._MOST_KEPT} % of the weights are kept"
        return reason


class CpuStrips(Backend):
    """Decompress a strip of rows into scratch that fits the cache, multiply it with the dense library, next strip.

    For many tokens: decompressing costs one pass over the weight. Where the processor has no bf16 instructions the
    strip is widened to fp32, which the dense library multiplies several times faster.
    """

    def __init__(self, kernel: CpuLinear):
        self._kernel = kernel
        self.name = f"{kernel.name}-strips"
        self.operator = kernel.operator
        self.layout = kernel.layout
        self.default_tokens = UNLIMITED

    def supports(self, problem: Problem) -> str | None:
        return self._kernel.supports(problem)

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        return _by_strips(x, compiled.Bound(self.layout, tensors, None, shape, x.dtype), bias)


class CpuDense(CompiledBackend):
    """The dense kernel, written as the sparse ones: what they are compared with, and what dense layers should use.

    It takes a problem of any operator, with the weight decompressed.
    """

    name = "cpu-dense"
    layout = DENSE

    def __init__(self) -> None:
        # Where 16-bit products are emulated, the dense library loses at any number of tokens.
        self.default_tokens = 16 if compiled.has_fast_bf16_gemm() else UNLIMITED

    def supports(self, problem: Problem) -> str | None:
        return _reason(problem)


class CpuCall(Call):
    """A weight bound to the compiled kernel of its layout: a call passes addresses."""

    def __init__(self, backend: CompiledBackend, held: Held, shape: tuple[int, int], dtype: torch.dtype):
        super().__init__(backend, shape, None)
        self.bound = compiled.Bound(backend.layout, *held, shape, dtype, backend.variant)
        self.kind = (backend.layout, dtype, shape[1], backend.variant or compiled.variant())

    def __call__(self, x: torch.Tensor, held: Held) -> torch.Tensor:
        return self.run_together(x, (), held)[0]

    def run_together(self, x: torch.Tensor, others: Sequence[tuple[Call, Held]], held: Held) -> list[torch.Tensor]:
        calls = [(self, held), *cast("Sequence[tuple[CpuCall, Held]]", others)]
        outputs = compiled.multiply(x, [call.bound for call, _ in calls])
        if outputs is not None:
            return outputs
        # x holds NaN or infinity: a dense linear also multiplies it with the zeros.
        rows = x.view(-1, x.shape[-1])
        outputs = [_by_strips(rows, call.bound, bias) for call, (_, bias) in calls]
        return [output.view(*x.shape[:-1], -1) for output in outputs]


def _reason(problem: Problem) -> str | None:
    if problem.device_type != "cpu":
        return f"it runs on the CPU, not on {problem.device}"
    if problem.dtype not in compiled.TYPES:
        return f"it takes bf16, fp16 and fp32, not {problem.dtype}"
    return None


def _by_strips(x: torch.Tensor, bound: compiled.Bound, bias: torch.Tensor | None) -> torch.Tensor:
    rows, columns = bound.shape
    wide = x.dtype if compiled.has_fast_bf16_gemm() and x.dtype == torch.bfloat16 else torch.float32
    x_wide = x.to(wide)
    bias_wide = None if bias is None else bias.to(wide)
    size = min(max(_STRIP_BYTES, torch.get_num_threads() * _STRIP_BYTES_PER_THREAD), _MOST_STRIP_BYTES)
    step = max(64, size // (columns * wide.itemsize) // 16 * 16)  # whole blocks of rows
    # One strip for all: fresh memory would be faulted in anew, page by page.
    scratch = torch.empty((min(step, rows), columns), dtype=wide, device="cpu")
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device="cpu")
    for first in range(0, rows, step):
        last = min(first + step, rows)
        strip = compiled.decompress_into(scratch[: last - first], bound, first)
        out[:, first:last] = functional.linear(x_wide, strip, None if bias_wide is None else bias_wide[first:last])
    return out
