"""Ground floor: patterns, masks and compressed weights. Knows tensors only."""

from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.mask import keep_highest, mask_from_scores, satisfies, sparsity_of
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.pattern import Pattern

__all__ = ["BitmapWeight", "NMWeight", "Pattern", "keep_highest", "mask_from_scores", "satisfies", "sparsity_of"]
