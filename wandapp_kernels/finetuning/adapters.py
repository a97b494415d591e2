"""LoRA adapters beside the sparse weights: PEFT's own, in PEFT's own folders."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from wandapp_kernels.checkpoint.atomic import new_folder
from wandapp_kernels.checkpoint.save import RECORD, to_json
from wandapp_kernels.errors import CheckpointError, ModelError, UsageError
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.models.checks import adapter_wrappers

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def require_peft() -> Any:
    """The package, or a UsageError that names what to install."""
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            'adapters need peft: pip install "wandapp_kernels[peft]" (merging them into the weights does not)'
        ) from error
    return peft


def attach(model: nn.Module, layers: Sequence[str], settings: FinetuneSettings) -> PeftModel:
    """Put PEFT's LoRA around the layers, in place; only the adapters require gradients afterwards.

    ``y = W x + s · B A dropout(x)``, A and B in fp32 whatever the type of W.

    Raises:
        UsageError: peft is not installed.
    """
    peft = require_peft()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        # Other readers of the folder take whole numbers only.
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in layers),
    )
    with _quiet_peft():
        return peft.get_peft_model(model, config)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # It asks transformers for things by names that newer versions warn of.
        warnings.simplefilter("ignore", FutureWarning)
        # Said of a Conv1D's adapters on the SparseLinear that stands for it; it takes them all the same.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
        yield


def save_adapters(
    tuned: PeftModel, folder: str | Path, record: dict[str, Any], *, base: str | None = None, force: bool = False
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and the record: complete or not at all.

    Args:
        record: written as ``wandapp.json``.
        base: name of the pruned model, for ``AutoPeftModelForCausalLM``; None leaves what PEFT found.

    Raises:
        CheckpointError: the folder cannot be written, or is not empty and ``force`` is not set.
    """
    if base is not None:
        tuned.peft_config[tuned.active_adapter].base_model_name_or_path = base
    with new_folder(folder, force=force) as partial:
        try:
            # The embeddings are the pruned model's; to find out whether they changed PEFT would ask the hub.
            tuned.save_pretrained(str(partial), save_embedding_layers=False)
            (partial / "README.md").unlink(missing_ok=True)  # an empty form
            config = json.loads((partial / CONFIG).read_text(encoding="utf-8"))
            if isinstance(config["target_modules"], list):  # a set in PEFT, in an order that changes from run to run
                config["target_modules"].sort()
            (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            (partial / RECORD).write_text(to_json(record), encoding="utf-8")
            shutil.copymode(partial / CONFIG, partial / WEIGHTS)  # safetensors makes its files private
        except OSError as error:
            raise CheckpointError(f"the adapters could not be written to {folder}: {error}") from error


def check_adapters(folder: str | Path) -> None:
    """Raise what `add_adapters` would of a folder that holds no adapters, or without peft."""
    require_peft()
    for name in (CONFIG, WEIGHTS):  # without the folder PEFT would ask the hub, without the file it reads pickles
        if not (Path(folder) / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; give a folder that wandapp finetune or PEFT wrote")


def add_adapters(model: nn.Module, folder: str | Path) -> None:
    """Put the adapters of a PEFT folder around the layers of a model, in place, for inference.

    Raises:
        UsageError: peft is not installed, or the model has adapters already.
        CheckpointError: the folder is no PEFT folder with safetensors.
        ModelError: the adapters do not fit the model.
    """
    check_adapters(folder)
    if any(adapter_wrappers(model)):
        raise UsageError("the model has adapters already; merge them or take them off (unload()) first")
    training = model.training
    try:
        with _quiet_peft():
            # PEFT goes on with fresh adapters where the folder lacks some.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            require_peft().PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # whatever PEFT makes of files written by others
        reason = " ".join(str(error).split())
        raise ModelError(f"the adapters of {folder} do not fit the model ({reason}); give those made for it") from error
    model.train(training)
