"""torch's 2:4 products, as the backends call them and as the process that tries them out does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

TOKEN_MULTIPLE = 8
_TILE = 1024  # columns that come back at once from cuSPARSELt's layout


class Algorithm(NamedTuple):
    """One of cuSPARSELt's algorithms: its number, and in how many parts, and how, it splits K."""

    number: int = 0
    split_k: int = 1
    split_k_mode: int = -1


DEFAULT = Algorithm()


def pad_tokens(x: torch.Tensor) -> torch.Tensor:
    """``x [M, K]`` with zero rows added, so that M is a multiple of 8."""
    missing = -x.shape[0] % TOKEN_MULTIPLE
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


def cusparselt_linear(
    blob: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, algorithm: Algorithm
) -> torch.Tensor:
    """``x Wᵀ + bias`` for ``x [M, K]``, M a multiple of 8, and the weight as ``torch._cslt_compress`` gives it."""
    # By place: the last argument has had two names. Left out where it says nothing.
    split = () if algorithm.split_k == 1 else algorithm[1:]
    return torch._cslt_sparse_mm(blob, x.t(), bias, None, None, True, algorithm.number, *split)


def cusparselt_decompress(blob: torch.Tensor, columns: int) -> torch.Tensor:
    """``W I``, a slice of columns at a time: exact, since every sum has one non-zero term."""
    identity = torch.eye(columns, dtype=blob.dtype, device=blob.device)
    pieces = [torch._cslt_sparse_mm(blob, piece.contiguous()) for piece in identity.split(_TILE, dim=1)]
    return torch.cat(pieces, dim=1)


def cutlass_linear(
    values: torch.Tensor, metadata: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``x Wᵀ + bias`` for ``x [M, K]``, M a multiple of 8, and the weight in CUTLASS's order."""
    if bias is None:
        out = torch._sparse_semi_structured_mm(values, metadata, x.t())
    else:
        out = torch._sparse_semi_structured_addmm(bias, values, metadata, x.t())
    return out.t()
