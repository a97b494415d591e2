"""Running a pruned model: sparse linear layers, the swap, generation, memory."""

from wandapp_kernels.runtime.sparse_linear import SparseLinear
from wandapp_kernels.runtime.swap import SwapReport, desparsify, sparsify

__all__ = ["SparseLinear", "SwapReport", "desparsify", "sparsify"]
