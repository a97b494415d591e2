"""Ground floor: patterns and masks. Knows tensors only."""

from wandapp_kernels.sparsity.mask import keep_highest, mask_from_scores, satisfies, sparsity_of
from wandapp_kernels.sparsity.pattern import Pattern

__all__ = ["Pattern", "keep_highest", "mask_from_scores", "satisfies", "sparsity_of"]
