"""Prune one decoder block: statistics, scores, masks, repair, regional optimiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.models.names import matches
from wandapp_kernels.models.workspace import BlockWorkspace
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.latent import LatentWeights
from wandapp_kernels.pruning.masking import choose_mask
from wandapp_kernels.pruning.memory import PeakMemory
from wandapp_kernels.pruning.precision import exact_products
from wandapp_kernels.pruning.regional import RegionalGradient
from wandapp_kernels.pruning.regional_optimizer import RegionalOptimizer
from wandapp_kernels.pruning.reports import LayerReport
from wandapp_kernels.pruning.settings import PruneSettings
from wandapp_kernels.pruning.statistics import (
    GRAM,
    REGIONAL_GRADIENT,
    InputRecorder,
    LayerStatistics,
)
from wandapp_kernels.pruning.stream import Stream, batches
from wandapp_kernels.pruning.updates import UPDATES
from wandapp_kernels.sparsity import mask_from_scores, sparsity_of

# A Linear that saw less than this share of the calibration tokens has no statistics worth the name: a starved expert,
# or a weight that its module reads without calling the Linear.
STARVED_SHARE = 0.005

BlockForward = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


@dataclass
class Masks:
    """Masks of a block's Linears and what finding them cost."""

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


class BlockPruner:
    """Works on the fp32 copy of one block; the caller writes the result back.

    Args:
        workspace: the block's working copy.
        linears: its Linears to prune, by full name.
        forward: ``(hidden [B, T, H], sample indices) -> output [B, T, H]`` of the working copy.
        inputs: the block's inputs, from the pruned blocks before it.
        batch: samples a forward-only pass takes at once.
        model_gradients: name -> norm -> gradient of the dense model, for criteria that read them.
        generator: draws the regional optimiser's samples.
    """

    def __init__(
        self,
        workspace: BlockWorkspace,
        linears: Mapping[str, nn.Linear],
        forward: BlockForward,
        inputs: Stream,
        batch: int,
        settings: PruneSettings,
        model_gradients: Mapping[str, Mapping[str, torch.Tensor]],
        generator: torch.Generator,
        memory: PeakMemory,
    ):
        self._workspace, self._linears, self._forward = workspace, dict(linears), forward
        self._inputs, self._batch, self._settings = inputs, batch, settings
        self._model_gradients, self._generator, self._memory = model_gradients, generator, memory
        self._criterion = CRITERIA[settings.criterion]
        self._update = UPDATES[settings.update] if settings.update else None
        self._gradients: dict[str, torch.Tensor] = {}
        self._dense_weights: dict[str, torch.Tensor] = {}
        self.statistics: dict[str, LayerStatistics] = {}
        self.found = Masks()
        self.extra: list[str] = []
        self.loss: float | None = None
        # The dense block's outputs of the first samples, as the first pass leaves them.
        self._first_outputs: list[torch.Tensor] = []
        self._first_pass = True

    def prune(self, target: Stream | None) -> None:
        """Prune the working copy in place.

        Args:
            target: the dense block's outputs on the dense stream, or None to take them on the pruned stream.
        """
        optimizer = self._settings.optimizer
        outputs = self._inputs.empty_like() if optimizer is not None and target is None else None
        regrow = optimizer is not None and optimizer.mask == "regrow"
        recorder = self._collect(
            self._first_samples(), gradient=self._needs_gradient, repair=not regrow, outputs=outputs
        )
        self.statistics = recorder.statistics
        self._probes = recorder.probes
        # In the order they ran, which need not be that of the modules; those that were not called come last.
        self._linears = {name: self._linears[name] for name in (*self._probes, *self._linears)}
        self._dense_outputs = {
            name: nn.functional.linear(self._probes[name], linear.weight.float())
            for name, linear in self._linears.items()
            if name in self._probes
        }
        if optimizer is not None and optimizer.mask == "rechoose":
            self._dense_weights = {name: weight.detach().clone() for name, weight in self._parameters().items()}
        if not regrow:
            self._apply(self.statistics, repair=True)
        desired = target if target is not None else outputs
        if desired is not None:
            self._optimize(desired)
        if regrow:
            recompute = self._needs_gradient and self._settings.recompute_gradient
            final = self._collect(range(len(self._inputs)), gradient=recompute, repair=True)
            self._apply(final.statistics, repair=True)

    def _first_samples(self) -> range:
        """All samples; one batch where nothing is learnt from them (magnitude) and only the report wants inputs."""
        few = self._is_blind and self._settings.optimizer is None
        return range(min(self._batch, len(self._inputs)) if few else len(self._inputs))

    @property
    def _is_blind(self) -> bool:
        return not self._criterion.needs and self._update is None

    @property
    def _needs_gradient(self) -> bool:
        return REGIONAL_GRADIENT in self._criterion.needs

    def _collect(
        self,
        samples: Iterable[int],
        *,
        gradient: bool = False,
        repair: bool = False,
        outputs: Stream | None = None,
        only: str | None = None,
    ) -> InputRecorder:
        """Run the block as it is now on ``samples``; gradients one sample at a time, everything else in batches."""
        indices = list(samples)
        gram = GRAM in self._criterion.needs or (repair and self._update is not None)
        linears = self._linears if only is None else {only: self._linears[only]}
        accumulator = RegionalGradient(self._linears) if gradient else None
        with torch.no_grad(), InputRecorder(linears, gram=gram, x_norm=self._settings.x_norm) as recorder:
            for positions in batches(len(indices), 1 if gradient else self._batch):
                chosen = [indices[position] for position in positions]
                hidden = self._inputs.batch(chosen)
                if accumulator is not None:
                    output = accumulator.add(partial(self._forward, hidden, chosen))
                else:
                    output = self._forward(hidden, chosen)
                recorder.end_batch(len(chosen))
                if self._first_pass and sum(map(len, self._first_outputs)) < self._batch:
                    self._first_outputs.append(output.detach())
                if outputs is not None:
                    outputs.put(chosen, output)
        self._first_pass = False
        if accumulator is not None:
            self._gradients = accumulator.root_mean_square()
        for name, statistics in recorder.statistics.items():
            statistics.regional_gradient = self._gradients.get(name)
            statistics.model_gradient = self._model_gradients.get(name, {})
        return recorder

    def _apply(self, statistics: Mapping[str, LayerStatistics], *, repair: bool, samples: Iterable[int] = ()) -> None:
        """Score, mask and (when asked) repair every Linear of the working copy."""
        samples = list(samples) or range(len(self._inputs))
        for name, linear in self._linears.items():
            if self._settings.sequential:
                statistics = self._collect(samples, repair=repair, only=name).statistics
            start = time.perf_counter()
            with exact_products():
                try:
                    pruned = self._prune_linear(name, linear.weight.data, statistics[name], repair)
                except NonFiniteError as error:
                    raise NonFiniteError(f"{name}: {error}") from error
                linear.weight.data = pruned.to(linear.weight.dtype)
            self.found.seconds[name] = self.found.seconds.get(name, 0.0) + time.perf_counter() - start
            peak = self.found.peak_memory_bytes.get(name, 0)
            self.found.peak_memory_bytes[name] = max(peak, self._memory.lap())

    def _prune_linear(self, name: str, weight: torch.Tensor, statistics: LayerStatistics, repair: bool) -> torch.Tensor:
        settings = self._settings
        self.found.notes.pop(name, None)  # an earlier round's
        if self._is_starved(statistics) and not self._is_blind:
            total = statistics.sequences * self._inputs.tokens_per_sample
            self.found.notes[name] = f"saw {statistics.tokens} of {total} tokens: pruned by magnitude"
            self.found.masks[name] = mask_from_scores(weight.abs(), settings.pattern, settings.group)
            return weight * self.found.masks[name]
        mask = None
        joint = repair and self._update is not None and self._update.joint_criterion == settings.criterion
        if not joint:
            mask = choose_mask(
                self._criterion, weight, statistics, settings.pattern, alpha=settings.alpha, group=settings.group
            )
        if repair and self._update is not None:
            repaired = self._update.repair(weight, statistics, settings.pattern, mask)
            if repaired.warning:
                self.found.notes[name] = repaired.warning
            weight, mask = repaired.weight, repaired.mask
        assert mask is not None
        self.found.masks[name] = mask
        return weight * mask

    def _is_starved(self, statistics: LayerStatistics) -> bool:
        return statistics.tokens < STARVED_SHARE * statistics.sequences * self._inputs.tokens_per_sample

    def _reprune(self, drawn: list[int]) -> dict[str, torch.Tensor]:
        """A round's prune: ‖X‖ from its own samples, the gradient as it was taken from the dense block."""
        self._apply(self._collect(drawn).statistics, repair=False, samples=drawn)
        return self.found.masks

    def _optimize(self, desired: Stream) -> None:
        settings = self._settings.optimizer
        assert settings is not None
        extra: dict[str, nn.Parameter] = {}
        if settings.norms:
            extra = {name: p for name, p in self._workspace.module.named_parameters() if self._is_trained(name, p)}
            self.extra = list(extra)
        optimizer = RegionalOptimizer(
            settings,
            self._workspace.name,
            forward=lambda chosen: self._forward(self._inputs.batch(chosen), chosen),
            target=desired.batch,
            weights=self._parameters(),
            extra=extra.values(),
            count=len(self._inputs),
            generator=self._generator,
            latent=self._latent_weights() if settings.mask == "rechoose" else None,
        )
        self.loss = optimizer.run(self.found.masks, self._reprune)

    def _is_trained(self, name: str, parameter: nn.Parameter) -> bool:
        """Norm weights and the pruned Linears' biases; not routers, attention sinks and the like."""
        path = name.rpartition(".")[0]
        module = f"{self._workspace.name}.{path}"
        if parameter.dim() != 1 or matches(module, self._settings.ignore):
            return False
        return module in self._linears or "norm" in type(self._workspace.module.get_submodule(path)).__name__.lower()

    def _latent_weights(self) -> LatentWeights:
        """Latents scored by Wanda's ``|θ|·‖X‖``: cheap enough to repeat, whatever criterion chose the first mask."""

        def choose(name: str, theta: torch.Tensor) -> torch.Tensor:
            if self._is_starved(self.statistics[name]):
                return self.found.masks[name]
            return choose_mask(CRITERIA["wanda"], theta, self.statistics[name], self._settings.pattern)

        return LatentWeights(self._parameters(), self._dense_weights, self.found.masks, choose)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: linear.get_parameter("weight") for name, linear in self._linears.items()}

    def output_error(self, outputs: Callable[[range], torch.Tensor]) -> float:
        """``‖Y' − Y‖ / ‖Y‖`` of the block, Y its dense outputs on the first samples and Y' = ``outputs(samples)``."""
        dense = torch.cat(self._first_outputs)
        difference = outputs(range(len(dense))) - dense
        return float(difference.norm() / dense.norm().clamp_min(1e-30))

    def layer_reports(self) -> list[LayerReport]:
        """One report per Linear, from the weights the working copy holds now."""
        reports = []
        for name, linear in self._linears.items():
            error = 0.0
            if name in self._dense_outputs:  # an expert that no token reached has no probe
                dense = self._dense_outputs[name]
                difference = nn.functional.linear(self._probes[name], linear.weight.float()) - dense
                error = float(difference.norm() / dense.norm().clamp_min(1e-30))
            statistics = self.statistics[name]
            reports.append(
                LayerReport(
                    name=name,
                    shape=(linear.out_features, linear.in_features),
                    sparsity=sparsity_of(linear.weight),
                    output_error=error,
                    dead_channels=statistics.dead_channels,
                    tokens=statistics.tokens,
                    seconds=self.found.seconds[name],
                    peak_memory_bytes=self.found.peak_memory_bytes[name],
                    note=self.found.notes.get(name, ""),
                )
            )
        return reports
