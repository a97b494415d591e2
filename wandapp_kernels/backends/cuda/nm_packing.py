"""The layout ``"nm-mma"`` by kernels on the weight's own GPU (csrc/cuda/nm_pack.cuh): packed, unpacked, made dense.

``FragmentLayout`` calls these for a weight that lies on a GPU the kernels run on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wandapp_kernels.backends.cuda.fragment_layout import BLOCK, PATTERN, blocks
from wandapp_kernels.backends.cuda.launcher import launch
from wandapp_kernels.backends.cuda.plan import THREADS, pack_grid, unpack_grid, weight_refusal
from wandapp_kernels.errors import KernelError
from wandapp_kernels.sparsity.checks import check_tensor
from wandapp_kernels.sparsity.nm_weight import NMWeight, kept_per_row
from wandapp_kernels.sparsity.packing import packed_bytes


def pack(weight: NMWeight) -> list[torch.Tensor]:
    """``[values, metadata]`` of a 2:4 weight of 16 bits.

    Raises:
        SparsityError: values and indices do not fit the weight's shape, or are on two devices.
    """
    rows, columns = weight.shape
    kept = kept_per_row(columns, PATTERN)
    canonical = (weight.values.contiguous(), weight.indices.contiguous())
    check_tensor(canonical[0], "values", (rows, kept))
    check_tensor(canonical[1], "indices", (rows, packed_bytes(kept, 2)), torch.uint8, weight.values.device)
    row_blocks, column_blocks = blocks(rows), blocks(columns)
    values = weight.values.new_empty((row_blocks, column_blocks, 2, 4, 32, 8))
    metadata = weight.indices.new_empty((row_blocks, column_blocks, BLOCK // 2, 4), dtype=torch.int32)
    _launch("nm_pack", pack_grid(rows, columns), (*canonical, values, metadata), weight.shape)
    return [values, metadata]


def unpack(tensors: Sequence[torch.Tensor], shape: tuple[int, int]) -> NMWeight:
    """The canonical weight again.

    Raises:
        KernelError: the tensors are not those of a weight of that shape.
    """
    packed, metadata = _checked(tensors, shape)
    kept = kept_per_row(shape[1], PATTERN)
    values = packed.new_empty((shape[0], kept))
    indices = packed.new_empty((shape[0], packed_bytes(kept, 2)), dtype=torch.uint8)
    _launch("nm_unpack", unpack_grid(*shape), (packed, metadata, values, indices), shape)
    return NMWeight(values, indices, shape, PATTERN)


def decompress(tensors: Sequence[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight ``[N, K]``, contiguous, +0.0 where nothing is kept.

    Raises:
        KernelError: the tensors are not those of a weight of that shape.
    """
    values, metadata = _checked(tensors, shape)
    dense = values.new_empty(shape)
    _launch("nm_decompress", pack_grid(*shape), (values, metadata, dense), shape)
    return dense


def _checked(tensors: Sequence[torch.Tensor], shape: tuple[int, int]) -> Sequence[torch.Tensor]:
    if (reason := weight_refusal(tensors, shape, tensors[0])) is not None:
        raise KernelError(f"the 2:4 weight cannot be unpacked: {reason}")
    return tensors


def _launch(name: str, grid: tuple[int, int, int], tensors: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> None:
    if grid[0]:
        launch("nm_pack", name, (grid[0], grid[1]), THREADS, 0, (*tensors, *shape), tensors[0].device)
