"""Masks: bool tensors shaped like the weight, True where a weight is kept."""

from __future__ import annotations

import torch

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.sparsity.pattern import Pattern


def mask_from_scores(scores: torch.Tensor, pattern: Pattern, group: str = "row") -> torch.Tensor:
    """Keep the highest scores the pattern allows; among equal scores the lowest column index is kept.

    Args:
        scores: ``[out, in]``, any floating type, finite.
        pattern: n:m, or a ratio of every row.
        group: ``"row"`` compares the weights of one output row (Wanda); ``"layer"`` those of the whole matrix (the
            magnitude baseline of the literature; ties then break to the lowest row first). n:m patterns ignore it.

    Returns:
        bool ``[out, in]``, on the scores' device, the same for the same scores on every device.

    Raises:
        NonFiniteError: a score is NaN or infinite.
    """
    bad = scores.numel() - int(torch.isfinite(scores).sum())
    if bad:
        raise NonFiniteError(f"{bad} of {scores.numel()} scores are NaN or infinite")
    if pattern.is_nm:
        return _nm_mask(scores, pattern.n, pattern.m)
    rows = scores if group == "row" else scores.reshape(1, -1)
    keep = rows.shape[1] - pattern.removed_per_row(rows.shape[1])
    return keep_highest(rows, keep).reshape(scores.shape)


def keep_highest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Keep the ``keep`` highest scores of every row of ``scores [out, in]``, the lowest columns among equal ones.

    Only the value of the last kept score is asked of ``topk``: which of several equal scores it picks is not defined.
    """
    if keep == 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    last = scores.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    above, equal = scores > last, scores == last
    room = keep - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


def _nm_mask(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Rank every score inside its group by counting those that beat it: exact ties, no sort, no device dependence.

    The scores are laid out as m long lanes, one for each position inside a group, so that comparisons run over
    contiguous memory.
    """
    rows, columns = scores.shape
    padding = -columns % m
    if padding:
        scores = torch.nn.functional.pad(scores, (0, padding), value=-torch.inf)
    lanes = torch.stack(scores.reshape(-1, m).unbind(1))
    beaten_by = torch.zeros(lanes.shape, dtype=torch.int8, device=scores.device)
    for j in range(1, m):
        earlier_wins = lanes[:j] >= lanes[j]
        beaten_by[j] += earlier_wins.sum(0, dtype=torch.int8)
        beaten_by[:j] += ~earlier_wins
    kept = torch.stack((beaten_by < n).unbind(), 1)
    return kept.reshape(rows, columns + padding)[:, :columns].contiguous()


def satisfies(mask: torch.Tensor, pattern: Pattern) -> bool:
    """True when ``mask`` (True = non-zero) keeps no more weights than the pattern allows.

    n:m is checked group by group; unstructured over the whole matrix, since methods differ in what they compare.
    """
    rows, columns = mask.shape
    if not pattern.is_nm:
        return int(mask.sum()) <= rows * (columns - pattern.removed_per_row(columns))
    padded = torch.nn.functional.pad(mask.to(torch.int8), (0, -columns % pattern.m))
    return bool((padded.reshape(rows, -1, pattern.m).sum(-1) <= pattern.n).all())


def sparsity_of(weight: torch.Tensor) -> float:
    """Fraction of exact zeros (-0.0 counts as zero)."""
    return 1.0 - float(torch.count_nonzero(weight)) / max(weight.numel(), 1)
