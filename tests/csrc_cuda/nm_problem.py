"""2:4 problems for the kernels: random ones, their float64 answer, and their launch in the emulation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from emulator import Argument, Emulator, Launch, Same, Unaligned

from wandapp_kernels.backends.cuda.fragment_layout import FragmentLayout
from wandapp_kernels.backends.cuda.gemm_plan import NmGemmPlan, plan_gemm
from wandapp_kernels.backends.cuda.plan import THREADS, NmDecodePlan, plan
from wandapp_kernels.sparsity.nm_weight import NMWeight

LAYOUT = FragmentLayout()
MOST_SHARED = 227 * 1024  # bytes a CTA of an H100 may ask for
NIBBLES = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int) -> NMWeight:
    """Every group draws one of the six nibbles; a third of the stored values are zeros (±0), so that groups with no,
    one and two non-zeros occur."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // 4)
    positions = NIBBLES[torch.randint(6, (rows, groups), generator=generator)]
    mask = torch.zeros(rows, groups, 4, dtype=torch.bool).scatter_(2, positions, True).flatten(1)[:, :columns]
    dense = torch.randn(rows, columns, generator=generator)
    dense[torch.rand(rows, columns, generator=generator) < 1 / 6] = 0.0
    dense[torch.rand(rows, columns, generator=generator) < 1 / 6] = -0.0
    return NMWeight.compress(dense.to(dtype), mask, "2:4")


def columns_of(weight: NMWeight) -> torch.Tensor:
    """int64 [R, kept]: the column of every stored value."""
    fields = weight.fields().long()
    return torch.arange(fields.shape[1]) // 2 * 4 + fields


def products(weight: NMWeight, x: torch.Tensor) -> torch.Tensor:
    """float64 [M, R, kept]: every stored value times its activation (a stored zero meets NaN and Inf as well)."""
    return x.double()[:, columns_of(weight)] * weight.values.double()


@dataclass
class Problem:
    """y = x Wᵀ + bias for one weight, or silu(gate) · up for two."""

    weights: list[NMWeight]
    x: torch.Tensor
    biases: list[torch.Tensor | None]

    @classmethod
    def random(
        cls, n: int, k: int, m: int, dtype: torch.dtype = torch.bfloat16, pair: bool = False, bias: bool = False
    ) -> Problem:
        seed = n * 1009 + k * 31 + m
        generator = torch.Generator().manual_seed(seed)
        count = 2 if pair else 1
        return cls(
            [random_weight(n, k, dtype, seed + i) for i in range(count)],
            torch.randn(m, k, generator=generator).to(dtype),
            [torch.randn(n, generator=generator).to(dtype) if bias else None for _ in range(count)],
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.weights[0].shape, self.x.shape[0])

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The float64 answer and the error that fp32 accumulation and one rounding may leave."""
        sums, scales = [], []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            terms = products(weight, self.x)
            sums.append(terms.sum(-1) + (0 if bias is None else bias.double()))
            scales.append(terms.abs().sum(-1) + (0 if bias is None else bias.double().abs()))
        if len(sums) == 1:
            answer, accumulated = sums[0], scales[0]
        else:
            answer = torch.nn.functional.silu(sums[0]) * sums[1]
            accumulated = scales[0] * sums[1].abs() * 1.1 + scales[1] * sums[0].abs()
        tiny = 2.0**-24 if self.x.dtype == torch.float16 else 1e-38
        return answer, ROUNDING[self.x.dtype] * answer.abs() + 3e-6 * accumulated + tiny

    def chosen(self, splits: int = 1) -> NmDecodePlan:
        return plan(*self.shape, 132, len(self.weights), splits)

    def launch(self, chosen: NmDecodePlan, order: int = 0, x_offset: int = 0, weight_offset: int = 0) -> Launch:
        """The launch of `chosen`; outputs and workspace start as NaN, counters as zero."""
        n, _, m = self.shape
        tensors: list[Argument] = []
        for weight in self.weights:
            packed = [bits(tensor) for tensor in LAYOUT.pack(weight)]
            tensors += [Unaligned(tensor, weight_offset) if weight_offset else tensor for tensor in packed]
        x = bits(self.x)
        workspace: list[Argument] = [None, None]
        if chosen.partials:
            workspace = [np.full(chosen.partials, np.nan, np.float32), np.zeros(chosen.counters, np.uint32)]
        arguments = [
            *tensors,
            Unaligned(x, x_offset) if x_offset else x,
            *(None if bias is None else bits(bias) for bias in self.biases),
            np.full((m, n), 0x7FFF, np.uint16),
            *workspace,
            *self.shape,
            chosen.splits,
        ]
        name = chosen.kernel(self.x.dtype, len(self.weights))
        return Launch(name, chosen.grid, THREADS, chosen.shared_bytes, arguments, order)

    def run(self, emulator: Emulator, chosen: NmDecodePlan | None = None, **options: int) -> torch.Tensor:
        """y as the emulated decode kernel computes it."""
        launch = self.launch(chosen or self.chosen(), **options)
        arrays = emulator.run(launch)
        return self.output(arrays)

    def gemm_plan(self, tile: str, splits: int = 1) -> NmGemmPlan:
        return plan_gemm(*self.shape, 132, MOST_SHARED, tile, splits)

    def gemm_launch(self, chosen: NmGemmPlan, order: int = 0) -> Launch:
        """The launch of the kernel for many tokens; outputs and workspace start as NaN, counters as zero."""
        n, k, m = self.shape
        (weight,), (bias,) = self.weights, self.biases
        rows = torch.nn.functional.pad(self.x, (0, -k % 8))
        workspace: list[Argument] = [None, None]
        if chosen.partials:
            workspace = [np.full(chosen.partials, np.nan, np.float32), np.zeros(chosen.counters, np.uint32)]
        arguments = [
            *(bits(tensor) for tensor in LAYOUT.pack(weight)),
            bits(rows),
            None if bias is None else bits(bias),
            np.full((m, n), 0x7FFF, np.uint16),
            *workspace,
            n,
            rows.shape[1],
            m,
            chosen.splits,
        ]
        tile = chosen.tile
        return Launch(chosen.kernel(self.x.dtype), chosen.grid, tile.threads, tile.shared_bytes, arguments, order)

    def run_gemm(self, emulator: Emulator, chosen: NmGemmPlan, order: int = 0) -> torch.Tensor:
        """y as the emulated kernel for many tokens computes it."""
        return self.output(emulator.run(self.gemm_launch(chosen, order)))

    def output(self, arrays: list[np.ndarray]) -> torch.Tensor:
        """The output among the arrays of one launch."""
        index = 2 * len(self.weights) + 1 + sum(bias is not None for bias in self.biases)
        return torch.from_numpy(arrays[index].view(np.int16)).view(self.x.dtype)

    def check(self, y: torch.Tensor) -> None:
        """Raise AssertionError, naming the worst element, unless y is the expected answer within its error."""
        answer, allowed = self.expected()
        got = y.double()
        infinite = answer.isinf()
        assert torch.equal(got.isnan(), answer.isnan()), "NaN in other places than expected"
        assert torch.equal(got[infinite], answer[infinite]), "infinities in other places than expected"
        excess = ((got - answer).abs() - allowed)[answer.isfinite()]
        assert excess.numel() == 0 or bool((excess <= 0).all()), f"error exceeds what is allowed by {excess.max():.3g}"


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array of the same bits (numpy has no bf16)."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.contiguous().numpy()


__all__ = ["LAYOUT", "MOST_SHARED", "NIBBLES", "Problem", "Same", "bits", "columns_of", "products", "random_weight"]
