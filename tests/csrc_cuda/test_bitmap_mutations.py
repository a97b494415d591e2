"""Deliberate mistakes in the bitmap kernels: each must be caught by a wrong number or by a rule of the emulation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bitmap_problem import BitmapProblem, Cut, bits
from emulator import CSRC, HARNESS, EmulationError, Emulator, compile_objects, link

FLAGS = ("-O0", "-fsanitize=address", "-Wno-unused")
PANEL, DECODE, DECOMPRESS = "bitmap_panel.cuh", "bitmap_decode.cuh", "bitmap_decompress.cuh"

# file, what stands there, the mistake
MUTATIONS = {
    "a wrong mask of the population count": (PANEL, "0x33333333u) + (", "0x73333333u) + ("),
    "nibbles of odd q are read as even": (PANEL, "nibbles >> 4 * odd &", "nibbles >> 4 * 0 &"),
    "the running sum stops one step early": (PANEL, "distance < 32;", "distance < 16;"),
    "own bits are counted as those below": (PANEL, "sum - own", "sum"),
    "the total of lane 30": (PANEL, "ptx::shuffle(sum, 31)", "ptx::shuffle(sum, 30)"),
    "values of 4 bytes": (PANEL, "2u << 8 * j", "4u << 8 * j"),
    "rows g and g + 8 swapped": (PANEL, "4 * h + 2 * r)", "4 * h + 2 * (1 - r))"),
    "the pair swapped": (PANEL, "(low, high, 0x5410)", "(low, high, 0x1054)"),
    "k halves swapped": (
        PANEL,
        "element[0][0], element[0][1], element[1][0]",
        "element[1][0], element[0][1], element[0][0]",
    ),
    "the last 16 bytes of a panel are not copied": (PANEL, "lane + 32 * i < units", "lane + 32 * i < units - 1"),
    "the wait is missing": (DECODE, "ptx::cp_async_wait<kStages - 2>();", ""),
    "the wait is one group too lax": (
        DECODE,
        "ptx::cp_async_wait<kStages - 2>();",
        "ptx::cp_async_wait<kStages - 1>();",
    ),
    "the warp barrier is missing": (DECODE, "ptx::sync_warp();  // the panel", "// the panel"),
    "the slot in use is filled": (
        DECODE,
        "fetch(panel + kStages - 1);",
        "fetch(panel + kStages - 1); fetch(panel + kStages);",
    ),
    "a slot is skipped": (DECODE, "used = used + 1 == kStages ? 0 : used + 1;", ""),
    "the last panel is left out": (
        DECODE,
        "(part + 1) * panels / parts : 0;",
        "(part + 1) * panels / parts - (part == 1) : 0;",
    ),
    "tokens beyond M are read": (DECODE, "token >= tokens or ", ""),
    "columns beyond K are read": (DECODE, " or column >= columns", ""),
    "the activations of the other half": (DECODE, "64 * half + 32 * eighth", "64 * (1 - half) + 32 * eighth"),
    "the wrong k-step of x": (DECODE, "j % 2 == 0 ? b.x : b.z", "j % 2 == 1 ? b.x : b.z"),
    "the barrier before the reduction is missing": (
        DECODE,
        "ptx::cp_async_wait<0>();\n    ptx::sync_cta();",
        "ptx::cp_async_wait<0>();",
    ),
    "a warp is left out of the sum": (DECODE, "w < warps_per_slab; ++w", "w + 1 < warps_per_slab; ++w"),
    "the fence is missing": (DECODE, "ptx::fence_device();\n    ptx::sync_cta();", "ptx::sync_cta();"),
    "the counter is not reset": (DECODE, "counters + blockIdx.x, gridDim.y - 1)", "counters + blockIdx.x, gridDim.y)"),
    "rows beyond N are written": (DECODE, "if (row >= rows) return;", ""),
    "bias twice": (DECODE, "sum += ptx::to_float(bias[row]);", "sum += 2 * ptx::to_float(bias[row]);"),
    "decompress: rows swapped": (DECOMPRESS, "g + 8 * r", "g + 8 * (1 - r)"),
    "decompress: rows beyond N are written": (DECOMPRESS, "if (row >= rows) continue;", ""),
    "decompress: the wait is missing": (DECOMPRESS, "ptx::cp_async_wait<0>();", ""),
    "decompress: columns beyond K are written": (DECOMPRESS, "if (column + i < columns)", ""),
}


# The kernels that are tried, and the template arguments that make them.
KERNELS = {
    "bitmap_decode_bf16_16": "bitmap::decode<BFloat16, 2>",
    "bitmap_decompress_16": "bitmap::decompress",
}


def mutant(number: int, change: tuple[str, str, str] | None) -> str:
    """The kernels in a namespace of their own, with one change, callable as ``name@number``."""
    texts = {name: (CSRC / "cuda" / name).read_text() for name in (PANEL, DECODE, DECOMPRESS)}
    if change is not None:
        name, right, wrong = change
        assert texts[name].count(right), f"{right!r} does not stand in {name} any more"
        texts[name] = texts[name].replace(right, wrong, 1)
    lines = "\n".join(texts.values()).splitlines()
    body = "\n".join(line for line in lines if not line.startswith(("#include", "#pragma once")))
    calls = [f'const emulation::Kernel k{i}("{name}@{number}", &{f});' for i, (name, f) in enumerate(KERNELS.items())]
    inside = "\n".join(calls)
    return f"#define bitmap bitmap{number}\n{body}\nnamespace bitmap {{ namespace {{\n{inside}\n}} }}\n#undef bitmap\n"


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Emulator:
    """All mutants in one program: number 0 is unchanged, number i has mistake i."""
    folder = tmp_path_factory.mktemp("mutants")
    pieces = [mutant(number, change) for number, change in enumerate([None, *MUTATIONS.values()])]
    sources = [folder / "even.cpp", folder / "odd.cpp"]  # compiled side by side
    for parity, source in enumerate(sources):
        included = '#include "emulation/runner.h"\n#include "cuda/ptx.cuh"\n'
        source.write_text(included + "".join(pieces[parity::2]))
    harness = [CSRC / "emulation" / name for name in HARNESS]
    return link(compile_objects([*sources, *harness], folder, FLAGS), folder / "emulate", FLAGS[1:2])


def is_right(emulator: Emulator, number: int) -> bool:
    """Whether a product and two decompressed weights are what they must be, and nothing breaks a rule."""
    many = BitmapProblem(11, 40, 904, 0.6, torch.bfloat16)
    odd = BitmapProblem(1, 20, 77, 0.5, torch.bfloat16)
    launches = [many.decode(Cut(2, 1, 2)), many.decompress(), odd.decompress()]
    launches = [replace(launch, kernel=f"{launch.kernel}@{number}") for launch in launches]
    try:
        results = emulator.run(*launches)
    except EmulationError:
        return False
    out, counters, dense, odd_dense = results[5], results[7], results[11], results[15]
    error = (many.out([out] * 6).double() - many.reference).norm() / many.reference.norm()
    return bool(
        error < 3e-3
        and not counters.any()
        and (dense == bits(many.weight.decompress())).all()
        and (odd_dense == bits(odd.weight.decompress())).all()
    )


def test_without_a_mistake_everything_is_right(mutants):
    assert is_right(mutants, 0)


@pytest.mark.parametrize(("number", "mistake"), enumerate(MUTATIONS, start=1))
def test_a_mistake_is_caught(mutants, number, mistake):
    assert not is_right(mutants, number)
