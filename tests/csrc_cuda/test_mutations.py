"""Every mutation of the kernels and of the layout is caught: by a rule of the emulated machine or by a wrong answer."""

from __future__ import annotations

import types
from dataclasses import astuple, replace
from pathlib import Path

import nm_problem
import numpy as np
import pytest
import torch
from emulator import CSRC, EmulationError, Emulator, Launch, compile_objects, link
from gemm_mutations import GEMM_MUTATIONS
from mutations import LAYOUT, MUTATIONS, Mutation
from nm_problem import Problem, bits, random_weight

from wandapp_kernels.backends.cuda import fragment_layout
from wandapp_kernels.backends.cuda.gemm_plan import NmGemmPlan, Tile
from wandapp_kernels.backends.cuda.plan import THREADS, pack_grid, unpack_grid

# Those that others include come first.
HEADERS = (
    "nm_layout.cuh",
    "nm_fragment.cuh",
    "nm_weight_ring.cuh",
    "activations.cuh",
    "activation_ring.cuh",
    "output.cuh",
    "split_k.cuh",
    "nm_decode.cuh",
    "nm_gemm.cuh",
    "nm_pack.cuh",
)
COMPILED = [mutation for mutation in [*MUTATIONS, *GEMM_MUTATIONS] if mutation.file != LAYOUT]
ORIGINAL = [
    Mutation("original", "nm_decode.cuh", "", "", kernel)
    for kernel in ("decode", "swiglu", "gemm", "gemm_shared", "pack")
]

GEMM_WRAPPER = """
void run(const uint4* v, const uint4* w, const BFloat16* x, const BFloat16* bias, BFloat16* out, float4* partials,
         u32* counters, int n, int k, int m, int splits) {
    nm_gemm<BFloat16, NmTile<TILE>>({v, w}, x, bias, out, partials, counters, n, k, m, splits);
}
const emulation::Kernel kernel("NAME", &run);"""
TILES = {"gemm": Tile(2, 2, 2, 2, 3, 2), "gemm_shared": Tile(2, 2, 1, 2, 3, 1)}

# What a kernel looks like from outside, in a namespace of its own.
WRAPPERS = {
    "decode": """
void run(const uint4* v, const uint4* w, const BFloat16* x, const BFloat16* bias, BFloat16* out, float4* partials,
         u32* counters, int n, int k, int m, int splits) {
    nm_decode<BFloat16, 2, 1>({v, w}, {nullptr, nullptr}, x, bias, static_cast<const BFloat16*>(nullptr), out, partials,
                              counters, n, k, m, splits);
}
const emulation::Kernel kernel("NAME", &run);""",
    "swiglu": """
void run(const uint4* v, const uint4* w, const uint4* uv, const uint4* uw, const Half* x, const Half* bias,
         const Half* up_bias, Half* out, float4* partials, u32* counters, int n, int k, int m, int splits) {
    nm_decode<Half, 1, 2>({v, w}, {uv, uw}, x, bias, up_bias, out, partials, counters, n, k, m, splits);
}
const emulation::Kernel kernel("NAME", &run);""",
    **{kernel: GEMM_WRAPPER.replace("TILE", ", ".join(map(str, astuple(tile)))) for kernel, tile in TILES.items()},
    "pack": """
void pack(const u16* v, const u8* i, uint4* pv, u32* pm, int n, int k) { nm_pack_vector(v, i, pv, pm, n, k); }
void unpack(const u16* pv, const u8* pm, u16* v, u8* i, int n, int k) { nm_unpack_value(pv, pm, v, i, n, k); }
void dense(const uint4* pv, const u32* pm, u16* out, int n, int k) { nm_decompress_vector(pv, pm, out, n, k); }
const emulation::Kernel kernel("NAME", &pack), inverse("NAME_inverse", &unpack), dense_("NAME_dense", &dense);""",
}


def write_mutant(mutation: Mutation, folder: Path) -> str:
    """Copies the headers with the fault into a folder; returns the source that compiles them in a namespace."""
    name = f"{mutation.name}_{mutation.kernel}"
    place = folder / name
    place.mkdir()
    for header in HEADERS:
        text = (CSRC / "cuda" / header).read_text()
        if header == mutation.file and mutation.old:
            assert text.count(mutation.old) == 1, (
                f"{mutation.name}: the text to replace occurs {text.count(mutation.old)} times"
            )
            text = text.replace(mutation.old, mutation.new)
        # g++ takes equal files for one and the same under #pragma once.
        (place / header).write_text(f"{text}// {name}\n")
    header = {"pack": "nm_pack.cuh", **dict.fromkeys(TILES, "nm_gemm.cuh")}.get(mutation.kernel, "nm_decode.cuh")
    return f'namespace {name} {{\n#include "{place / header}"\n{WRAPPERS[mutation.kernel].replace("NAME", name)}\n}}\n'


