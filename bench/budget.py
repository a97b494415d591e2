"""Byte and instruction budgets of the CUDA kernels that multiply: ``python -m bench.budget``.

Nothing here was measured. Counts come from the compiled kernels and from the shape; times are **predicted**: the
longest of moving the bytes at the memory's rate, issuing the instructions (four a clock and multiprocessor), and the
tensor cores. The budget lands in ``bench/results/budget.json``; ``python -m bench.tables`` makes a table of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.disassembly import Compiled, disassemble
from wandapp_kernels.backends.cuda import bitmap, plan
from wandapp_kernels.backends.cuda.bitmap_layout import PANEL, panel_counts
from wandapp_kernels.backends.cuda.fragment_layout import blocks
from wandapp_kernels.backends.cuda.gemm_plan import plan_gemm
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.report.tables import table

RESULTS = Path(__file__).parent / "results" / "budget.json"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # the linears of LLaMA-3-8B, [out, in]
TOKENS = (1, 8, 16)
MANY_TOKENS = (32, 64, 128)
DENSITIES = (0.5, 0.4, 0.3)
LATENCY = 700e-9  # seconds from a load to its data when memory is busy: an assumption
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures (SXM parts). Rates a second; ``dense_flops`` of the tensor cores with 16-bit operands."""

    name: str
    architecture: str
    multiprocessors: int
    hertz: float
    bandwidth: float
    dense_flops: float
    shared_bytes: int
    most_shared_of_cta: int
    registers: int = 65536
    threads: int = 2048


