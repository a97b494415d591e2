"""Operators registered with torch.library; one file per operator, the reference beside it."""

from wandapp_kernels.ops.bitmap_linear import bitmap_linear, bitmap_linear_reference
from wandapp_kernels.ops.layouts import CANONICAL, LAYOUTS, Layout, get_layout, register_layout
from wandapp_kernels.ops.linears import linears
from wandapp_kernels.ops.nm_linear import nm_linear, nm_linear_reference
from wandapp_kernels.ops.operator import decompress
from wandapp_kernels.ops.running import set_runner, set_together_runner

__all__ = [
    "CANONICAL",
    "LAYOUTS",
    "Layout",
    "bitmap_linear",
    "bitmap_linear_reference",
    "decompress",
    "get_layout",
    "linears",
    "nm_linear",
    "nm_linear_reference",
    "register_layout",
    "set_runner",
    "set_together_runner",
]
