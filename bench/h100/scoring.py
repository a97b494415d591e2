"""The fused scoring kernels: right masks, time, and bytes against the floor (inputs read, outputs written once)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.h100.clock import Section
from bench.h100.timing import time_calls
from wandapp_kernels.sparsity import Pattern, mask_from_scores
from wandapp_kernels.sparsity.nm_weight import NMWeight

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
ALPHA = 100.0


@dataclass
class Problem:
    """A weight with what is known of it, as ``wandapp prune`` has it."""

    weight: torch.Tensor
    gradient: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def random(cls, shape: tuple[int, int], device: str = "cuda") -> Problem:
        weight = torch.randn(shape, device=device).bfloat16()
        return cls(weight, torch.rand(shape, device=device) * 1e-3, torch.rand(shape[1], device=device) + 0.5)

    def expected(self, pattern: str) -> torch.Tensor:
        """The mask of (α·G + ‖X‖)·|W|."""
        scores = (ALPHA * self.gradient + self.norm) * self.weight.float().abs()
        return mask_from_scores(scores, Pattern.parse(pattern))


@dataclass
class Kernel:
    """One fused kernel on one problem.

    Attributes:
        pattern: what it prunes to.
        call: launches it; returns the mask.
        moved: bytes that must move.
        compressed: values and indices that a call fills, or None.
    """

    pattern: str
    call: Callable[[], torch.Tensor]
    moved: int
    compressed: tuple[torch.Tensor, torch.Tensor] | None = None


def kernels(problem: Problem) -> dict[str, Kernel]:
    """The fused kernels by name."""
    from wandapp_kernels.kernels.row_threshold import row_threshold
    from wandapp_kernels.kernels.score_nm import score_nm

    weight, gradient, norm = problem.weight, problem.gradient, problem.norm
    rows, columns = weight.shape
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    values = torch.empty((rows, columns // 2), dtype=weight.dtype, device=weight.device)
    indices = torch.empty((rows, -(-columns // 8)), dtype=torch.uint8, device=weight.device)
    read = weight.nbytes + gradient.nbytes + norm.nbytes

    def nm() -> torch.Tensor:
        score_nm(weight, norm, gradient, ALPHA, None, 2, 4, mask, values, indices)
        return mask

    def threshold() -> torch.Tensor:
        row_threshold(weight, norm, gradient, ALPHA, None, columns // 2, mask, None)
        return mask

    return {
        "score, mask and compress 2:4": Kernel(
            "2:4", nm, read + mask.nbytes + values.nbytes + indices.nbytes, (values, indices)
        ),
        "score and row threshold 50%": Kernel("50%", threshold, read + mask.nbytes),
    }


def check(section: Section, device: str = "cuda") -> Iterator[str]:
    """Masks, values and indices must be the reference's, bit for bit."""
    for shape in ((65, 4100), (300, 1000), (4096, 4096)):
        problem = Problem.random(shape, device)
        for name, kernel in kernels(problem).items():
            expected = problem.expected(kernel.pattern)
            wrong = {"mask": int((kernel.call() != expected).sum())}
            if kernel.compressed is not None:
                weight = NMWeight.compress(problem.weight, expected, kernel.pattern)
                values, indices = kernel.compressed
                wrong["values"] = int((values.view(torch.int16) != weight.values.view(torch.int16)).sum())
                wrong["indices"] = int((indices != weight.indices).sum())
            section.rows.append({"kernel": name, "shape": list(shape), "wrong": wrong})
            for part, count in wrong.items():
                if count:
                    yield f"{name} on {shape[0]}x{shape[1]}: {count} entries of the {part} are wrong"


def measure(section: Section, bandwidth: float) -> None:
    """Time and bytes of every kernel on every shape; each shape is far larger than the L2 cache."""
    for shape in section.cases(SHAPES):
        problem = Problem.random(shape)
        for name, kernel in kernels(problem).items():
            timing = time_calls([kernel.call], 0.3)
            rate = kernel.moved / (1e-6 * timing.us)
            section.rows.append(
                {
                    "kernel": name,
                    "shape": list(shape),
                    "us": timing.us,
                    "graph": timing.graph,
                    "bytes": kernel.moved,
                    "gb_per_second": 1e-9 * rate,
                    "share_of_bandwidth": rate / bandwidth,
                }
            )
