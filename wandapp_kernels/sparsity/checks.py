"""What both compressed weights refuse: wrong shapes, types, devices, layouts in memory, and casts that overflow."""

from __future__ import annotations

import torch

from wandapp_kernels.errors import SparsityError
from wandapp_kernels.sparsity.packing import Storage, as_bits, check_finite, storage_of


def check_weight(weight: torch.Tensor, mask: torch.Tensor | None) -> Storage:
    """Raise SparsityError unless weight and mask can be compressed; return how the weight looks as bits."""
    storage = storage_of(weight, "weight")
    if weight.dim() != 2:
        raise SparsityError(f"weight has shape {tuple(weight.shape)}: only matrices [out, in] can be compressed")
    if mask is None:
        return storage
    if mask.dtype != torch.bool or mask.shape != weight.shape or mask.device != weight.device:
        raise SparsityError(
            f"mask is {mask.dtype} {tuple(mask.shape)} on {mask.device}: the weight needs torch.bool "
            f"{tuple(weight.shape)} on {weight.device}"
        )
    return storage


def check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """``shape`` as it is, or SparsityError when it is not two sizes of at least 0."""
    if len(shape) != 2 or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise SparsityError(f"shape is {shape}: it must be (rows, columns) of the dense weight")
    return shape


def check_tensor(
    tensor: torch.Tensor,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise SparsityError unless ``tensor`` is contiguous and has this shape, type and device."""
    if tuple(tensor.shape) != shape:
        raise SparsityError(f"{name} has shape {tuple(tensor.shape)}, but {shape} is needed")
    if dtype is not None and tensor.dtype != dtype:
        raise SparsityError(f"{name} is {tensor.dtype}, but {dtype} is needed")
    if device is not None and tensor.device != device:
        raise SparsityError(f"{name} is on {tensor.device}, but values are on {device}")
    if not tensor.is_contiguous():
        raise SparsityError(f"{name} is not contiguous: call .contiguous() first")


def cast_values(values: torch.Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> torch.Tensor:
    """``values`` moved and cast. Raises SparsityError for a type that cannot be stored, NonFiniteError on overflow."""
    moved = values.to(device=device, dtype=dtype)
    storage = storage_of(moved, "values")
    if moved.dtype != values.dtype:
        check_finite(as_bits(moved), storage, f"values cast to {moved.dtype}")
    return moved
