"""What a calibration pass leaves behind for each Linear: input norms, second moments, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.ops.running_statistics import add_channel_squares
from wandapp_kernels.pruning.precision import exact_products

NORM = "norm"
GRAM = "gram"
REGIONAL_GRADIENT = "regional_gradient"
MODEL_GRADIENT_L1 = "model_gradient_l1"
MODEL_GRADIENT_L2 = "model_gradient_l2"

# Tokens kept per Linear to measure its output error after pruning.
PROBE_TOKENS = 256


@dataclass
class LayerStatistics:
    """Statistics of one Linear with weight ``[out, in]``, all fp32.

    Attributes:
        sum_squares: ``[in]``, sum over all calibration tokens of ``x_j**2``.
        gram: ``[in, in]``, sum over tokens of ``x xᵀ``; shared by layers that read the same input.
        regional_gradient: ``[out, in]``, root mean square over samples of the gradient of the block output's L2 norm.
        model_gradient: norm name -> ``[out, in]``, gradients of the dense model's loss (GBLM, Pruner-Zero).
        tokens: rows of input seen; for a routed expert only the tokens that reached it.
        sequences: calibration samples run.
        x_norm: ``"sum"`` for ``sqrt(sum x²)``, ``"mean"`` for ``sqrt(sum x² / sequences)``.
    """

    sum_squares: torch.Tensor
    gram: torch.Tensor | None = None
    regional_gradient: torch.Tensor | None = None
    model_gradient: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    x_norm: str = "sum"

    def norm(self, convention: str | None = None) -> torch.Tensor:
        """``‖X_j‖₂`` as ``[in]``. Wanda's code divides by the number of sequences first, the Wanda++ page does not."""
        if (convention or self.x_norm) == "mean":
            return (self.sum_squares / max(self.sequences, 1)).sqrt()
        return self.sum_squares.sqrt()

    @property
    def dead_channels(self) -> int:
        """Input channels that were zero in every calibration token."""
        return int((self.sum_squares == 0).sum())


class InputRecorder:
    """Context manager: forward hooks that accumulate input statistics of a block's Linears.

    Layers fed the same tensor (q/k/v, gate/up) share one accumulator, so each input is read once.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], *, gram: bool = False, x_norm: str = "sum"):
        self.statistics = {
            name: LayerStatistics(
                torch.zeros(linear.in_features, dtype=torch.float32, device=linear.weight.device), x_norm=x_norm
            )
            for name, linear in linears.items()
        }
        self.probes: dict[str, torch.Tensor] = {}
        self._linears = linears
        self._gram = gram
        self._probing = True
        self._leaders: dict[str, str] = {}
        self._seen: list[tuple[str, torch.Tensor]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> InputRecorder:
        for name, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        for name, leader in self._leaders.items():
            own, first = self.statistics[name], self.statistics[leader]
            own.sum_squares, own.gram, own.tokens = first.sum_squares, first.gram, first.tokens
        if exception[0] is None:
            self._check_finite()

    def end_batch(self, sequences: int) -> None:
        """Call after each forward. The first one learns which layers share an input."""
        for statistics in self.statistics.values():
            statistics.sequences += sequences
        self._seen.clear()
        self._probing = False

    def _hook(self, name: str):
        def record(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if name in self._leaders:
                return
            x = arguments[0].detach()
            if self._probing:
                leader = next((n for n, seen in self._seen if seen is arguments[0]), None)
                if leader is not None:
                    self._leaders[name], self.probes[name] = leader, self.probes[leader]
                    return
                self._seen.append((name, arguments[0]))
            if name not in self.probes:  # an expert may get its first tokens long after the first batch
                self.probes[name] = x.reshape(-1, x.shape[-1])[:PROBE_TOKENS].to(torch.float32, copy=True)
            self._accumulate(self.statistics[name], x.reshape(-1, x.shape[-1]))

        return record

    def _accumulate(self, statistics: LayerStatistics, rows: torch.Tensor) -> None:
        statistics.tokens += rows.shape[0]
        if not self._gram:
            add_channel_squares(rows, statistics.sum_squares)
            return
        rows = rows.float()
        if statistics.gram is None:
            statistics.gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32, device=rows.device)
        with exact_products():
            statistics.gram.addmm_(rows.T, rows)
        statistics.sum_squares = statistics.gram.diagonal()

    def _check_finite(self) -> None:
        for name, statistics in self.statistics.items():
            bad = int((~torch.isfinite(statistics.sum_squares)).sum())
            if bad:
                raise NonFiniteError(
                    f"{bad} of {len(statistics.sum_squares)} input channels of {name} are NaN or infinite on the "
                    "calibration text; check the model in its original precision or calibrate with other text"
                )


def check_weights_finite(linears: Mapping[str, nn.Linear]) -> None:
    """Raises NonFiniteError naming the first Linear with NaN or infinite weights."""
    for name, linear in linears.items():
        bad = int((~torch.isfinite(linear.weight)).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} of {linear.weight.numel()} weights of {name} are NaN or infinite; the checkpoint is damaged"
            )
