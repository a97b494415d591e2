"""A fine-tuning from beginning to end, and what it tells afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from wandapp_kernels.data.calibration import token_hash
from wandapp_kernels.finetuning import adapters
from wandapp_kernels.finetuning.masked_lora import masked_lora
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.finetuning.targets import choose_layers
from wandapp_kernels.finetuning.training import checkpointing, train, training_mode
from wandapp_kernels.pruning.memory import PeakMemory
from wandapp_kernels.pruning.walk import Progress, device_name, versions

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTERS, MERGED = "adapters", "merged"


@dataclass
class FinetuneReport:
    """One run; ``to_dict()`` is an entry of ``finetuning`` in ``wandapp.json``.

    Attributes:
        form: ``adapters`` or ``merged``.
        settings: of `FinetuneSettings`.
        layers: full names of those that were adapted.
        trained_parameters: numbers in all A and B.
        text_hash: of the training token ids, ``[samples, seqlen]``.
        losses: mean cross-entropy in nats of every step's batch, before the step.
        seconds, peak_memory_bytes: of the training.
    """

    form: str
    settings: dict[str, Any]
    layers: list[str]
    trained_parameters: int
    text_hash: str
    samples: int
    seqlen: int
    losses: list[float]
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def finetune_layers(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    settings: FinetuneSettings,
    *,
    merge: bool,
    progress: Callable[[Progress], None] = lambda _: None,
) -> tuple[PreTrainedModel | PeftModel, FinetuneReport]:
    """Train adapters of a pruned model where it lies; torch's random state is left alone.

    When anything is raised, Ctrl-C included, the model is what it was before.

    Args:
        token_ids: int64 ``[samples, tokens]``, in the model's vocabulary and context.
        merge: train under the mask and merge (`masked_lora`); else PEFT's adapters (`adapters`).

    Returns:
        ``model`` itself, merged, or the PeftModel around it, whose adapters alone require gradients; and the report.

    Raises:
        UsageError, ModelError, NonFiniteError: see `choose_layers`, `masked_lora`, `attach` and `train`.
    """
    settings.steps(len(token_ids))
    layers = choose_layers(model, settings.targets)
    device = model.get_input_embeddings().weight.device
    assert isinstance(device, torch.device)
    memory = PeakMemory(device)
    clock, cpu_clock = time.perf_counter(), time.process_time()
    used = versions()
    training = model.training
    tuned: PreTrainedModel | PeftModel = model
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), training_mode(model):
        torch.manual_seed(settings.seed)
        if merge:
            with masked_lora(model, layers, settings) as trained, checkpointing(model, settings.gradient_checkpointing):
                losses = train(model, trained, token_ids, settings, progress)
        else:
            used["peft"] = adapters.require_peft().__version__
            tuned = adapters.attach(model, layers, settings)
            try:
                trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
                # Switched on before, PEFT would put hooks on the embeddings that only another kind of it needs.
                with checkpointing(model, settings.gradient_checkpointing):
                    losses = train(tuned, trained, token_ids, settings, progress)
            except BaseException:
                tuned.unload()
                raise
            tuned.train(training)
    if not merge:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_()
    report = FinetuneReport(
        form=MERGED if merge else ADAPTERS,
        settings=asdict(settings),
        layers=layers,
        trained_parameters=sum(parameter.numel() for parameter in trained),
        text_hash=token_hash(token_ids),
        samples=token_ids.shape[0],
        seqlen=token_ids.shape[1],
        losses=losses,
        seconds=time.perf_counter() - clock,
        cpu_seconds=time.process_time() - cpu_clock,
        peak_memory_bytes=memory.lap(),
        versions=used,
        device=device_name(device),
    )
    return tuned, report
