"""What a weight update returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Repair:
    """Attributes:
    weight: ``[out, in]`` fp32, zero where ``mask`` is False.
    mask: bool ``[out, in]``, True where kept.
    warning: one sentence when something had to be adjusted (raised damping), else empty.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    warning: str = ""
