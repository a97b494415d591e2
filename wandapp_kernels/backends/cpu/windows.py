"""The layout of unstructured weights whose kernel permutes the activations: `csrc/cpu/windows.h` describes it.

Blocks of 16 rows are cut into steps. A step holds up to two kept weights of each row, all within one window of 16
columns, padded with zeros to 32: its values, 4 bits for the column of each in the window, and where the window starts.

Values: ``[steps, 32]``; columns and windows of two steps side by side: uint8 ``[steps / 2, 36]``; the first step of
every block: int64 ``[⌈N/16⌉ + 1]``; the canonical weight's ``row_offsets``: int64 ``[N + 1]``. K is at most 65,536.

A step of 16-bit weights takes 82 bytes. Of its 32 places, random masks fill 89 % at 50 % kept, 85 % at 40 % and 79 % at
30 %, which makes 0.72, 0.60 and 0.49 of the dense weight's bytes (canonical: 0.56, 0.46 and 0.36).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from wandapp_kernels.backends.cpu import compiled
from wandapp_kernels.ops.layouts import CompressedWeight, Layout
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.pattern import Pattern


class WindowsLayout(Layout):
    """Unstructured values and columns in the order of the kernel."""

    name = "bitmap_windows"
    operator = "bitmap_linear"

    def supports(self, weight: CompressedWeight) -> str | None:
        if not isinstance(weight, BitmapWeight):
            return "it holds unstructured weights only"
        if weight.shape[1] > compiled.WINDOW_COLUMNS:
            return f"it holds at most {compiled.WINDOW_COLUMNS:,} columns"
        return compiled.unheld(weight.values.dtype)

    def least_nbytes(self, weight: CompressedWeight) -> int:
        """In every step of a block there are places for 16 rows, however few of them still need one."""
        assert isinstance(weight, BitmapWeight)
        rows, kept = compiled.WINDOW_ROWS, weight.row_offsets.diff()
        most = functional.pad(kept, (0, -len(kept) % rows)).view(-1, rows).amax(1)
        pairs = int(((most + 3) // 4).sum())
        return pairs * (2 * compiled.WINDOW_SLOTS * weight.values.element_size() + compiled.WINDOW_META)

    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        self.require(weight)
        assert isinstance(weight, BitmapWeight)
        packed = compiled.pack_windows(weight.to("cpu"))
        return [tensor.to(weight.values.device) for tensor in packed]

    def unpack(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> BitmapWeight:
        here = [tensor.to("cpu") for tensor in tensors]
        return compiled.unpack_windows(here, shape).to(tensors[0].device)

    def decompress(
        self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None
    ) -> torch.Tensor:
        if tensors[0].device.type != "cpu":
            return super().decompress(tensors, shape, pattern)
        return compiled.decompress(self.name, tensors, shape)

    def density(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> float:
        return int(tensors[3][-1]) / max(shape[0] * shape[1], 1)
