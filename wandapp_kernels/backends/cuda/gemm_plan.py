"""How the 2:4 kernel for many tokens (csrc/cuda/nm_gemm.cuh) is cut over a GPU: the launch as a function of the shape.

A tile of rows × tokens belongs to one CTA, or to several that split K and whose partial sums are written, awaited and
read again. Every tile and every number of splits has a predicted time, and the least one is taken::

    max(bytes from memory, CTAs of the busiest multiprocessor · max(tensor cores, bytes from L2)) + starts + reduction

Large tiles read less from L2, small ones fill the GPU and leave less to be reduced. The constants of the rule fit what
an H100 took for three of LLaMA's shapes with 16 to 1024 tokens: of the tiles and splits measured, the rule's choice was
the fastest or within 10 %. GPUs that differ in all of them alike choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from wandapp_kernels.backends.cuda.fragment_layout import BLOCK, blocks
from wandapp_kernels.backends.cuda.plan import BLOCK_BYTES

MOST_SPLITS = 8
# Nanoseconds, of one multiprocessor among others that are as busy.
MMA_NS = 1.8  # a sparse m16n8k32 with its share of ldmatrix
L2_NS = 1 / 44  # a byte of weights or activations into a multiprocessor
MEMORY_NS = 1 / 24  # a byte of weights, shared evenly
PARTIAL_NS = 1 / 34  # a byte of partial sums
START_NS = 1430.0  # until a CTA multiplies
WAIT_NS = 3870.0  # from a CTA's last partial sum to the last CTA's first

_TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Tile:
    """What a CTA computes; csrc/cuda/nm_gemm.cu has the same table.

    Attributes:
        row_warps, token_warps, groups: warps along the rows (64 each), along the tokens, and along K.
        token_tiles: 8-token tiles of a warp.
        stages: buffers of activations.
        fragments: blocks of weights in a warp's registers: the one it multiplies, and those on their way. Where it is
            1, weights come through shared memory, in as many buffers as activations.
    """

    row_warps: int
    token_warps: int
    groups: int
    token_tiles: int
    stages: int
    fragments: int

    @property
    def rows(self) -> int:
        return BLOCK * self.row_warps

    @property
    def tokens(self) -> int:
        return 8 * self.token_tiles * self.token_warps

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.tokens}"

    @property
    def threads(self) -> int:
        return 32 * self.row_warps * self.token_warps * self.groups

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: the buffers, and later the groups' sums in their place."""
        activations = self.tokens * (2 * BLOCK * self.groups + 16)
        weights = self.row_warps * BLOCK_BYTES if self.fragments == 1 else 0
        return max(self.stages * (activations + weights), self.groups * self.tokens * (self.rows + 4) * 4)


TILES = {
    tile.name: tile
    for tile in (
        Tile(2, 1, 4, 4, 4, 3),
        Tile(2, 1, 4, 8, 4, 2),
        Tile(2, 2, 1, 8, 3, 1),
        Tile(4, 2, 1, 8, 4, 1),
    )
}


@dataclass(frozen=True)
class NmGemmPlan:
    """One launch of ``nm_gemm_*``.

    Attributes:
        tile: of a CTA.
        token_blocks, row_blocks, splits: CTAs along M, N and K.
    """

    tile: Tile
    token_blocks: int
    row_blocks: int
    splits: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.token_blocks * self.splits, self.row_blocks, 1)

    @property
    def counters(self) -> int:
        """32-bit words of the workspace: zero before the first launch, and every launch leaves them zero."""
        return self.token_blocks * self.row_blocks if self.splits > 1 else 0

    @property
    def partials(self) -> int:
        """fp32 elements of the workspace; 0 where one CTA sums all of K."""
        return self.counters * self.splits * self.tile.rows * self.tile.tokens

    def kernel(self, dtype: torch.dtype) -> str:
        """The entry point in csrc/cuda/nm_gemm.cu."""
        return f"nm_gemm_{_TYPE_NAMES[dtype]}_{self.tile.name}"


def predicted_ns(plan: NmGemmPlan, column_blocks: int, multiprocessors: int) -> float:
    """The time of a launch by the rule of this module, without the launch itself."""
    tile, row_blocks = plan.tile, plan.row_blocks * plan.tile.row_warps
    rounds = -(-plan.row_blocks * plan.token_blocks * plan.splits // multiprocessors)
    units = -(-column_blocks // plan.splits)
    tensor = units * 2 * (tile.rows // 16) * (tile.tokens // 8) * MMA_NS
    cache = units * (tile.row_warps * BLOCK_BYTES + tile.tokens * BLOCK * 2) * L2_NS
    memory = row_blocks * column_blocks * BLOCK_BYTES / multiprocessors * MEMORY_NS
    partial = tile.rows * tile.tokens * 4 * PARTIAL_NS
    reduction = 0.0 if plan.splits == 1 else WAIT_NS + (rounds + plan.splits) * partial
    return max(memory, rounds * max(tensor, cache)) + rounds * START_NS + reduction


@lru_cache(maxsize=4096)
def plan_gemm(
    n: int,
    k: int,
    m: int,
    multiprocessors: int,
    most_shared: int,
    tile: str | None = None,
    splits: int | None = None,
) -> NmGemmPlan:
    """The launch for ``y [m, n] = x [m, k] Wᵀ``.

    Args:
        n, k, m: output features, input features, tokens; each at least 1.
        multiprocessors: of the GPU (132 on an H100 SXM, 108 on an A100).
        most_shared: bytes of shared memory a CTA may ask for; larger tiles are not considered.
        tile: take this one of ``TILES`` instead of the fastest.
        splits: take this many (1 to the number of 64-column blocks) instead of the fastest.
    """
    column_blocks = blocks(k)
    candidates = [TILES[tile]] if tile else [each for each in TILES.values() if each.shared_bytes <= most_shared]
    counts = [splits] if splits else range(1, min(MOST_SPLITS, column_blocks) + 1)
    plans = [
        NmGemmPlan(each, -(-m // each.tokens), -(-n // each.rows), count) for each in candidates for count in counts
    ]
    return min(plans, key=lambda plan: predicted_ns(plan, column_blocks, multiprocessors))
