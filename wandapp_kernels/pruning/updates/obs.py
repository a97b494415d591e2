"""OBS with lazy batches, as SparseGPT solves it (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1).

With ``U`` the upper Cholesky factor of the damped ``H⁻¹``, columns are visited from left to right; pruning ``W[:, i]``
costs ``err = (W[:, i] - q) / U_ii`` and the columns to its right take ``W[:, i:] -= err · U[i, i:]``. Columns are
worked in blocks of 128, the rest of the matrix being updated once a block.
"""

from __future__ import annotations

import torch

from wandapp_kernels.pruning.hessian import DAMPING, damped_inverse
from wandapp_kernels.pruning.statistics import LayerStatistics
from wandapp_kernels.pruning.updates.repair import Repair
from wandapp_kernels.sparsity import Pattern, keep_highest, mask_from_scores

BLOCK = 128


def obs(
    weight: torch.Tensor,
    statistics: LayerStatistics,
    pattern: Pattern,
    mask: torch.Tensor | None = None,
    *,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Repair:
    """Prune and repair ``weight [out, in]`` given ``statistics.gram``.

    Without ``mask``: n:m groups are chosen when their first column is reached, unstructured weights per block of
    columns over all rows (the block's share of the ratio; rows may differ, as in the paper), both by ``W² / U_jj²``.
    """
    assert statistics.gram is not None
    solved = damped_inverse(statistics.gram, damping)
    upper, work = solved.factor, weight.float().clone()
    work[:, solved.dead] = 0
    columns = work.shape[1]
    kept = torch.ones_like(work, dtype=torch.bool) if mask is None else mask
    if pattern.is_nm:
        block = max(block // pattern.m, 1) * pattern.m  # a group never straddles two blocks
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = _prune_columns(work, kept, upper, start, stop, pattern, choose=mask is None)
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    warning = ""
    if solved.damping > damping:
        warning = f"the Hessian was not positive definite; damping was raised from {damping:g} to {solved.damping:g}"
    return Repair(work * kept, kept, warning)


def _prune_columns(
    work: torch.Tensor,
    kept: torch.Tensor,
    upper: torch.Tensor,
    start: int,
    stop: int,
    pattern: Pattern,
    *,
    choose: bool,
) -> torch.Tensor:
    """Prune columns ``start:stop`` of ``work`` in place; returns their errors ``[out, stop - start]``."""
    local = work[:, start:stop].T.contiguous()  # one weight column per row: each step reads and writes whole rows
    corner = upper[start:stop, start:stop]
    scale = corner.diagonal().square()
    width = stop - start
    errors = torch.zeros_like(local)
    if choose and not pattern.is_nm:
        scores = (local.T.square() / scale).reshape(1, -1)
        rows = len(work)  # what is due is counted from the first column: rounded down block by block, weights are lost
        due = pattern.removed_per_row(rows * stop) - pattern.removed_per_row(rows * start)
        kept[:, start:stop] = keep_highest(scores, scores.shape[1] - due).reshape(rows, width)
    for i in range(width):
        if choose and pattern.is_nm and i % pattern.m == 0:
            group = slice(i, min(i + pattern.m, width))
            scores = local[group].T.square() / scale[group]
            kept[:, start + group.start : start + group.stop] = mask_from_scores(scores, pattern)
        errors[i] = torch.where(kept[:, start + i], 0.0, local[i] / corner[i, i])
        local[i:].addr_(corner[i, i:], errors[i], alpha=-1)
    work[:, start:stop] = local.T
    return errors.T