@pytest.fixture(scope="module")
def mutants(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """All mutants in one executable, compiled as two sources so that two compilers can work."""
    folder = tmp_path_factory.mktemp("mutants")
    parts = ['#include "emulation/runner.h"\n#include "cuda/ptx.cuh"\n'] * 2
    for i, mutation in enumerate([*ORIGINAL, *COMPILED]):
        parts[i % 2] += write_mutant(mutation, folder)
    sources = [folder / f"part{i}.cpp" for i in range(2)]
    for source, text in zip(sources, parts, strict=True):
        source.write_text(text)
    flags = ("-I", str(CSRC / "cuda"), "-Wno-unused", "-Wno-unused-parameter", "-fsanitize=address")
    harness = [
        path
        for path in emulator.executable.parent.glob("*.o")
        if path.stem in ("simt", "shared_memory", "lanes", "runner")
    ]
    return link([*compile_objects(sources, folder, flags), *harness], folder / "mutants")


def problems(kernel: str) -> list[tuple[Problem, int, int]]:
    """Problem, splits and order of the CTAs: together they touch every path of the kernel."""
    if kernel == "swiglu":
        return [(Problem.random(18, 600, 3, torch.float16, pair=True, bias=True), 2, 0)]
    return [
        (Problem.random(70, 204, 20, bias=True), 3, 2),
        (Problem.random(20, 84, 9), 1, 0),
        (Problem.random(17, 1240, 5, bias=True), 1, 1),
        (Problem.random(17, 680, 5), 2, 1),
        (Problem.random(5, 1100, 2), 1, 0),
    ]


def check_product(machine: Emulator, name: str, kernel: str) -> None:
    for problem, splits, order in problems(kernel):
        chosen = problem.chosen(splits)
        tiles = 1 if kernel == "swiglu" else 2
        token_blocks = -(-problem.shape[2] // (8 * tiles))
        counters = chosen.row_blocks * token_blocks if splits > 1 else 0
        partials = counters * splits * len(problem.weights) * tiles * 8 * 64
        chosen = replace(chosen, token_tiles=tiles, token_blocks=token_blocks, counters=counters, partials=partials)
        launch = replace(problem.launch(chosen, order), kernel=name, shared_bytes=34816 // (3 - tiles))
        arrays = machine.run(launch)
        problem.check(problem.output(arrays))
        assert splits == 1 or not arrays[-1].any(), "a counter is left behind"


def check_gemm(machine: Emulator, name: str, tile: Tile) -> None:
    for shape, splits, order in (
        ((131, 204, 37), 2, 2),
        ((66, 1240, 20), 1, 1),
        ((40, 84, 33), 1, 0),
        ((130, 600, 29), 3, 1),
    ):
        problem = Problem.random(*shape, bias=True)
        chosen = NmGemmPlan(tile, -(-shape[2] // tile.tokens), -(-shape[0] // tile.rows), splits)
        arrays = machine.run(replace(problem.gemm_launch(chosen, order), kernel=name))
        problem.check(problem.output(arrays))
        assert splits == 1 or not arrays[-1].any(), "a counter is left behind"


def check_packing(machine: Emulator, name: str) -> None:
    for shape in ((70, 131), (33, 65), (5, 70), (17, 100)):
        weight = random_weight(*shape, torch.bfloat16, seed=7)
        packed = [bits(tensor) for tensor in nm_problem.LAYOUT.pack(weight)]
        canonical = [bits(weight.values), bits(weight.indices)]
        launch = Launch(name, pack_grid(*shape), THREADS, 0, [*canonical, *map(np.zeros_like, packed), *shape])
        assert all(map(np.array_equal, machine.run(launch)[2:], packed))
        back = Launch(
            f"{name}_inverse", unpack_grid(*shape), THREADS, 0, [*packed, *map(np.zeros_like, canonical), *shape]
        )
        assert all(map(np.array_equal, machine.run(back)[2:], canonical))
        dense = np.full(shape, 0x7FFF, np.uint16)
        made = Launch(f"{name}_dense", pack_grid(*shape), THREADS, 0, [*packed, dense, *shape])
        assert np.array_equal(machine.run(made)[2], bits(weight.decompress()))


def check(machine: Emulator, mutation: Mutation) -> None:
    name = f"{mutation.name}_{mutation.kernel}"
    if mutation.kernel == "pack":
        check_packing(machine, name)
    elif mutation.kernel in TILES:
        check_gemm(machine, name, TILES[mutation.kernel])
    else:
        check_product(machine, name, mutation.kernel)


@pytest.mark.parametrize("original", ORIGINAL, ids=lambda mutation: mutation.kernel)
def test_the_original_passes(mutants: Emulator, original: Mutation) -> None:
    check(mutants, original)


@pytest.mark.parametrize("mutation", COMPILED, ids=lambda mutation: mutation.name)
def test_a_mutation_of_the_kernels_is_killed(mutants: Emulator, mutation: Mutation) -> None:
    with pytest.raises((AssertionError, EmulationError)):
        check(mutants, mutation)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.file == LAYOUT], ids=lambda mutation: mutation.name)
def test_a_mutation_of_the_layout_is_killed(
    mutants: Emulator, mutation: Mutation, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(fragment_layout.__file__).read_text()
    assert source.count(mutation.old) == 1
    module = types.ModuleType("mutated_layout")
    text = source.replace(mutation.old, mutation.new).replace("register_layout(FragmentLayout())", "")
    exec(compile(text, mutation.name, "exec"), module.__dict__)
    monkeypatch.setattr(nm_problem, "LAYOUT", module.FragmentLayout())
    with pytest.raises((AssertionError, EmulationError)):
        check_product(mutants, "original_decode", "decode")
