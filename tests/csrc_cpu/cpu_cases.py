"""Weights, inputs and exact results for the CPU kernels, and the file the C++ driver reads."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from wandapp_kernels.ops.layouts import LAYOUTS
from wandapp_kernels.sparsity import BitmapWeight, NMWeight

FORMATS = ("dense", "nm", "nm_pairs", "bitmap", "bitmap_windows")
TYPES = (torch.bfloat16, torch.float16, torch.float32)
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@dataclass(frozen=True)
class Case:
    """One linear: x, the dense weight, the same in a layout, the float64 result and the error allowed."""

    layout: str
    x: torch.Tensor
    dense: torch.Tensor
    tensors: list[torch.Tensor]
    bias: torch.Tensor | None
    damaged: bool = False  # the tensors are not those of `dense`: no result is expected

    @property
    def shape(self) -> tuple[int, int]:
        return self.dense.shape[0], self.dense.shape[1]

    def decompressed(self) -> torch.Tensor:
        """The dense weight, with +0.0 where nothing is kept (``dense`` may have -0.0 there)."""
        return self.dense if self.layout == "dense" else torch.where(self.dense == 0, 0, self.dense)

    def exact(self) -> torch.Tensor:
        out = self.x.double() @ self.dense.double().T
        return out if self.bias is None else out + self.bias.double()

    def allowed(self) -> torch.Tensor:
        """Half a unit of the result's type, and fp32 sums of K terms (2⁻²⁴ each, for any order)."""
        magnitude = self.x.double().abs() @ self.dense.double().abs().T
        if self.bias is not None:
            magnitude = magnitude + self.bias.double().abs()
        smallest = 2**-24 if self.x.dtype == torch.float16 else 1e-30
        return EPSILON[self.x.dtype] * self.exact().abs() + (8 + self.shape[1] / 8) * 2**-24 * magnitude + smallest


def two_four_mask(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """At most two kept of every four columns; some groups keep one or none, some rows nothing."""
    scores = torch.rand(rows, -(-columns // 4) * 4, generator=generator).view(rows, -1, 4)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2, 2).indices, True)
    keep &= scores > 0.1
    keep[rows // 2] = False
    return keep.view(rows, -1)[:, :columns]


def make_case(
    layout: str, dtype: torch.dtype, tokens: int, rows: int, columns: int, density: float = 0.5, bias: bool = True
) -> Case:
    generator = torch.Generator().manual_seed(tokens * 7919 + rows * 104729 + columns)
    dense = torch.randn(rows, columns, generator=generator).to(dtype)
    tensors = [dense]
    if layout in ("nm", "nm_pairs"):
        dense = dense * two_four_mask(rows, columns, generator)
        tensors = LAYOUTS[layout].pack(NMWeight.compress(dense))
    elif layout in ("bitmap", "bitmap_windows"):
        mask = torch.rand(rows, columns, generator=generator) < density
        mask[rows // 2] = False
        dense = dense * mask
        tensors = LAYOUTS[layout].pack(BitmapWeight.compress(dense))
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    return Case(layout, x, dense, tensors, torch.randn(rows, generator=generator).to(dtype) if bias else None)


def write_cases(path: Path, cases: Iterable[Case]) -> None:
    cases = list(cases)
    with path.open("wb") as file:
        file.write(struct.pack("<q", len(cases)))
        for case in cases:
            finite = bool(case.x.isfinite().all()) or case.layout == "dense"
            result = 2 if case.damaged else int(finite)
            head = (FORMATS.index(case.layout), TYPES.index(case.x.dtype), *case.x.shape[:1], *case.shape, result)
            file.write(struct.pack("<6q", *head))
            tensors = [*case.tensors, torch.empty(0), torch.empty(0)][:3]
            bias = torch.empty(0) if case.bias is None else case.bias
            for tensor in (case.x, *tensors, bias, case.decompressed(), case.exact(), case.allowed()):
                data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
                file.write(struct.pack("<q", len(data)) + data)