H100 = Gpu("H100", "sm_90a", 132, 1.83e9, 3.35e12, 989e12, 228 * 1024, 227 * 1024)
A100 = Gpu("A100", "sm_80", 108, 1.41e9, 2.04e12, 312e12, 164 * 1024, 163 * 1024)


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel, for one unit: the piece of weight that a warp takes at a time.

    Attributes:
        instructions: issued by a warp for one unit.
        mma: tensor-core instructions for one unit.
        registers, stack_bytes: of the kernel.
        threads, shared_bytes: of a CTA.
        ahead_bytes: of weights that a warp has asked for while it works on a unit.
    """

    instructions: float
    mma: int
    registers: int
    stack_bytes: int
    threads: int
    shared_bytes: int
    ahead_bytes: float


@dataclass(frozen=True)
class Budget:
    """One kernel on one shape, on one GPU. Times in microseconds, predicted."""

    kernel: str
    gpu: str
    tokens: int
    rows: int
    columns: int
    density: float
    weight_bytes: int
    other_bytes: int
    dense_bytes: int
    mma: int
    units: int
    instructions: float
    registers: int
    stack_bytes: int
    ctas_per_multiprocessor: int
    in_flight_bytes: float
    needed_in_flight_bytes: float
    memory_us: float
    issue_us: float
    tensor_us: float
    dense_us: float

    @property
    def predicted_us(self) -> float:
        return max(self.memory_us, self.issue_us, self.tensor_us)

    @property
    def bytes_ratio(self) -> float:
        """Bytes of the compressed weight ÷ bytes of the dense one."""
        return self.weight_bytes / (2 * self.rows * self.columns)


def occupancy(loop: Loop, gpu: Gpu) -> int:
    """CTAs that fit on a multiprocessor: registers come in 256 a warp, and every CTA costs 1 KiB of shared memory."""
    warps = loop.threads // 32
    by_registers = gpu.registers // (warps * 32 * (-(-loop.registers // 8) * 8))
    by_shared = gpu.shared_bytes // (loop.shared_bytes + 1024)
    return max(0, min(by_registers, by_shared, gpu.threads // loop.threads))


def _loop_counts(compiled: Compiled, mma: str, mma_per_unit: int) -> float:
    """Instructions of a unit: those of the main loop, divided by the units that one turn of it takes."""
    body = compiled.loop_with(mma)
    turns = sum(instruction.name.startswith(mma) for instruction in body) / mma_per_unit
    return len(body) / turns


def bitmap_budget(tokens: int, shape: tuple[int, int], density: float, gpu: Gpu) -> Budget:
    """The unstructured decode kernel; its unit is a panel of 16 × 128 weights."""
    cut = bitmap.plan_decode(tokens, shape, gpu.multiprocessors, gpu.most_shared_of_cta)
    name = f"bitmap_decode_bf16_{8 * cut.token_tiles}"
    compiled = disassemble("bitmap_decode", name, gpu.architecture)
    slabs, panels = panel_counts(shape)
    # Whole panels; their values end on 16 bytes, which costs half of that on average.
    panel_bytes = 2 * PANEL * density + 8 + PANEL / 8 + 4
    loop = Loop(
        instructions=_loop_counts(compiled, "HMMA", 8 * cut.token_tiles),
        mma=8 * cut.token_tiles,
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        threads=cut.threads,
        shared_bytes=cut.shared_bytes,
        ahead_bytes=(bitmap.STAGES - 1) * panel_bytes,
    )
    partials = 2 * 4 * cut.partial_floats
    return _budget(name, loop, tokens, shape, density, slabs * panels, panel_bytes, partials, 4096, gpu)


def nm_budget(tokens: int, shape: tuple[int, int], gpu: Gpu) -> Budget:
    """The 2:4 decode kernel; its unit is a block of 64 × 64 weights."""
    rows, columns = shape
    cut = plan.plan(rows, columns, tokens, gpu.multiprocessors)
    name = cut.kernel(DTYPE)
    compiled = disassemble("nm_decode", name, gpu.architecture)
    loop = Loop(
        instructions=_loop_counts(compiled, "HMMA.SP", 8 * cut.token_tiles),
        mma=8 * cut.token_tiles,
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        threads=plan.THREADS,
        shared_bytes=cut.shared_bytes,
        ahead_bytes=plan.BLOCK_BYTES,
    )
    units = blocks(rows) * blocks(columns) * cut.token_blocks
    return _budget(name, loop, tokens, shape, 0.5, units, plan.BLOCK_BYTES, 2 * 4 * cut.partials, 8192, gpu)


def nm_gemm_budget(tokens: int, shape: tuple[int, int], gpu: Gpu) -> Budget:
    """The 2:4 kernel for many tokens; its unit is a block of 64 × 64 weights for the tokens of a warp.

    Several warps that take the same block read it from memory once.
    """
    rows, columns = shape
    cut = plan_gemm(rows, columns, tokens, gpu.multiprocessors, gpu.most_shared_of_cta)
    tile, name = cut.tile, cut.kernel(DTYPE)
    compiled = disassemble("nm_gemm", name, gpu.architecture)
    loop = Loop(
        instructions=_loop_counts(compiled, "HMMA.SP", 8 * tile.token_tiles),
        mma=8 * tile.token_tiles,
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        threads=tile.threads,
        shared_bytes=tile.shared_bytes,
        # Blocks on their way to the buffers of shared memory, or to registers.
        ahead_bytes=((tile.stages - 1) if tile.fragments == 1 else tile.fragments - 1)
        * plan.BLOCK_BYTES
        / tile.token_warps,
    )
    readers = tile.token_warps * cut.token_blocks
    units = cut.row_blocks * tile.row_warps * blocks(columns) * readers
    unit_bytes = plan.BLOCK_BYTES / readers
    return _budget(name, loop, tokens, shape, 0.5, units, unit_bytes, 2 * 4 * cut.partials, 8192, gpu)


def _budget(
    name: str,
    loop: Loop,
    tokens: int,
    shape: tuple[int, int],
    density: float,
    units: int,
    unit_bytes: float,
    partial_bytes: int,
    mma_flops: int,
    gpu: Gpu,
) -> Budget:
    rows, columns = shape
    weight_bytes = round(units * unit_bytes)
    activations = 2 * tokens * (rows + columns)
    dense_bytes = 2 * rows * columns + activations
    resident = occupancy(loop, gpu)
    issue = units * loop.instructions / (4 * gpu.multiprocessors * gpu.hertz)
    return Budget(
        kernel=name,
        gpu=gpu.name,
        tokens=tokens,
        rows=rows,
        columns=columns,
        density=density,
        weight_bytes=weight_bytes,
        other_bytes=activations + partial_bytes,
        dense_bytes=dense_bytes,
        mma=units * loop.mma,
        units=units,
        instructions=loop.instructions,
        registers=loop.registers,
        stack_bytes=loop.stack_bytes,
        ctas_per_multiprocessor=resident,
        in_flight_bytes=resident * loop.threads / 32 * loop.ahead_bytes,
        needed_in_flight_bytes=gpu.bandwidth / gpu.multiprocessors * LATENCY,
        memory_us=1e6 * (weight_bytes + activations + partial_bytes) / gpu.bandwidth,
        issue_us=1e6 * issue,
        tensor_us=1e6 * units * loop.mma * mma_flops / gpu.dense_flops,
        dense_us=1e6 * dense_bytes / gpu.bandwidth,
    )


def all_budgets() -> list[Budget]:
    """Every kernel, shape and GPU of the table."""
    found = []
    for gpu in (H100, A100):
        for shape in SHAPES:
            for tokens in TOKENS:
                found.append(nm_budget(tokens, shape, gpu))
                found += [bitmap_budget(tokens, shape, density, gpu) for density in DENSITIES]
            found += [nm_gemm_budget(tokens, shape, gpu) for tokens in MANY_TOKENS]
    return found


def budget_table(entries: list[dict[str, Any]]) -> str:
    """Markdown, a line a kernel, shape and number of tokens, both GPUs side by side."""
    headers = ["kernel", "N × K", "M", "kept", "bytes ÷ dense", "instructions a KiB", "registers", "CTAs / SM"]
    headers += ["in flight ÷ needed"]
    headers += [f"{gpu.name}, predicted µs (dense)" for gpu in (H100, A100)]
    by_gpu = {gpu.name: [Budget(**entry) for entry in entries if entry["gpu"] == gpu.name] for gpu in (H100, A100)}
    rows = []
    for ours, other in zip(by_gpu[H100.name], by_gpu[A100.name], strict=True):
        kib = ours.weight_bytes / 1024
        rows.append(
            [
                "2:4" if ours.kernel.startswith("nm") else "bitmap",
                f"{ours.rows} × {ours.columns}",
                str(ours.tokens),
                f"{ours.density:.0%}",
                f"{ours.bytes_ratio:.4f}",
                f"{ours.instructions * ours.units / kib:.0f}",
                str(ours.registers),
                f"{ours.ctas_per_multiprocessor}",
                f"{ours.in_flight_bytes / ours.needed_in_flight_bytes:.1f}",
                *(f"{each.predicted_us:.1f} ({each.dense_us:.1f})" for each in (ours, other)),
            ]
        )
    note = (
        "Predicted, never measured: the longest of bytes ÷ memory rate (H100 3.35 TB/s, A100 2.04 TB/s), instructions "
        "÷ issue rate, and tensor-core work; a launch, the first latency and the tail are left out. Registers, CTAs "
        "and bytes in flight are of the H100, and so is the tile of many tokens; needed is rate × 700 ns for each "
        "multiprocessor. In brackets: the dense "
        "weight's bytes at the memory rate."
    )
    return f"{table(headers, rows, markdown=True)}\n\n{note}"


def saved_table() -> str:
    """The table of ``bench/results/budget.json``."""
    return budget_table(json.loads(RESULTS.read_text())["budgets"]) if RESULTS.exists() else "not computed yet"


def main() -> None:
    write_text_atomic(RESULTS, to_json({"budgets": [asdict(budget) for budget in all_budgets()]}))
    print(saved_table())


if __name__ == "__main__":
    main()
