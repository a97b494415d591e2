"""Linear layers that stay dense, the output head first of all, on the fastest dense kernel."""

from __future__ import annotations

import torch
from torch import nn

from wandapp_kernels import dispatch
from wandapp_kernels.backends import BACKENDS, DENSE, Backend, backends_of, token_bucket
from wandapp_kernels.ops.operator import is_plain

_HALF = (torch.float16, torch.bfloat16)


class DenseLinear(nn.Linear):
    """An ``nn.Linear`` that lets dispatch choose the product; the Parameters are the original's, tied ones stay tied.

    Tracing, modes, transforms, gradients and autocast get ``nn.functional.linear``. Made by `use_dense_kernels`, which
    changes the class of a layer in place.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if (
            not is_plain(input, self.bias)
            or type(weight) is not nn.Parameter
            or (torch.is_grad_enabled() and weight.requires_grad)
            or input.dtype != weight.dtype
            or input.shape[-1] != self.in_features
            or not input.numel()
        ):
            return super().forward(input)
        x = input.reshape(-1, self.in_features).contiguous()
        backend = self._backend(x)
        if backend.name == DENSE:
            return super().forward(input)
        y = backend.run(x, [weight.detach()], self.bias, (self.out_features, self.in_features), None)
        return y.view(*input.shape[:-1], self.out_features)

    def _backend(self, x: torch.Tensor) -> Backend:
        key = (token_bucket(x.shape[0]), x.dtype, x.device, torch.get_num_threads())
        known: dict[object, Backend] = self.__dict__.setdefault("_chosen", {})
        if key not in known:
            problem = dispatch.problem_for(self.out_features, self.in_features, DENSE, x.shape[0], x.dtype, x.device)
            known[key] = _preferred(problem)
        return known[key]


def _preferred(problem: dispatch.Problem) -> Backend:
    """The fastest measured; else, at 16 bit, the first dense kernel of ours that is meant for so few tokens."""
    if dispatch.explain(problem).times_us or problem.dtype not in _HALF:
        return dispatch.choose(problem, DENSE)
    for backend in backends_of(DENSE):
        few = token_bucket(problem.tokens) <= backend.default_tokens
        if backend.name != DENSE and few and backend.supports(problem) is None:
            return backend
    return BACKENDS[DENSE]


def use_dense_kernels(model: nn.Module) -> list[str]:
    """Make every plain ``nn.Linear`` of the model a `DenseLinear`, in place; returns their names."""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in names:
        model.get_submodule(name).__class__ = DenseLinear
    return names


def use_torch(model: nn.Module) -> None:
    """Undo `use_dense_kernels`."""
    for module in model.modules():
        if isinstance(module, DenseLinear):
            module.__dict__.pop("_chosen", None)
            module.__class__ = nn.Linear  # type: ignore[assignment]
