"""Cases of `cpu_cases` on the compiled kernels."""

from __future__ import annotations

import torch

from wandapp_kernels.backends.cpu import compiled


def check(case, outputs) -> None:
    error = (outputs.double() - case.exact()).abs()
    assert bool((error <= case.allowed()).all()), (case.layout, case.shape, case.x.shape, error.max())


def run(case, bias: bool = True) -> torch.Tensor:
    outputs = compiled.linear(case.layout, case.x, [(case.tensors, case.bias if bias else None, case.shape)])
    assert outputs is not None
    return outputs[0]
