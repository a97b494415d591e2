"""The m weights of a group as m separate tensors, and back: comparisons inside a group then need no communication."""

# ruff: noqa: RUF005 - Triton compiles the concatenation of tuples, not their unpacking.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_lanes(tile, ROWS: tl.constexpr, GROUPS: tl.constexpr, LOG_LANES: tl.constexpr):
    """``[ROWS, GROUPS · L] → L tensors [ROWS, GROUPS]``, L = 2^LOG_LANES: tensor i holds element i of every group."""
    parts = (tile,)
    for level in tl.static_range(LOG_LANES):
        first = ()
        second = ()
        for i in tl.static_range(len(parts)):
            even, odd = tl.split(tl.reshape(parts[i], (ROWS, GROUPS << (LOG_LANES - level - 1), 2)))
            first = first + (even,)
            second = second + (odd,)
        parts = first + second
    return parts


@triton.jit
def join_lanes(lanes, ROWS: tl.constexpr, GROUPS: tl.constexpr, LOG_LANES: tl.constexpr):
    """The inverse of :func:`split_lanes`."""
    parts = lanes
    for level in tl.static_range(LOG_LANES):
        joined = ()
        for i in tl.static_range(1 << (LOG_LANES - level - 1)):
            pair = tl.join(parts[i], parts[i + (1 << (LOG_LANES - level - 1))])
            joined = joined + (tl.reshape(pair, (ROWS, GROUPS << (level + 1))),)
        parts = joined
    return parts[0]
