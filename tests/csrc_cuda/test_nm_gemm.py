"""The 2:4 kernel for many tokens, unchanged, on emulated lanes under sanitizers, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from emulator import EmulationError, Emulator, Launch
from nm_problem import NIBBLES, Problem

from wandapp_kernels.backends.cuda.gemm_plan import TILES
from wandapp_kernels.sparsity.nm_weight import NMWeight

FP16, BF16 = torch.float16, torch.bfloat16


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("tile", TILES)
def test_every_entry_point_over_more_rounds_than_there_are_buffers(
    emulator: Emulator, tile: str, dtype: torch.dtype
) -> None:
    shape = TILES[tile]
    blocks = shape.groups * (shape.stages + 2) + 1  # the last round is not for every group
    problem = Problem.random(shape.rows - 3, 64 * blocks - 40, shape.tokens - 5, dtype, bias=True)
    problem.check(problem.run_gemm(emulator, problem.gemm_plan(tile)))


# Columns around multiples of 4 (group), 8 (16-byte copies) and 64 (block); rows around 4 (one store), 64 and a tile;
# tokens around 8 and a tile.
SHAPES = [
    (1, 1, 1),
    (2, 3, 17),
    (3, 8, 31),
    (63, 64, 33),
    (66, 65, 18),
    (64, 130, 64),
    (129, 72, 65),
    (257, 61, 40),
]


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
@pytest.mark.parametrize("tile", TILES)
def test_awkward_shapes(emulator: Emulator, tile: str, n: int, k: int, m: int) -> None:
    problem = Problem.random(n, k, m, FP16 if n % 2 else BF16, bias=k % 2 == 1)
    problem.check(problem.run_gemm(emulator, problem.gemm_plan(tile)))


@pytest.mark.parametrize(("tile", "splits"), [("128x32", 5), ("128x64", 3), ("128x128", 11), ("256x128", 4)])
def test_splits_in_any_order_give_the_same_bits(emulator: Emulator, tile: str, splits: int) -> None:
    problem = Problem.random(n=70, k=690, m=35, bias=True)
    forward = problem.run_gemm(emulator, problem.gemm_plan(tile, splits))
    problem.check(forward)
    backward = problem.run_gemm(emulator, problem.gemm_plan(tile, splits), order=1)
    assert torch.equal(forward.view(torch.int16), backward.view(torch.int16))


@pytest.mark.parametrize("tile", ["128x32", "128x64"])
def test_tiles_that_sum_at_the_same_time_do_not_meet(emulator: Emulator, tile: str) -> None:
    problem = Problem.random(n=130, k=128, m=70)
    problem.check(problem.run_gemm(emulator, problem.gemm_plan(tile, 2), order=2))


def test_counters_end_at_zero_and_a_second_launch_is_the_same(emulator: Emulator) -> None:
    problem = Problem.random(n=70, k=200, m=40)
    first = problem.gemm_launch(problem.gemm_plan("128x32", 3))
    arrays = emulator.run(first)
    assert arrays[-1].dtype == np.uint32 and not arrays[-1].any()
    second = replace(first, arguments=[*first.arguments[:5], *arrays[-2:], *first.arguments[7:]])
    assert np.array_equal(emulator.run(second)[3], arrays[3])


def test_all_six_nibbles_in_every_position(emulator: Emulator) -> None:
    rows, columns = 128, 64
    number = torch.arange(rows * columns // 4).view(rows, columns // 4)
    for shift in range(6):
        positions = NIBBLES[(number + number // (columns // 4) + shift) % 6]
        mask = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(2, positions, True).flatten(1)
        dense = (torch.arange(rows * columns).view(rows, columns) % 15 - 7).to(BF16) * mask
        x = (torch.arange(32 * columns).view(32, columns) % 13 - 6).to(BF16)
        problem = Problem([NMWeight.compress(dense, mask)], x, [None])
        y = problem.run_gemm(emulator, problem.gemm_plan("128x32"))
        assert torch.equal(y.double(), (x.double() @ dense.double().T).to(BF16).double())


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_activations_stay_in_their_token_and_column(emulator: Emulator, special: float) -> None:
    problem = Problem.random(n=70, k=150, m=20, dtype=BF16)
    problem.x[16, 9] = special
    y = problem.run_gemm(emulator, problem.gemm_plan("128x32", 2))
    problem.check(y)
    assert y[:16].isfinite().all() and y[17:].isfinite().all()
    assert not y[16].isfinite().all() and y[16].isfinite().any()


@pytest.mark.parametrize("tile", TILES)
def test_the_plan_asks_for_the_shared_memory_of_the_kernel(emulator: Emulator, tile: str) -> None:
    (bytes_of_kernel,) = emulator.run(Launch(f"nm_gemm_shared_{tile}", (1, 1, 1), 32, 0, [np.zeros(1, np.int64)]))
    assert int(bytes_of_kernel[0]) == TILES[tile].shared_bytes


def test_a_workspace_too_small_is_an_error(emulator: Emulator) -> None:
    problem = Problem.random(n=64, k=128, m=32)
    launch = problem.gemm_launch(problem.gemm_plan("128x32", 2))
    arguments = list(launch.arguments)
    arguments[5] = np.asarray(arguments[5])[: 128 * 32].copy()
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        emulator.run(replace(launch, arguments=arguments))


def test_nothing_outside_the_tensors_is_needed(emulator: Emulator) -> None:
    """Weights, activations and output end exactly where the emulated buffers end: one element less is caught."""
    problem = Problem.random(n=67, k=9, m=34)
    launch = problem.gemm_launch(problem.gemm_plan("128x32"))
    for index in (0, 1, 2, 4):
        arguments = list(launch.arguments)
        arguments[index] = np.asarray(arguments[index]).reshape(-1)[:-1].copy()
        with pytest.raises(EmulationError, match="heap-buffer-overflow"):
            emulator.run(replace(launch, arguments=arguments))
