"""The launch plan of the kernel for many tokens: what it chooses covers the problem and fits the GPU."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from wandapp_kernels.backends.cuda.ahead import source_folder
from wandapp_kernels.backends.cuda.fragment_layout import blocks
from wandapp_kernels.backends.cuda.gemm_plan import TILES, NmGemmPlan, plan_gemm, predicted_ns

H100 = (132, 227 * 1024)
SMALL = (58, 99 * 1024)  # the least shared memory of a supported GPU (sm_86, sm_89)
SHAPES = [(1, 1, 17), (4096, 4096, 32), (14336, 4096, 64), (4096, 14336, 512), (151936, 896, 4096), (65, 65, 100)]


@pytest.mark.parametrize("gpu", [H100, SMALL])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_covers_the_problem(shape: tuple[int, int, int], gpu: tuple[int, int]) -> None:
    n, k, m = shape
    chosen = plan_gemm(*shape, *gpu)
    tile = chosen.tile
    assert chosen.token_blocks * tile.tokens >= m > (chosen.token_blocks - 1) * tile.tokens
    assert chosen.row_blocks * tile.rows >= n > (chosen.row_blocks - 1) * tile.rows
    assert 1 <= chosen.splits <= blocks(k)
    assert tile.shared_bytes <= gpu[1]
    assert chosen.grid == (chosen.token_blocks * chosen.splits, chosen.row_blocks, 1)
    tiles = chosen.token_blocks * chosen.row_blocks if chosen.splits > 1 else 0
    assert chosen.counters == tiles
    assert chosen.partials == tiles * chosen.splits * tile.rows * tile.tokens


def test_tiles_and_splits_that_were_asked_for_are_taken() -> None:
    for name, tile in TILES.items():
        assert plan_gemm(4096, 4096, 64, *H100, name, 3) == NmGemmPlan(
            tile, -(-64 // tile.tokens), 4096 // tile.rows, 3
        )


def test_the_tiles_are_those_of_the_kernel() -> None:
    source = (source_folder() / "nm_gemm.cu").read_text()
    for name, tile in TILES.items():
        assert f"Nm{name} = NmTile<{', '.join(map(str, astuple(tile)))}>;" in source
    assert source.count("= NmTile<") == len(TILES)


def test_the_choice_has_the_least_predicted_time() -> None:
    for n, k, m in SHAPES:
        chosen = plan_gemm(n, k, m, *H100)
        best = predicted_ns(chosen, blocks(k), H100[0])
        for name in TILES:
            for splits in range(1, min(4, blocks(k)) + 1):
                assert best <= predicted_ns(plan_gemm(n, k, m, *H100, name, splits), blocks(k), H100[0])


def test_few_rows_are_split_and_many_are_not() -> None:
    assert plan_gemm(1024, 8192, 64, *H100).splits > 1
    assert plan_gemm(28672, 8192, 2048, *H100).splits == 1


def test_more_tokens_take_larger_tiles() -> None:
    assert plan_gemm(14336, 4096, 32, *H100).tile.tokens == 32
    assert plan_gemm(14336, 4096, 4096, *H100).tile.tokens == 128


def test_the_time_of_two_waves_is_more_than_that_of_one() -> None:
    tile = TILES["256x128"]
    one, two = (predicted_ns(NmGemmPlan(tile, 1, rows, 1), 64, 132) for rows in (132, 133))
    assert two > 1.5 * one
