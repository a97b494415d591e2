"""Writing a pruned model: a plain Hugging Face folder with zeros in place, and ``wandapp.json`` beside the weights."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from wandapp_kernels.checkpoint.atomic import check_target, new_folder
from wandapp_kernels.checkpoint.compressed import METHOD
from wandapp_kernels.checkpoint.files import read_json
from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.models.generation_config import plain_generation_config, write_generation_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "wandapp.json"

# Zeros need no key. Loaders refuse or decompress a model whose config names one, although its weights are dense
# (vLLM does so even for a `sparsity_config` that says "dense").
_FORBIDDEN_KEYS = ("sparsity_config", "quantization_config", "compression_config")


def save_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    report: dict[str, Any],
    *,
    force: bool = False,
) -> None:
    """Write ``model`` so that ``AutoModelForCausalLM.from_pretrained(folder)`` gives its weights back bit for bit.

    The folder holds ``config.json`` (without any sparsity or quantisation key), ``model.safetensors`` or its shards
    (the same bytes for the same weights; tied weights once), the tokenizer if there is one, and ``report`` as
    ``wandapp.json``. It appears complete or not at all.

    Args:
        model: a dense model on any device.
        folder: absent, empty, or (with ``force``) to be replaced.
        report: what was done, see :func:`to_json`; an empty one is not written.

    Raises:
        CheckpointError: the folder cannot be written (:func:`~wandapp_kernels.checkpoint.atomic.check_target`), the
            disk is too full, the weights are quantised, or transformers refuses the model's configuration.
    """
    text = to_json(report)
    check_target(folder, force)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    # Ours stays on a model that from_pretrained gave and desparsify made dense again.
    if quantizer is not None and quantizer.quantization_config.quant_method != METHOD:
        raise CheckpointError(
            f"the model's weights are quantised ({quantizer.quantization_config.quant_method}) and cannot be saved as "
            "a pruned dense model; load it dequantised"
        )
    check_room_for(model, folder)
    with new_folder(folder, force=force) as partial:
        try:
            with plain_generation_config(model):
                model.save_pretrained(partial)
            write_generation_config(model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            strip_config(partial / "config.json")
            if report:
                (partial / RECORD).write_text(text, encoding="utf-8")
            share_modes(partial)
        except (OSError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the model could not be written to {folder}: {reason}") from error


def read_record(folder: str | Path) -> dict[str, Any]:
    """What ``wandapp.json`` of a folder says; nothing, with a warning, where it cannot be read as the weights can."""
    path = Path(folder) / RECORD
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except CheckpointError as error:
        warnings.warn(f"the record of how the model was pruned is left out: {error}", stacklevel=2)
        return {}


def check_room_for(model: PreTrainedModel, folder: str | Path) -> None:
    """Raise CheckpointError unless the disk of ``folder`` has room for the dense weights of ``model``."""
    check_disk_space(folder, sum(weight.numel() * weight.element_size() for weight in model.parameters()))


def check_disk_space(folder: str | Path, needed: int) -> None:
    """Raise CheckpointError unless the disk of ``folder``, which need not exist yet, has ``needed`` bytes free."""
    target = Path(folder).resolve()
    free = shutil.disk_usage(next(place for place in (target, *target.parents) if place.exists())).free
    if free < needed:
        raise CheckpointError(
            f"{folder} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; make room, or name a "
            "folder on another disk"
        )


def to_json(report: dict[str, Any]) -> str:
    """Two-space indented standard JSON with the keys in the order of ``report``.

    JSON has no NaN and no infinity: both become null. Scalars of numpy and torch become numbers, paths, types and the
    like their text.
    """
    return json.dumps(_plain(report), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def strip_config(path: Path) -> None:
    """Take every key out of a config.json that names a sparse or quantised form."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _FORBIDDEN_KEYS:
            part.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def share_modes(folder: Path) -> None:
    """Give every file the permissions config.json got from the umask; safetensors makes its files private."""
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copymode(folder / "config.json", path)
