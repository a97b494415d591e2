"""The layout ``"bitmap-mma"`` by kernels on the weight's own GPU (csrc/cuda/bitmap_pack.cuh): packed and unpacked.

``BitmapMmaLayout`` calls these for a weight that lies on a GPU the kernels run on. Torch only sums up, between the two
launches of each way, what the first has counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from wandapp_kernels.backends.cuda.bitmap_layout import ALIGNMENT, PANEL_COLUMNS, SLAB_ROWS
from wandapp_kernels.backends.cuda.launcher import launch
from wandapp_kernels.errors import SparsityError
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.checks import check_tensor
from wandapp_kernels.sparsity.packing import packed_bytes

WARPS = 8  # of a CTA, one panel each


def pack(weight: BitmapWeight) -> list[torch.Tensor]:
    """``[values, bitmap, offsets]`` of a weight of 16 bits.

    Raises:
        SparsityError: values and bitmap do not fit each other or the shape, or are on two devices.
    """
    bitmap, canonical = weight.bitmap.contiguous(), weight.values.contiguous()
    check_tensor(bitmap, "bitmap", (weight.shape[0], packed_bytes(weight.shape[1], 1)), torch.uint8, canonical.device)
    counted = _Counted(weight.shape, canonical.device)
    words = torch.empty((counted.panels, 32, 2), dtype=torch.int32, device=canonical.device)
    _launch("bitmap_pack_words", (bitmap, words, counted.counts, counted.segments), weight.shape)
    starts, offsets = counted.starts(), counted.offsets()
    kept, units = torch.stack([starts[-1], offsets[-1].long()]).tolist()  # one wait for both
    if kept != canonical.numel():
        raise SparsityError(f"the bitmap keeps {kept} weights, but there are {canonical.numel()} values")
    values = canonical.new_empty(units * ALIGNMENT)
    _launch("bitmap_pack_values", (bitmap, starts, offsets, canonical, values), weight.shape)
    return [values, words, offsets]


def unpack(tensors: Sequence[torch.Tensor], shape: tuple[int, int]) -> BitmapWeight:
    """The canonical weight again.

    Raises:
        SparsityError: the tensors are not those of a weight of that shape.
    """
    packed, words, offsets = (tensor.contiguous() for tensor in tensors)
    counted = _Counted(shape, packed.device)
    for tensor, name, size in ((words, "bitmap", (counted.panels, 32, 2)), (offsets, "offsets", (counted.panels + 1,))):
        if tensor.shape != size or tensor.dtype != torch.int32 or tensor.device != packed.device:
            found = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise SparsityError(f"a weight of shape {shape} cannot be unpacked: {name} is {found}")
    bitmap = packed.new_empty((shape[0], packed_bytes(shape[1], 1)), dtype=torch.uint8)
    _launch("bitmap_unpack_words", (words, bitmap, counted.counts, counted.segments), shape)
    starts = counted.starts()
    # The next launch follows the offsets. One wait for everything that is asked of the GPU.
    differences = (offsets != counted.offsets()).sum()
    wrong, kept, units = torch.stack([differences, starts[-1], offsets[-1].long()]).tolist()
    if wrong or units * ALIGNMENT > packed.numel():
        raise SparsityError(
            f"a weight of shape {shape} cannot be unpacked: bitmap, offsets and values do not fit together"
        )
    values = packed.new_empty(kept)
    _launch("bitmap_unpack_values", (bitmap, starts, offsets, packed, values), shape)
    row_offsets = starts[:: counted.panels_of_row] if counted.panels_of_row else starts.new_zeros(shape[0] + 1)
    return BitmapWeight(values, bitmap, row_offsets.contiguous(), shape)


class _Counted:
    """How many values each panel keeps, and each row in each panel (its segments), as the first launch counts them."""

    def __init__(self, shape: tuple[int, int], device: torch.device):
        self.panels_of_row = -(-shape[1] // PANEL_COLUMNS)
        self.panels = -(-shape[0] // SLAB_ROWS) * self.panels_of_row
        self.counts = torch.empty(self.panels, dtype=torch.int32, device=device)
        self.segments = torch.empty((shape[0], self.panels_of_row), dtype=torch.int32, device=device)

    def starts(self) -> torch.Tensor:
        """int64 ``[segments + 1]``: where the values of a segment start in the canonical order."""
        return pad(self.segments.view(-1).cumsum(0), (1, 0))

    def offsets(self) -> torch.Tensor:
        """int32 ``[panels + 1]``: where the values of a panel start, in units of 16 bytes."""
        return pad((-(-self.counts // ALIGNMENT)).cumsum(0), (1, 0)).int()


def _launch(name: str, tensors: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> None:
    ctas = -(-(-(-shape[0] // SLAB_ROWS) * -(-shape[1] // PANEL_COLUMNS)) // WARPS)
    if ctas:
        launch("bitmap_pack", name, (ctas, 1), 32 * WARPS, 0, (*tensors, *shape), tensors[0].device)
