"""The fused scoring kernels: right masks, time, and bytes against the floor (inputs read, outputs written once)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bench.h100.clock import Section
from bench.h100.timing import time_calls
from wandapp_kernels.sparsity import Pattern, mask_from_scores

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192))
ALPHA = 100.0


@dataclass
class Problem:
    """A weight with what is known of it, as ``wandapp prune`` has it."""

    weight: torch.Tensor
    gradient: torch.Tensor
    norm: torch.Tensor

    @classmethod
    def random(cls, shape: tuple[int, int]) -> Problem:
        weight = torch.randn(shape, device="cuda").bfloat16()
        return cls(weight, torch.rand(shape, device="cuda") * 1e-3, torch.rand(shape[1], device="cuda") + 0.5)

    def expected(self, pattern: str) -> torch.Tensor:
        """The mask of (α·G + ‖X‖)·|W|."""
        scores = (ALPHA * self.gradient + self.norm) * self.weight.float().abs()
        return mask_from_scores(scores, Pattern.parse(pattern))


def kernels(problem: Problem) -> dict[str, tuple[str, Callable[[], torch.Tensor], int]]:
    """Name -> pattern, a call that returns the mask, and the bytes that must move."""
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
        "score, mask and compress 2:4": ("2:4", nm, read + mask.nbytes + values.nbytes + indices.nbytes),
        "score and row threshold 50%": ("50%", threshold, read + mask.nbytes),
    }


def check(section: Section) -> Iterator[str]:
    """Masks must be the reference's, bit for bit."""
    for shape in ((4096, 4096), (300, 1000), (65, 4100)):
        problem = Problem.random(shape)
        for name, (pattern, call, _) in kernels(problem).items():
            wrong = int((call() != problem.expected(pattern)).sum())
            section.rows.append({"kernel": name, "shape": list(shape), "wrong": wrong})
            if wrong:
                yield f"{name} on {shape[0]}x{shape[1]}: {wrong} entries of the mask are wrong"


def measure(section: Section, bandwidth: float) -> None:
    """Time and bytes of every kernel on every shape; each shape is far larger than the L2 cache."""
    for shape in section.cases(SHAPES):
        problem = Problem.random(shape)
        for name, (_, call, moved) in kernels(problem).items():
            timing = time_calls([call], 0.3)
            rate = moved / (1e-6 * timing.us)
            section.rows.append(
                {
                    "kernel": name,
                    "shape": list(shape),
                    "us": timing.us,
                    "graph": timing.graph,
                    "bytes": moved,
                    "gb_per_second": 1e-9 * rate,
                    "share_of_bandwidth": rate / bandwidth,
                }
            )
