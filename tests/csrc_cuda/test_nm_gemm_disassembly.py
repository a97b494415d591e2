"""What nvcc makes of the 2:4 kernel for many tokens: sparse tensor cores, 16-byte loads, no spills, occupancy."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.budget import A100, H100, Loop, occupancy
from bench.disassembly import Compiled, disassemble, missing_tools
from wandapp_kernels.backends.cuda.gemm_plan import TILES, Tile

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")


def kernel(tile: str, architecture: str, dtype: str = "bf16") -> Compiled:
    return disassemble("nm_gemm", f"nm_gemm_{dtype}_{tile}", architecture)


def copies(tile: Tile) -> int:
    """16-byte copies of activations by a thread in a round."""
    return tile.tokens * tile.groups * 64 // 8 // tile.threads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tile", TILES)
def test_nothing_is_spilled_and_registers_keep_the_launch_bound(architecture: str, tile: str) -> None:
    for dtype in ("bf16", "fp16"):
        found = kernel(tile, architecture, dtype)
        assert found.count("LDL", "STL") == 0
        assert found.stack_bytes == 0
        assert found.registers <= 255


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tile", TILES)
def test_the_main_loop(architecture: str, tile: str) -> None:
    """A round of a warp: 9 weight loads of 16 bytes, 4 mma.sp for each ldmatrix, and few other instructions."""
    shape = TILES[tile]
    loop = Counter(each.name for each in kernel(tile, architecture).loop_with("HMMA.SP"))
    products = sum(count for name, count in loop.items() if name.startswith("HMMA.SP.16832.F32"))
    rounds = products // (8 * shape.token_tiles)
    assert products == 8 * shape.token_tiles * rounds
    weights = {name: count for name, count in loop.items() if name.startswith("LDG.")}
    asynchronous = copies(shape)
    if shape.fragments == 1:
        asynchronous += shape.row_warps * 256 // shape.threads + 1  # values, and the metadata of some warps
        assert not weights
        assert loop["LDS.128"] == 9 * rounds
    else:
        assert sum(weights.values()) == 9 * rounds
        assert all("128.CONSTANT" in name and ".NA." in name for name in weights), weights
    assert loop["LDSM.16.M88.4"] == 2 * shape.token_tiles * rounds
    assert loop["LDGSTS.E.BYPASS.128"] == asynchronous * rounds
    other = sum(loop.values()) - products - loop["LDSM.16.M88.4"] - (9 + asynchronous) * rounds
    assert other <= (45 + 3 * asynchronous) * rounds


@pytest.mark.parametrize("tile", TILES)
def test_occupancy(tile: str) -> None:
    """Eight warps a multiprocessor, where its shared memory holds them."""
    for gpu in (A100, H100):
        shape = TILES[tile]
        found = kernel(tile, gpu.architecture)
        loop = Loop(0, 0, found.registers, 0, shape.threads, shape.shared_bytes, 0)
        assert occupancy(loop, gpu) * shape.threads == 256


@pytest.mark.parametrize("tile", TILES)
def test_sums_and_results_move_in_16_and_8_bytes(tile: str) -> None:
    found = {each.name for each in kernel(tile, "sm_90a").instructions}
    assert any(name.startswith("LDG.E.128.STRONG.GPU") for name in found)
    assert any(name.startswith("STG.E.128.STRONG.GPU") for name in found)
    assert any(name.startswith("STG.E.64") for name in found)
