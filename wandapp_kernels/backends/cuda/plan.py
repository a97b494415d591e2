"""How the 2:4 decode kernel is cut over a GPU: the launch as a pure function of the shape (csrc/cuda/plan.h in Python).

One CTA owns 64 rows, one block of tokens and 1/splits of K. More splits fill the GPU evenly, but their partial sums
are written, awaited and read again. The cost of a choice is counted in bytes that a multiprocessor reads: its even
share of the weight, or what the busiest one reads where that takes longer, since one alone is faster than one among
all; what is not bytes (a CTA's start, the wait for the last CTA) is entered as the bytes that pass meanwhile. The
constants fit what an H100 took for LLaMA's shapes with 1 to 16 tokens and 1 to 8 splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from wandapp_kernels.backends.cuda.fragment_layout import BLOCK, DTYPES, blocks

BLOCK_BYTES = BLOCK * BLOCK * 9 // 8
WARPS = 8
THREADS = 32 * WARPS
MOST_SPLITS = 32
START_BYTES = 4096
WAIT_BYTES = 32768
ALONE = (7, 4)  # so much faster a multiprocessor reads alone than among all: 7 to 4
ALIGNMENT = 16

_TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class NmDecodePlan:
    """One launch of ``nm_decode_*`` (one matrix) or ``nm_swiglu_*`` (two).

    Attributes:
        token_tiles: 8-token tiles of a CTA: 1 or 2, of a SwiGLU pair 4 too.
        token_blocks, row_blocks, splits: CTAs along M, N and K.
        shared_bytes: dynamic shared memory of a CTA (above 48 KiB the kernel's limit must be raised).
        partials: fp32 elements of the workspace; 0 where one CTA sums all of K.
        counters: 32-bit words of the workspace. They are zero before the first launch, and every launch leaves them
            zero, so launches of one stream may share them.
    """

    token_tiles: int
    token_blocks: int
    row_blocks: int
    splits: int
    shared_bytes: int
    partials: int
    counters: int

    @property
    def grid(self) -> tuple[int, int, int]:
        return (self.splits * self.token_blocks, self.row_blocks, 1)

    def kernel(self, dtype: torch.dtype, matrices: int = 1) -> str:
        """The entry point in csrc/cuda/nm_decode.cu."""
        return f"{'nm_swiglu' if matrices == 2 else 'nm_decode'}_{_TYPE_NAMES[dtype]}_{8 * self.token_tiles}"


@lru_cache(maxsize=4096)
def plan(n: int, k: int, m: int, multiprocessors: int, matrices: int = 1, splits: int | None = None) -> NmDecodePlan:
    """The launch for ``y [m, n] = x [m, k] Wᵀ``.

    Args:
        n, k, m: output features, input features, tokens; each at least 1.
        multiprocessors: of the GPU (132 on an H100 SXM, 108 on an A100).
        matrices: 1, or 2 for a SwiGLU pair.
        splits: take this many (1 to the number of 64-column blocks) instead of the cheapest.
    """
    token_tiles = 1 if m <= 8 else 2 if m <= 16 or matrices == 1 else 4
    tokens = 8 * token_tiles
    token_blocks, row_blocks, column_blocks = -(-m // tokens), blocks(n), blocks(k)
    partial_bytes = tokens * BLOCK * 4 * matrices

    def cost(splits: int) -> int:
        ctas = -(-row_blocks * token_blocks * splits // multiprocessors)
        share = row_blocks * token_blocks * column_blocks * matrices * BLOCK_BYTES // multiprocessors
        busiest = ctas * -(-column_blocks // splits) * matrices * BLOCK_BYTES
        reduction = 0 if splits == 1 else WAIT_BYTES + (ctas + splits) * partial_bytes
        return max(share, busiest * ALONE[1] // ALONE[0]) + ctas * START_BYTES + reduction

    splits = splits or min(range(1, min(MOST_SPLITS, column_blocks) + 1), key=cost)
    activations = 2 * tokens * (2 * BLOCK * WARPS // matrices + 16)
    sums = WARPS * tokens * (BLOCK + 4) * 4
    tiles = row_blocks * token_blocks if splits > 1 else 0
    return NmDecodePlan(
        token_tiles=token_tiles,
        token_blocks=token_blocks,
        row_blocks=row_blocks,
        splits=splits,
        shared_bytes=max(activations, sums),
        partials=tiles * splits * matrices * tokens * BLOCK,
        counters=tiles,
    )


def pack_grid(n: int, k: int) -> tuple[int, int, int]:
    """Grid of ``nm_pack`` and ``nm_decompress`` for a weight ``[n, k]``: a thread for each 16 bytes of values."""
    return (blocks(n) * blocks(k) * BLOCK * BLOCK // 16 // THREADS, 1, 1)


def unpack_grid(n: int, k: int) -> tuple[int, int, int]:
    """Grid of ``nm_unpack`` for a weight ``[n, k]``: a thread for each canonical value."""
    return (-(-n * (k // 4 * 2 + min(k % 4, 2)) // THREADS), 1, 1)


def refusal(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None, shape: tuple[int, int]
) -> str | None:
    """None when the kernel may be launched on these tensors, else the reason in one sentence.

    Args:
        x: ``[M, K]``.
        tensors: ``[values, metadata]`` of the fragment layout, or those of gate and up behind each other.
        bias: ``[N]`` or None.
        shape: ``(N, K)``.
    """
    n, k = shape
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}: the kernel takes float16 and bfloat16"
    if x.dim() != 2 or x.shape[1] != k or x.shape[0] < 1:
        return f"x has shape {tuple(x.shape)}: the weight wants [tokens, {k}]"
    if not x.is_contiguous():
        return "x is not contiguous: call .contiguous() first"
    if bias is not None and (reason := _tensor_refusal("bias", bias, x, x.dtype, (n,))) is not None:
        return reason
    return weight_refusal(tensors, shape, x)


def weight_refusal(tensors: Sequence[torch.Tensor], shape: tuple[int, int], like: torch.Tensor) -> str | None:
    """None when ``tensors`` are weights of ``shape`` in the fragment layout, with ``like``'s type, on its device."""
    row_blocks, column_blocks = blocks(shape[0]), blocks(shape[1])
    for values, metadata in zip(tensors[::2], tensors[1::2], strict=True):
        for name, tensor, dtype, size in (
            ("values", values, like.dtype, (row_blocks, column_blocks, 2, 4, 32, 8)),
            ("metadata", metadata, torch.int32, (row_blocks, column_blocks, 32, 4)),
        ):
            if (reason := _tensor_refusal(name, tensor, like, dtype, size)) is not None:
                return reason
            if tensor.data_ptr() % ALIGNMENT:
                return f"{name} does not start at a multiple of {ALIGNMENT} bytes: clone it first"
    return None


def _tensor_refusal(
    name: str, tensor: torch.Tensor, like: torch.Tensor, dtype: torch.dtype, size: tuple[int, ...]
) -> str | None:
    if tensor.dtype != dtype or tuple(tensor.shape) != size:
        return f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it must be {dtype} {size}"
    if tensor.device != like.device:
        return f"{name} is on {tensor.device} and not on {like.device}: all tensors must be on the same device"
    if not tensor.is_contiguous():
        return f"{name} is not contiguous: call .contiguous() first"
    return None
