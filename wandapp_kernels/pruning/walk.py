"""The walk: prune a model block by block, holding one block and its activations.

For every decoder block: capture inputs → collect statistics → score → mask → (update) → (regional optimiser) → write
the block → feed its PRUNED output to the next block.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

import wandapp_kernels
from wandapp_kernels.data.calibration import token_hash
from wandapp_kernels.errors import ModelError, NonFiniteError
from wandapp_kernels.models.blocks import Decoder, find_decoder
from wandapp_kernels.models.capture import BlockCalls, capture
from wandapp_kernels.models.checks import require_tokens
from wandapp_kernels.models.experts import run_in_float64
from wandapp_kernels.models.inference import leave_inference_mode
from wandapp_kernels.models.workspace import BlockWorkspace
from wandapp_kernels.pruning.block import BlockForward, BlockPruner
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.finished_blocks import Finished, FinishedBlocks, Times, checksum
from wandapp_kernels.pruning.memory import PeakMemory
from wandapp_kernels.pruning.model_gradients import ModelGradients
from wandapp_kernels.pruning.precision import fast_products
from wandapp_kernels.pruning.reports import BlockReport, PruneReport
from wandapp_kernels.pruning.self_calibration import self_calibration
from wandapp_kernels.pruning.settings import PruneSettings, recorded_settings
from wandapp_kernels.pruning.statistics import MODEL_GRADIENT_L1, MODEL_GRADIENT_L2, check_weights_finite
from wandapp_kernels.pruning.stream import Stream, batches

# Tokens of a forward-only pass; enough to keep the matrix products efficient, few enough for a laptop.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Progress:
    """Where the walk is.

    Attributes:
        stage: ``writing`` (self-calibration), ``gradients`` (of the whole model) or ``block``; while tasks run, their
            names.
        loss: the regional optimiser's, when there is one.
    """

    stage: str
    done: int
    total: int
    loss: float | None = None


@torch.inference_mode(False)  # methods with gradients switch them on, which has no effect in it
def prune_blocks(
    model: nn.Module,
    token_ids: torch.Tensor,
    settings: PruneSettings,
    *,
    device: torch.device | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    work: str | Path | None = None,
) -> PruneReport:
    """Prune ``model`` in place, also in a caller's ``torch.no_grad()`` or ``torch.inference_mode()``.

    A model that was made in inference mode has plain Parameters afterwards.

    Args:
        model: a decoder-only causal language model; its weights stay where they are, one block at a time is worked on.
        token_ids: calibration tokens, integers ``[samples, tokens]``.
        device: where a block is worked on; CUDA when there is one, else the CPU.
        work: folder that keeps finished blocks. One of the same run is gone on with, to the same weights; it is left.

    Raises:
        CheckpointError, UsageError: the work folder cannot be used, or is that of another run.
        UsageError: the tokens are none of the model's, see `require_tokens`.
        ModelError, NonFiniteError: see ``find_decoder`` and ``statistics``; the model is then partly pruned.
    """
    start = Times.now()

    def elapsed() -> Times:
        return Times.now() - start

    require_tokens(model, token_ids)
    token_ids = token_ids.long().clone()  # those of inference mode cannot be saved for a gradient
    leave_inference_mode(model)
    run_in_float64(model)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = find_decoder(model)
    memory = PeakMemory(device)
    report = _empty_report(settings, token_ids, device)
    if settings.self_calibration or _gradient_norms(settings):
        _check_finite(model)  # the whole model runs: it could only tell that, not where
    finished = FinishedBlocks(work, report, model, decoder.blocks) if work is not None else None
    missing = math.ceil((settings.self_calibration - token_ids.numel()) / token_ids.shape[1])
    if missing > 0:
        written = finished.written() if finished is not None else None
        if written is None:
            written = self_calibration(model, token_ids, missing, seed=settings.seed, device=device)
            if finished is not None:
                finished.store_written(written)
        token_ids = torch.cat([token_ids, written])
        report.written_samples = missing
        progress(Progress("writing", missing, missing))
    gradients = _dense_gradients(model, decoder, token_ids, settings, device, progress)
    calls = capture(model, decoder, token_ids)
    walk = _Walk(decoder, calls, settings, device, memory, gradients)
    report.peak_memory_bytes = memory.lap()
    before = Times()  # of earlier attempts
    going_on = True
    for index in range(len(decoder.blocks)):
        there = finished.load(index) if finished is not None and going_on else None
        going_on = there is not None
        with fast_products(device):
            if there is not None:
                block, before = walk.skip(index, there), there.times
            else:
                dense = checksum(decoder.blocks[index].parameters()) if finished is not None else 0
                block = walk.step(index)
                if finished is not None:
                    finished.store(index, dense, block, walk.generator, before + elapsed())
        report.blocks.append(block)
        report.warnings += [f"{layer.name}: {layer.note}" for layer in block.layers if layer.note]
        progress(Progress("block", index + 1, len(decoder.blocks), block.loss))
    if not any(block.layers for block in report.blocks):
        raise ModelError("no Linear was pruned: every one matches --ignore")
    total = before + elapsed()
    report.seconds, report.cpu_seconds = total.seconds, total.cpu_seconds
    report.summarise()
    return report


class _Walk:
    """The state carried from block to block: the pruned stream, and the dense one when the optimiser aims at it."""

    def __init__(
        self,
        decoder: Decoder,
        calls: BlockCalls,
        settings: PruneSettings,
        device: torch.device,
        memory: PeakMemory,
        gradients: ModelGradients | None,
    ):
        self._decoder, self._calls, self._settings = decoder, calls, settings
        self._device, self._memory, self._gradients = device, memory, gradients
        self._pruned = Stream(calls.hidden, device)
        wants_dense = settings.optimizer is not None and settings.optimizer.target == "dense"
        self._dense = Stream(calls.hidden, device) if wants_dense else None
        calls.hidden = []  # the streams hold it now, and let go of it after the first block
        self.generator = torch.Generator().manual_seed(settings.seed)
        together = max(BATCH_TOKENS // self._pruned.tokens_per_sample, 1)
        self._shared = calls.shared()
        self._batch = together if self._shared else 1

    def skip(self, index: int, finished: Finished) -> BlockReport:
        """Take over block ``index`` as it was pruned before, and move the streams past it."""
        workspace, forward = self._open(index)
        with torch.no_grad():
            if self._dense is not None:
                self._advance(self._dense, forward, workspace.name)
            finished.restore(self._decoder.blocks[index], self.generator, workspace.name)
            workspace.reload()
            self._advance(self._pruned, forward, workspace.name)
        return finished.report

    def step(self, index: int) -> BlockReport:
        """Prune block ``index`` and move the streams past it."""
        start = time.perf_counter()
        workspace, forward = self._open(index)
        name, linears = workspace.name, workspace.linears
        check_weights_finite(linears)
        if self._dense is not None:
            with torch.no_grad():
                self._advance(self._dense, forward, name)
        pruner = BlockPruner(
            workspace,
            linears,
            forward,
            self._pruned,
            self._batch,
            self._settings,
            self._gradients.of_block(index, self._device) if self._gradients else {},
            self.generator,
            self._memory,
        )
        if linears:
            pruner.prune(self._dense)
        workspace.write_back(pruner.extra)
        workspace.reload()
        layers = pruner.layer_reports() if linears else []
        with torch.no_grad():
            self._advance(self._pruned, forward, name)
        peak = max([self._memory.lap(), *(layer.peak_memory_bytes for layer in layers)])
        return BlockReport(
            name=name,
            output_error=pruner.output_error(self._pruned.batch) if linears else 0.0,
            loss=pruner.loss,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=peak,
            layers=layers,
        )

    def _open(self, index: int) -> tuple[BlockWorkspace, BlockForward]:
        """A working copy of block ``index``, and how it is run."""
        name = self._decoder.block_name(index)
        workspace = BlockWorkspace(self._decoder.blocks[index], name, self._device, ignore=self._settings.ignore)

        def forward(hidden: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
            if self._shared or len(samples) == 1:
                return workspace.run(hidden, *self._calls.arguments(index, samples[0], len(samples)))
            alone = zip(hidden.split(1), samples, strict=True)
            return torch.cat([workspace.run(one, *self._calls.arguments(index, sample)) for one, sample in alone])

        return workspace, forward

    def _advance(self, stream: Stream, forward: Callable, name: str) -> None:
        for chosen in batches(len(stream), self._batch):
            output = forward(stream.batch(chosen), chosen).to(stream.dtype)
            bad = output.numel() - int(torch.isfinite(output).sum())
            if bad:
                raise NonFiniteError(
                    f"{bad} of {output.numel()} outputs of {name} are NaN or infinite in {stream.dtype}; check its "
                    "biases and norm weights, or load the model in float32"
                )
            stream.put(chosen, output)


def _dense_gradients(
    model: nn.Module,
    decoder: Decoder,
    token_ids: torch.Tensor,
    settings: PruneSettings,
    device: torch.device,
    progress: Callable[[Progress], None],
) -> ModelGradients | None:
    norms = _gradient_norms(settings)
    if not norms:
        return None
    gradients = ModelGradients(decoder, norms, settings.ignore)
    gradients.collect(model, token_ids, device, lambda done, total: progress(Progress("gradients", done, total)))
    return gradients


def _gradient_norms(settings: PruneSettings) -> frozenset[str]:
    return CRITERIA[settings.criterion].needs & {MODEL_GRADIENT_L1, MODEL_GRADIENT_L2}


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        bad = parameter.numel() - int(torch.isfinite(parameter).sum())
        if bad:
            raise NonFiniteError(
                f"{bad} of {parameter.numel()} values of {name} are NaN or infinite; the checkpoint is damaged"
            )


def _empty_report(settings: PruneSettings, token_ids: torch.Tensor, device: torch.device) -> PruneReport:
    return PruneReport(
        method=settings.method,
        sparsity=str(settings.pattern),
        settings=recorded_settings(settings),
        seed=settings.seed,
        text_hash=token_hash(token_ids),
        samples=token_ids.shape[0],
        seqlen=token_ids.shape[1],
        versions=versions(),
        device=device_name(device),
    )


def versions() -> dict[str, str]:
    """Versions that decide a result."""
    return {
        "wandapp_kernels": wandapp_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The device as a person would name it, with the threads that count on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{platform.processor() or platform.machine()} CPU"
