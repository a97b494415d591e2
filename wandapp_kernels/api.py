"""The Python face: load, prune, fine-tune, evaluate, save, and swap dense layers for sparse ones and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from wandapp_kernels.checkpoint.save import save_pruned
from wandapp_kernels.data.calibration import TokenSet
from wandapp_kernels.errors import ModelError, UsageError
from wandapp_kernels.evaluation.perplexity import evaluate
from wandapp_kernels.evaluation.zero_shot import zero_shot
from wandapp_kernels.finetuning.finetune import FinetuneReport, finetune_layers
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.models.checks import adapter_wrappers, refuse_adapters, require_module, require_tokens
from wandapp_kernels.models.layers import check_ignored
from wandapp_kernels.models.load import LoadedModel
from wandapp_kernels.models.load import load_model as load
from wandapp_kernels.models.names import as_patterns
from wandapp_kernels.pruning.methods import build_all
from wandapp_kernels.pruning.reports import PruneReport
from wandapp_kernels.pruning.walk import Progress, prune_blocks
from wandapp_kernels.runtime.folder import save_compressed
from wandapp_kernels.runtime.sparse_linear import SparseLinear
from wandapp_kernels.runtime.swap import SwapReport, desparsify, sparse_layers, sparsify
from wandapp_kernels.runtime.swiglu import swiglu
from wandapp_kernels.sparsity import Pattern

__all__ = [
    "LoadedModel",
    "SparseLinear",
    "SwapReport",
    "desparsify",
    "evaluate",
    "finetune",
    "load",
    "prune",
    "save",
    "sparsify",
    "swiglu",
    "zero_shot",
]


def prune(
    model: nn.Module,
    calibration: torch.Tensor | TokenSet,
    method: str = "wanda++",
    sparsity: str | float | Pattern = "2:4",
    *,
    seed: int = 0,
    ignore: str | Sequence[str] = (),
    device: str | torch.device | None = None,
    progress: Callable[[Progress], None] | None = None,
    work: str | Path | None = None,
    **changes: Any,
) -> PruneReport:
    """Prune a loaded decoder-only language model in place, block by block.

    Args:
        model: a Hugging Face causal language model; only the Linears of its decoder blocks are pruned.
        calibration: integers ``[samples, tokens]``, or what ``calibration_tokens`` returns.
        method: a row of ``wandapp_kernels.pruning.methods.METHODS``.
        sparsity: ``"2:4"``, ``"4:8"``, any n:m (n of m kept) with m <= 16, or the fraction to remove of every row.
        seed: of the samples that the regional optimiser draws.
        ignore: modules that stay dense: full names, suffixes such as ``down_proj``, or ``re:`` patterns.
        device: where a block is worked on; CUDA when there is one, else the CPU.
        progress: called with a ``Progress`` after each step.
        work: folder for finished blocks. A killed run, started again with the same model (loaded anew), calibration and
            settings, goes on from there, to the same weights. Delete it when the model is saved.
        changes: to the method, see ``build_settings``: ``score``, ``update``, ``regional_optimizer``, ``preset``,
            ``optimizer={...}``, ``alpha``, ``x_norm``, ``recompute_gradient``, ``sequential``, ``self_calibration``.

    Returns:
        What was done to every layer, and what it cost.

    Raises:
        UsageError: an unknown method, an impossible sparsity, a change that the method has no use for, token ids of the
            wrong shape, range or length, a swapped model, one with adapters, something that is no module, an ``ignore``
            that is no layer's name, a ``work`` folder of another run.
        CheckpointError: the ``work`` folder cannot be used.
        ModelError: no decoder blocks, or a layout that is not understood.
        NonFiniteError: a weight, activation or gradient is NaN or infinite; names the module and the count.
    """
    require_module(model)
    if any(sparse_layers(model)):
        raise UsageError("the model's layers are compressed and cannot be pruned; call desparsify(model) first")
    refuse_adapters(model)
    ids = _token_ids(calibration, "calibration")
    names = as_patterns(ignore)
    (settings,) = build_all([method], sparsity, seed=seed, ignore=names, **changes)
    check_ignored(model, names)
    where = None if device is None else torch.device(device)
    return prune_blocks(model, ids, settings, device=where, progress=progress or (lambda _: None), work=work)


def finetune(
    model: PreTrainedModel,
    tokens: torch.Tensor | TokenSet,
    *,
    merge: bool = False,
    targets: str | Sequence[str] = FinetuneSettings.targets,
    progress: Callable[[Progress], None] | None = None,
    **recipe: Any,
) -> tuple[nn.Module, FinetuneReport]:
    """Train low-rank adapters (LoRA) of a pruned model on text, where the model lies (``model.to("cuda")`` first).

    Args:
        model: pruned, with zeros in place or swapped; in place. When anything is raised it is what it was before.
        tokens: integers ``[samples, tokens]``, or what ``calibration_tokens`` returns.
        merge: train ``W + s · mask ∘ (B A)`` and leave that in the model, its zeros where they were. Without it
            ``W x + s · B A x`` is trained: the adapters stay beside the weights (needs peft).
        targets: names of layers, as PEFT takes them, or ``"all"`` for every pruned one.
        progress: called with a ``Progress`` after each step.
        recipe: ``rank``, ``alpha``, ``dropout``, ``lr``, ``warmup``, ``batch``, ``micro_batch``, ``epochs``, ``seed``,
            ``gradient_checkpointing``: see ``FinetuneSettings``.

    Returns:
        The PeftModel around ``model`` (its ``save_pretrained`` writes the adapters), or ``model`` with ``merge``; and
        what was done.

    Raises:
        UsageError: no layer is pruned, a target is no layer's, impossible settings or token ids, a model with adapters,
            ``merge`` on a swapped model, or no peft.
        ModelError: a layer to train is float16, quantised or not in memory.
        NonFiniteError: a loss or gradient is NaN or infinite.
    """
    require_module(model)
    ids = _token_ids(tokens, "tokens")
    settings = FinetuneSettings(targets=as_patterns(targets), **recipe)
    require_tokens(model, ids, "training")
    return finetune_layers(model, ids.long(), settings, merge=merge, progress=progress or (lambda _: None))


def save(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: str | Path,
    report: PruneReport | Mapping[str, Any] | None = None,
    *,
    force: bool = False,
) -> None:
    """Write model, tokenizer and report to ``folder``: complete or not at all.

    A dense model is written with its zeros, for every tool to read; a swapped one compressed (``docs/format.md``), for
    ``load`` to read.

    Args:
        report: how the model was pruned: what ``prune`` returned or, of a model that was loaded pruned, the ``record``
            of what ``load`` returned. Without one the folder has no ``wandapp.json``.

    Raises:
        CheckpointError: the folder is not empty and ``force`` is not set, or the disk is full.
        ModelError: the model has adapters (PEFT).
        NonFiniteError: a swapped model holds NaN or infinity.
    """
    require_module(model)
    wrapped = next((name for name, _ in adapter_wrappers(model)), None)
    if wrapped is not None:
        raise ModelError(
            f"the model has adapters (at {wrapped}, for one), which a model folder cannot hold: merge them "
            "(desparsify(model), merge_and_unload()), or save them on their own and take them off (unload())"
        )
    write = save_compressed if any(sparse_layers(model)) else save_pruned
    record = report.to_dict() if isinstance(report, PruneReport) else dict(report or {})
    write(model, tokenizer, Path(folder), record, force=force)


def _token_ids(given: torch.Tensor | TokenSet, what: str) -> torch.Tensor:
    if isinstance(given, str):
        raise UsageError(
            f"{what} is the text {given!r}, but must be token ids; data.calibration.calibration_tokens makes them from "
            "a text source"
        )
    return given.ids if isinstance(given, TokenSet) else torch.as_tensor(given, device="cpu")
