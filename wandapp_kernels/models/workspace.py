"""A working copy of one decoder block in fp32, in which every weight matrix is an `nn.Linear`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError, NonFiniteError
from .blocks import stacked_parameters
from .calls import call_block, map_tensors
from .experts import as_linear, linearise
from .names import matches

_STORED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROUTERS = ("gate", "router", "shared_expert_gate")
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


@dataclass(frozen=True)
class _Home:
    """Where a working parameter lives in the original block: a parameter or one expert of it, perhaps transposed."""

    parameter: nn.Parameter
    expert: int | None = None
    transposed: bool = False

    def view(self) -> torch.Tensor:
        """The stored values, shaped like the working parameter."""
        stored = self.parameter.data if self.expert is None else self.parameter.data[self.expert]
        return stored.T if self.transposed else stored


class BlockWorkspace:
    """One decoder block, copied to the compute device to be pruned there, and written back when done.

    transformers' `Conv1D` becomes `nn.Linear`, and fused experts become one `nn.Linear` per expert and matrix, so that
    all weights are ``[out, in]``. Parameters do not require gradients. Buffers (rotary frequencies) keep their dtype.
    Routers of mixtures of experts are never listed: those are no `nn.Linear`, or are named gate, router or
    shared_expert_gate and lie beside the experts.

    Args:
        block: the block in the model; untouched until `write_back`.
        name: its dotted name in the model, ``model.layers.0``.
        device: where the copy lives.
        dtype: the copy's dtype; a block stored in a wider one (fp64) keeps that.
        ignore: modules to leave as they are and unlisted, see `names.matches`.

    Attributes:
        module: the copy, in evaluation mode.
        dtype: the copy's dtype.
        linears: full name -> the `nn.Linear` in `module`, in the order of the block's modules.
        expert_names: those of the linears that belong to one expert of many and see only the tokens routed to it.

    Raises:
        ModelError: a weight is not loaded or is stored in a quantised form, or an expert layout is not understood.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        ignore: Sequence[str] = (),
    ):
        self.name = name
        self.device = torch.device(device)
        self._check_storage(block)
        self.dtype = reduce(torch.promote_types, {p.dtype for p in block.parameters()}, dtype)
        self.module = self._copy(block)
        self._homes = {own: _Home(parameter) for own, parameter in block.named_parameters()}
        self._replace_modules(ignore)
        self.linears = {
            self._full(own): module
            for own, module in self.module.named_modules()
            if isinstance(module, nn.Linear) and not self._is_router(own) and not matches(self._full(own), ignore)
        }
        self.expert_names = frozenset(full for full in self.linears if _EXPERT.search(full))
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(
        self, hidden: torch.Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> torch.Tensor:
        """Run the copy on ``hidden [B, T, H]``; returns the next hidden state ``[B, T, H]`` in the copy's dtype.

        Args:
            hidden: moved to the copy's device and dtype.
            args, kwargs: as recorded (`BlockCalls.arguments`, with its ``batch`` for B > 1); their tensors are moved to
                the device once, those of a narrower floating-point type are widened.
        """
        args, kwargs = map_tensors((tuple(args), dict(kwargs or {})), self._move)
        return call_block(self.module, hidden.to(self.device, self.dtype), args, kwargs)

    @torch.no_grad()
    def write_back(self, extra: Iterable[str] = ()) -> None:
        """Copy the weights of the linears into the model's block, in the model's dtype and layout.

        Args:
            extra: full names of further parameters to copy, such as norm weights and biases
                (``model.layers.0.input_layernorm.weight``).

        Raises:
            ModelError: the block has no parameter of that name.
            NonFiniteError: a finite weight is too large for the model's dtype; that weight is not copied.
        """
        for full in [*(f"{linear}.weight" for linear in self.linears), *extra]:
            own = full.removeprefix(f"{self.name}.")
            if own not in self._homes:
                raise ModelError(
                    f"the block {self.name} has no parameter {full}; use a name from its named_parameters()"
                )
            working, stored = self.module.get_parameter(own), self._homes[own].view()
            rounded = working.to(stored.dtype)
            lost = int(working.isfinite().sum()) - int(rounded.isfinite().sum())
            if lost > 0:
                raise NonFiniteError(
                    f"{lost} values of {full} are too large for {stored.dtype}; load the model in bfloat16 or float32"
                )
            stored.copy_(rounded)

    @torch.no_grad()
    def reload(self) -> None:
        """Set all parameters of the copy to those of the model's block as they are stored, rounding included."""
        for own, working in self.module.named_parameters():
            working.copy_(self._homes[own].view())

    def _full(self, own: str) -> str:
        return f"{self.name}.{own}"

    def _check_storage(self, block: nn.Module) -> None:
        for own, parameter in block.named_parameters():
            if parameter.is_meta:
                raise ModelError(f"the weight {self._full(own)} is not in memory; load the model without off-loading")
            if parameter.dtype not in _STORED:
                raise ModelError(
                    f"the weight {self._full(own)} is stored as {parameter.dtype}; give the model unquantised, as "
                    "float16, bfloat16 or float32"
                )

    def _copy(self, block: nn.Module) -> nn.Module:
        # deepcopy takes what is in the memo for copied: so each parameter is copied once, right where it is needed
        memo: dict[int, Any] = {}
        for parameter in block.parameters():
            values = parameter.detach().to(self.device, self.dtype, copy=True)
            memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
        for buffer in block.buffers():
            memo[id(buffer)] = buffer.detach().to(self.device, copy=True)
        return copy.deepcopy(block, memo).eval()

    def _replace_modules(self, ignore: Sequence[str]) -> None:
        for own, module in list(self.module.named_modules()):
            if matches(self._full(own), ignore):
                continue
            if isinstance(module, Conv1D):
                self.module.set_submodule(own, as_linear(module.weight.T.contiguous(), module.bias))
                self._homes[f"{own}.weight"] = _Home(self._homes[f"{own}.weight"].parameter, transposed=True)
            elif stacked_parameters(module):
                replacement, slices = linearise(module, self._full(own))
                self.module.set_submodule(own, replacement)
                for parameter, source in slices.items():
                    fused = self._homes[f"{own}.{source.name}"].parameter
                    self._homes[f"{own}.{parameter}"] = _Home(fused, source.expert, source.transposed)
                for parameter, _ in module.named_parameters():
                    self._homes[f"{own}.shell.{parameter}"] = self._homes[f"{own}.{parameter}"]
        self._homes = {own: self._homes[own] for own, _ in self.module.named_parameters()}

    def _is_router(self, own: str) -> bool:
        """Whether a linear layer, or a module that holds it, is named as a router and lies beside experts."""
        parts = own.split(".")
        for depth, part in enumerate(parts):
            if part in _ROUTERS:
                beside = self.module.get_submodule(".".join(parts[:depth]))
                if any("expert" in name for name, _ in beside.named_children() if name not in _ROUTERS):
                    return True
        return False

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._moved:
            wider = tensor.is_floating_point() and torch.promote_types(tensor.dtype, self.dtype) == self.dtype
            moved = tensor.to(self.device, self.dtype) if wider else tensor.to(self.device)
            self._moved[id(tensor)] = (tensor, moved)  # the original is kept too: its id must not be given to another
        return self._moved[id(tensor)][1]
