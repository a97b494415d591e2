"""Layouts: how the tensors of a compressed weight lie in memory while a layer runs.

A swapped layer holds the tensors of one layout only, so every layout can be turned back into the canonical weight. The
layouts ``"nm"`` and ``"bitmap"`` are the canonical weights themselves; backends register their own with
:func:`register_layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from wandapp_kernels.errors import UsageError
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.pattern import Pattern

OPERATORS = ("nm_linear", "bitmap_linear")

CompressedWeight = NMWeight | BitmapWeight


class Layout(ABC):
    """One way to lay a compressed weight out.

    Attributes:
        name: what operators and saved settings call it.
        operator: which operator takes it, one of ``OPERATORS``.
    """

    name: str
    operator: str

    @abstractmethod
    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        """The layout's tensors, on the weight's device. Values come first: their type is the layer's weight type."""

    @abstractmethod
    def unpack(
        self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None
    ) -> CompressedWeight:
        """The canonical weight, the exact inverse of :meth:`pack`.

        Args:
            tensors: what :meth:`pack` returned.
            shape: ``(out, in)`` of the dense weight.
            pattern: n:m for ``nm_linear``, None for ``bitmap_linear``.
        """

    def decompress(
        self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None
    ) -> torch.Tensor:
        """The dense weight ``[out, in]``."""
        return self.unpack(tensors, shape, pattern).decompress()

    def supports(self, weight: CompressedWeight) -> str | None:
        """None when :meth:`pack` can take ``weight``, else the reason in a sentence."""
        return None

    def least_nbytes(self, weight: CompressedWeight) -> int:
        """Bytes that :meth:`pack` of ``weight`` takes at least, told quickly; 0 where padding can never be much."""
        return 0

    def require(self, weight: CompressedWeight) -> None:
        """Raises UsageError, with the reason of :meth:`supports`, for a weight that :meth:`pack` cannot take."""
        if (reason := self.supports(weight)) is not None:
            raise UsageError(f"layout {self.name!r} cannot take this weight: {reason}")

    def density(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> float:
        """The fraction of weights kept, asked when a backend is chosen: measurements are looked up by it.

        From sizes alone, so that a GPU is not waited for; a layout with much padding reads one number.
        """
        if pattern is not None:
            return pattern.n / pattern.m
        return tensors[0].numel() / max(shape[0] * shape[1], 1)


class NMLayout(Layout):
    """The canonical n:m weight: ``[values, indices]``."""

    name = "nm"
    operator = "nm_linear"

    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        if not isinstance(weight, NMWeight):
            raise UsageError(f"layout {self.name!r} holds an NMWeight, not a {type(weight).__name__}")
        return [weight.values, weight.indices]

    def unpack(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> NMWeight:
        if pattern is None:
            raise UsageError(f"layout {self.name!r} needs the n:m pattern of the weight")
        values, indices = tensors
        return NMWeight(values, indices, shape, pattern)


class BitmapLayout(Layout):
    """The canonical unstructured weight: ``[values, bitmap, row_offsets]``."""

    name = "bitmap"
    operator = "bitmap_linear"

    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        if not isinstance(weight, BitmapWeight):
            raise UsageError(f"layout {self.name!r} holds a BitmapWeight, not a {type(weight).__name__}")
        return [weight.values, weight.bitmap, weight.row_offsets]

    def unpack(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> BitmapWeight:
        values, bitmap, row_offsets = tensors
        return BitmapWeight(values, bitmap, row_offsets, shape)


# A weight that is not compressed: [N, K] is its only tensor. Not among LAYOUTS.
DENSE = "dense"

LAYOUTS: dict[str, Layout] = {}

# The layout whose tensors are the saved weight itself, by operator.
CANONICAL = {"nm_linear": "nm", "bitmap_linear": "bitmap"}


def register_layout(layout: Layout) -> None:
    """Make ``layout`` known under its name. Registering the same class again does nothing.

    Raises:
        UsageError: another layout has the name, or its operator is unknown.
    """
    known = LAYOUTS.get(layout.name)
    if known is not None and type(known) is not type(layout):
        raise UsageError(f"a layout named {layout.name!r} exists already: choose another name")
    if layout.operator not in OPERATORS:
        raise UsageError(f"layout {layout.name!r} is for {layout.operator!r}: it must be one of {', '.join(OPERATORS)}")
    LAYOUTS.setdefault(layout.name, layout)


def get_layout(name: str) -> Layout:
    """The layout of that name. Raises UsageError, listing what is known, when there is none."""
    if name not in LAYOUTS:
        raise UsageError(
            f"layout {name!r} is unknown here (known: {', '.join(LAYOUTS)}): the backend that made it is not loaded"
        )
    return LAYOUTS[name]


register_layout(NMLayout())
register_layout(BitmapLayout())
