"""Linear layers that stay dense, the output head first of all, on the fastest dense kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from wandapp_kernels import dispatch
from wandapp_kernels.backends import DENSE, Call, Problem, backends_of
from wandapp_kernels.checkpoint.format import DTYPES
from wandapp_kernels.ops.linears import linears, traced_without_gradients
from wandapp_kernels.runtime.choice import TUNED_TOKENS
from wandapp_kernels.runtime.kernel_linear import KernelLinear


class DenseLinear(KernelLinear):
    """An ``nn.Linear`` that lets dispatch choose the product; the Parameters are the original's, tied ones stay tied.

    Tracing, modes, transforms, gradients and autocast get ``nn.functional.linear``, and so do a weight or a bias of
    another shape than the layer's; but what ``torch.compile`` makes of a 16-bit layer on the CPU, without gradients,
    calls the kernel (`ops.linears`). Made by `use_dense_kernels`, which changes the class of a layer in place.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self._parameters.get("weight")
        if type(weight) is nn.Parameter and not (weight.requires_grad and torch.is_grad_enabled()):
            y = self._run_kernel(input)
            if y is not None:
                return y
            # At 32 bit dispatch takes torch's product, which the compiler can fuse, unless it measured otherwise.
            if weight.dtype.itemsize == 2 and traced_without_gradients(input, weight) and self._fit(weight, self.bias):
                return linears(input, [([weight], self.bias, self.out_features)], self.in_features, "", DENSE)[0]
        return super().forward(input)

    def _weight_tensors(self) -> Sequence[torch.Tensor]:
        weight = self._parameters.get("weight")
        return (self.weight if weight is None else weight,)

    def _fit(self, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
        # Kernels go by the sizes of the layer, torch by those of the tensors.
        rows, columns = self.out_features, self.in_features
        return weight.shape == (rows, columns) and weight.numel() > 0 and (bias is None or bias.shape == (rows,))

    def _find_call(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Call | None:
        if not self._fit(tensors[0], bias):
            return None
        shape = (self.out_features, self.in_features)
        problem = dispatch.problem_for(*shape, DENSE, x.numel() // x.shape[-1], x.dtype, x.device)
        return dispatch.choose_dense(problem).bind(tensors, bias, shape, None)

    def problems(self) -> list[Problem]:
        """What is measured for this layer; nothing where torch's product is the only one."""
        weight = self.weight
        if weight.is_meta or weight.dtype not in DTYPES or not self._fit(weight, self.bias):
            return []
        shape, kind = (self.out_features, self.in_features), (weight.dtype, weight.device)
        asked = [dispatch.problem_for(*shape, DENSE, tokens, *kind) for tokens in TUNED_TOKENS]
        takers = [backend for backend in backends_of(DENSE) if backend.supports(asked[0]) is None]
        return asked if len(takers) > 1 else []


def use_dense_kernels(model: nn.Module) -> list[str]:
    """Make every plain ``nn.Linear`` of the model a `DenseLinear`, in place; returns their names."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        model.get_submodule(name).__class__ = DenseLinear
    return names


def tune_dense_kernels(model: nn.Module) -> None:
    """Measure, once for each shape, the kernels that could run the `DenseLinear` of the model."""
    dispatch.tune(
        problem for layer in model.modules() if isinstance(layer, DenseLinear) for problem in layer.problems()
    )


def use_torch(model: nn.Module) -> None:
    """Undo `use_dense_kernels`."""
    for module in model.modules():
        if isinstance(module, DenseLinear):
            module.forget_calls()
            module.__class__ = nn.Linear  # type: ignore[assignment]
