"""What the regional optimiser minimises: ``Σ_tc w_t (f(X)_tc - f̂(X)_tc)²`` over tokens t and channels c.

``sum`` has ``w = 1`` (Wanda++, section 4). ``token`` has ``w_t = 1 / mean_c f(X)²_tc``: the first token of a sequence
becomes a hundred times larger than the others in the residual stream of most language models, and with ``sum`` it is
all that the optimiser sees, although the norm that follows scales every token to the same size.
"""

from __future__ import annotations

import torch


def regional_loss(kind: str, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The loss of ``output`` against ``target`` (both ``[B, T, H]``), and that of an all-zero output.

    Args:
        kind: ``sum`` or ``token``.
    """
    squares, energy = (output.float() - target).square(), target.square()
    if kind == "token":
        mean = energy.mean(-1, keepdim=True).clamp_min(1e-30)
        squares, energy = squares / mean, energy / mean
    return squares.sum(), energy.sum().item()
