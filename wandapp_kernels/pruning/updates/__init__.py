"""Weight updates: repair the kept weights after (or while) others are removed.

Every function maps ``(weight [out, in] fp32, statistics, pattern, mask or None)`` to a ``Repair``. With a mask the
repair keeps it; without one the update chooses its own mask while it repairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wandapp_kernels.pruning.statistics import LayerStatistics
from wandapp_kernels.pruning.updates.admm import admm, admm_pcg
from wandapp_kernels.pruning.updates.obs import obs
from wandapp_kernels.pruning.updates.repair import Repair
from wandapp_kernels.sparsity import Pattern


@dataclass(frozen=True)
class Update:
    """A repair and the criterion whose mask it prefers to choose itself, jointly with the repair."""

    repair: Callable[[torch.Tensor, LayerStatistics, Pattern, torch.Tensor | None], Repair]
    joint_criterion: str


UPDATES: dict[str, Update] = {
    "sparsegpt": Update(obs, "obs"),
    "admm": Update(admm, "wanda"),
    "admm-pcg": Update(admm_pcg, "wanda"),
}

__all__ = ["UPDATES", "Repair", "Update"]
