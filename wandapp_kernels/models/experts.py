"""Experts stored as one 3-D weight, taken apart into one `nn.Linear` per expert and matrix.

transformers 5 keeps the E experts of a block in two parameters, ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``
(some models transposed, with biases ``[E, 2I]`` and ``[E, H]``, or ungated with ``up_proj [E, I, H]``). Token t gets

    y_t = Σ_k  g_tk · down_e(gate(gate_up_e(x_t))),   e = index_tk,   gate([a, b]) = act(a) · b

Pruning scores, statistics and masks are per matrix, and an expert sees its own tokens only: hence Linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError
from .blocks import stacked_parameters

_TOLERANCE = 1e-4  # relative, fp32


class LinearExperts(nn.Module):
    """The experts ``"0"``, ``"1"``, … called one after the other on the tokens routed to them.

    Each is a dict of its Linears: ``gate_up_proj`` (``up_proj`` when ungated) and ``down_proj``.
    ``forward(hidden [T, H], index [T, k], weights [T, k]) -> [T, H]`` equals that of the module it was made from. An
    expert without tokens is not called.
    """

    shell: Any  # the module they were taken from, without its stacked weights: activation, norm

    def __init__(self, experts: list[nn.ModuleDict], shell: nn.Module, up: str):
        super().__init__()
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.shell = shell
        self.count = len(experts)
        self.up = up

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for number in range(self.count):
            token, slot = torch.where(index == number)
            if token.numel() == 0:
                continue
            expert: Any = self.get_submodule(str(number))
            result = expert["down_proj"](self._activate(expert[self.up](hidden[token])))
            if getattr(self.shell, "has_post_expert_norm", False):
                result = self.shell.post_expert_norm(result)
            result = result * weights[token, slot, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output

    def _activate(self, inner: torch.Tensor) -> torch.Tensor:
        if self.up == "up_proj":
            return self.shell.act_fn(inner)
        if hasattr(self.shell, "_apply_gate"):
            return self.shell._apply_gate(inner)
        gate, up = inner.chunk(2, dim=-1)
        return self.shell.act_fn(gate) * up


@dataclass(frozen=True)
class Slice:
    """Where a parameter of a `LinearExperts` was taken from: row ``expert`` of the parameter ``name``."""

    name: str
    expert: int
    transposed: bool


@torch.no_grad()
def linearise(experts: nn.Module, name: str) -> tuple[LinearExperts, dict[str, Slice]]:
    """Take a module of fused experts apart.

    The weights of the Linears are views of the fused ones where those are stored ``[out, in]``, else copies; the fused
    parameters are removed from ``experts``, of which the rest is kept as the replacement's ``shell``.

    Args:
        experts: the module that holds the 3-D weights, in fp32; changed.
        name: its dotted name, for messages.

    Returns:
        The replacement, and for each of its parameters (``"3.down_proj.weight"``) the slice it came from.

    Raises:
        ModelError: the layout is not known, or on random tokens that reach every expert the replacement's output
            differs from the original's by more than 1e-4 of its largest value.
    """
    stacked = stacked_parameters(experts)
    up = "gate_up_proj" if "gate_up_proj" in stacked else "up_proj"
    if set(stacked) != {up, "down_proj"}:
        raise ModelError(_unknown(experts, name, f"its 3-D weights are {', '.join(sorted(stacked))}"))
    transposed = _is_transposed(experts, stacked[up], stacked["down_proj"])

    slices: dict[str, Slice] = {}
    taken: list[nn.ModuleDict] = []
    for index in range(len(stacked[up])):
        linears = nn.ModuleDict()
        for matrix in (up, "down_proj"):
            bias = getattr(experts, f"{matrix}_bias", None)
            weight = stacked[matrix][index]
            linears[matrix] = as_linear(
                weight.T.contiguous() if transposed else weight, None if bias is None else bias[index]
            )
            slices[f"{index}.{matrix}.weight"] = Slice(matrix, index, transposed)
            if bias is not None:
                slices[f"{index}.{matrix}.bias"] = Slice(f"{matrix}_bias", index, False)
        taken.append(linears)
    replacement = LinearExperts(taken, experts, up)
    _verify(experts, replacement, name)

    for matrix in (up, "down_proj"):
        for parameter in (matrix, f"{matrix}_bias"):
            experts._parameters.pop(parameter, None)
    return replacement, slices


def run_in_float64(model: nn.Module) -> None:
    """Let fused experts in fp64 be called one after the other: torch's grouped product, the default, takes no fp64."""
    wide = (p for module in model.modules() for p in stacked_parameters(module).values() if p.dtype == torch.float64)
    grouped = getattr(getattr(model, "config", None), "_experts_implementation", None) == "grouped_mm"
    if grouped and isinstance(model, PreTrainedModel) and next(wide, None) is not None:
        model.set_experts_implementation("eager")


def as_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """An `nn.Linear` around ``weight [out, in]`` and ``bias [out]``, without copying them."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _is_transposed(experts: nn.Module, up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether matrices are stored ``[in, out]``: as the class says, else as the shapes fit."""
    if hasattr(experts, "is_transposed"):
        return bool(experts.is_transposed)
    return up.shape[2] != down.shape[1]


def _verify(experts: Any, replacement: LinearExperts, name: str) -> None:
    weight = replacement.get_parameter(f"0.{replacement.up}.weight")
    count, device, dtype = replacement.count, weight.device, weight.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * count, weight.shape[1], generator=generator, device="cpu").to(device, dtype)
    weights = torch.rand(2 * count, 2, generator=generator, device="cpu").to(device, dtype)
    token = torch.arange(2 * count, device=device)
    index = torch.stack((token % count, (token + 1) % count), dim=1)
    if hasattr(experts, "config"):
        # the fast implementations take no fp32 on every device; the block's own copy of the config is changed
        experts.config._experts_implementation = "eager"
    try:
        expected = experts(hidden, index, weights)
        difference = float((replacement(hidden, index, weights) - expected).abs().max())
    except Exception as error:  # whatever an unknown module may raise when called in this way
        raise ModelError(_unknown(experts, name, f"{type(error).__name__}: {error}")) from error
    # weights that are not finite are reported where they are read, with their own name
    tolerance = max(_TOLERANCE, 8 * torch.finfo(dtype).eps) * float(expected.abs().max())
    if expected.isfinite().all() and not difference <= tolerance:
        raise ModelError(_unknown(experts, name, f"taken apart its output differs by {difference:.2g}"))


def _unknown(experts: nn.Module, name: str, why: str) -> str:
    return (
        f"the expert layout of {type(experts).__name__} ({name}) is not understood ({why}); "
        "exclude it with --ignore or open an issue"
    )
