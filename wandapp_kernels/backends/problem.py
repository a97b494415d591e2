"""What is asked of a backend: one linear on one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.layouts import DENSE
from wandapp_kernels.ops.running import parse_pattern
from wandapp_kernels.sparsity.pattern import UNSTRUCTURED

# The operator of a weight that is not compressed; DENSE is its layout and its pattern.
DENSE_OPERATOR = "linear"


@dataclass(frozen=True)
class Problem:
    """One linear ``[tokens, in_features] → [tokens, out_features]``.

    Attributes:
        operator: ``"nm_linear"``, ``"bitmap_linear"``, or ``"linear"`` for a weight that stays dense.
        tokens: M, rows of the activation.
        out_features: N, rows of the weight.
        in_features: K, columns of the weight.
        pattern: ``"2:4"``, … for ``nm_linear``; ``"unstructured"`` for ``bitmap_linear``; ``"dense"`` for ``linear``.
        density_bucket: kept weights in per cent, rounded to a multiple of 10 (:func:`density_bucket`).
        dtype: of activation, output and (unless the layout stores int8 or float8) weight.
        device: ``"cpu"``, ``"cuda:0"``, …
        threads: ``torch.get_num_threads()`` on a CPU; 0 elsewhere.
    """

    operator: str
    tokens: int
    out_features: int
    in_features: int
    pattern: str
    density_bucket: int
    dtype: torch.dtype
    device: str
    threads: int

    @property
    def device_type(self) -> str:
        """``"cpu"`` or ``"cuda"``."""
        return self.device.partition(":")[0]


def token_bucket(tokens: int) -> int:
    """The upper end of ``tokens``' bucket: the next power of two."""
    return 1 << max(tokens - 1, 0).bit_length()


def density_bucket(density: float) -> int:
    """``density`` in per cent to the nearest 10, at least 10 and at most 100."""
    return min(max(round(density * 10) * 10, 10), 100)


def problem_for(
    out_features: int,
    in_features: int,
    pattern: str,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    density: float | None = None,
) -> Problem:
    """The problem of one linear, as it would run in this process now.

    Args:
        out_features: N.
        in_features: K.
        pattern: n:m; ``"unstructured"``, with ``density``; or ``"dense"`` for a weight that stays dense.
        tokens: M.
        dtype: of activation and weight.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:0"``.
        density: the fraction kept; n:m and dense weights have their own.
    """
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    if pattern == DENSE:
        operator, density = DENSE_OPERATOR, 1.0
    elif pattern == UNSTRUCTURED:
        operator = "bitmap_linear"
    else:
        operator, parsed = "nm_linear", parse_pattern(pattern)
        density = parsed.n / parsed.m if parsed is not None and parsed.is_nm else None
    if density is None:
        raise UsageError(f"a problem with the pattern {pattern!r} needs a density (or n:m, such as 2:4)")
    threads = torch.get_num_threads() if place.type == "cpu" else 0
    return Problem(
        operator, tokens, out_features, in_features, pattern, density_bucket(density), dtype, str(place), threads
    )
