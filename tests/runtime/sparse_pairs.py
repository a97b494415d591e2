"""A dense layer and the SparseLinear that was made from it."""

from __future__ import annotations

import copy

import torch
from pruned_models import pruned_linear
from torch import nn

from wandapp_kernels.backends import layouts_of
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.runtime import SparseLinear

FORMS = {"2:4": "2:4", "4:8": "4:8", "unstructured": "60%"}


def pair(form: str = "2:4", **options) -> tuple[nn.Linear, SparseLinear]:
    linear = pruned_linear(pattern=FORMS[form], **options)
    return linear, SparseLinear.from_linear(linear, form)


def close(got: torch.Tensor, expected: torch.Tensor, scale: float = 1e-6) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=scale, atol=scale)


def in_every_layout(sparse: SparseLinear) -> list[SparseLinear]:
    """Copies of it."""
    kept = sparse.compressed()
    names = layouts_of(get_layout(sparse.layout).operator)
    return [copy.deepcopy(sparse).set_layout(name) for name in names if get_layout(name).supports(kept) is None]
