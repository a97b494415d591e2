"""Loading a causal language model: from a local folder, from the model hub, or one that ships inside a package."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from wandapp_kernels.checkpoint.compressed import is_compressed
from wandapp_kernels.checkpoint.files import INDEX, WEIGHTS, homes
from wandapp_kernels.checkpoint.format import DTYPE_NAMES
from wandapp_kernels.checkpoint.save import read_record
from wandapp_kernels.errors import ModelError, UsageError, WandappError
from wandapp_kernels.models.bundled import BUNDLED, bundled_folder, quiet_transformers
from wandapp_kernels.models.experts import run_in_float64

_PICKLED = ("*.bin", "*.pt", "*.pth")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.tiktoken", "tekken.json", "spiece.model", "sentencepiece*.model")


@dataclass(frozen=True)
class LoadedModel:
    """What `load_model` returns.

    `model` is in eval mode on the CPU; `tokenizer` is None where the folder has none or none was asked for; `name` is
    what the user gave; `folder` holds the files (None for a model of the hub).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    folder: Path | None

    @property
    def record(self) -> dict[str, Any]:
        """How the model was pruned, as ``wandapp.json`` of its folder says now; empty without one."""
        return {} if self.folder is None else read_record(self.folder)


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    tokenizer: bool = True,
) -> LoadedModel:
    """Load a decoder-only language model from safetensors, refusing whatever would not be the model it claims to be.

    A compressed folder (``docs/format.md``) gives a model whose linears are `runtime.SparseLinear`.

    `name` is looked up in this order: a bundled model (`BUNDLED`), a local folder, an id of the model hub. Code that
    comes with a checkpoint is never run and pickled weights are never read.

    Args:
        name: "smollm2-135m", "path/to/folder", "organisation/model"; a ``pathlib.Path`` is always a folder.
        dtype: "auto" keeps the checkpoint's type; otherwise float16, bfloat16, float32 or float64, by name or as a
            torch.dtype.
        revision: branch, tag or commit of a hub model.
        tokenizer: whether to load the tokenizer too.

    Raises:
        UsageError: `name` is empty, `dtype` is not one of the above, or `revision` is given for a local model.
        ModelError: the model is absent, unreachable, incomplete, unreadable, quantised, an adapter, an encoder or an
            encoder-decoder.
        CheckpointError: a compressed folder is not what it claims to be.
    """
    if not isinstance(name, str):
        name = os.path.abspath(Path(name).expanduser())  # which is neither a bundled name nor an id
    if not name.strip():
        raise UsageError(f"the model's name is empty; {_choices()}")
    wanted = _torch_dtype(dtype)
    folder = _local_folder(name)
    if folder is not None and revision is not None:
        raise UsageError(f"a revision is only meaningful for a model of the hub, but {name} is on this machine")
    # transformers gets the files' place only, so that a folder can never lead to a download.
    source = name if folder is None else str(folder)
    where: dict[str, Any] = {"trust_remote_code": False}
    where |= {"revision": revision} if folder is None else {"local_files_only": True}

    with quiet_transformers(progress=folder is None):
        config = _config(name, source, folder, where)
        _require_decoder_only(name, config)
        if is_compressed(config.to_dict()):
            model = _compressed_model(name, folder, config, wanted)
        else:
            _require_unquantised(name, config)
            if folder is not None:
                _require_weights(name, folder, config)
            model = _model(name, source, folder, config, wanted, where)
        run_in_float64(model)
        words = _tokenizer(name, source, folder, config, where) if tokenizer else None
    return LoadedModel(model.eval(), words, name, folder)


def _torch_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto":
        return "auto"
    chosen = DTYPE_NAMES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPE_NAMES.values():
        raise UsageError(f"dtype {dtype} is not a type to load weights in; choose auto, {', '.join(DTYPE_NAMES)}")
    return chosen


def _choices() -> str:
    return f"give a local folder, an id of the model hub, or a bundled model ({', '.join(BUNDLED)})"


def _local_folder(name: str) -> Path | None:
    """The folder of a bundled or local model; None when `name` can only be a hub id."""
    if name in BUNDLED:
        return bundled_folder(name)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # Path's own is_dir raises on a name that is too long for one
        return path
    if os.path.exists(path):
        raise ModelError(f"{name} is a file, not a model folder; {_choices()}")
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}; {_choices()}")
    return None


def _config(name: str, source: str, folder: Path | None, where: dict[str, Any]) -> PreTrainedConfig:
    if folder is not None:
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{name} holds an adapter; merge it into its base model first, or give that with --adapter"
            )
        if not (folder / "config.json").is_file():
            raise ModelError(f"the folder {name} has no config.json, so it is no Hugging Face model; {_choices()}")
    try:
        return AutoConfig.from_pretrained(source, **where)
    # Anything can go wrong in a file written by others: wrong types, unknown model types, missing keys, no network.
    except Exception as error:
        if folder is None:
            raise ModelError(
                f"{name} is not on this machine and was not found on the model hub, or the hub cannot be reached "
                f"({_first_line(error)}); give a local folder or a bundled model ({', '.join(BUNDLED)})"
            ) from error
        raise ModelError(f"the config.json of {name} cannot be used: {_first_line(error)}") from error


def _require_decoder_only(name: str, config: PreTrainedConfig) -> None:
    # A family with a masked-language-model head (BERT and its kin) attends in both directions unless told otherwise.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a causal language model"
        raise ModelError(
            f"{name} (model type {config.model_type}) is {kind}; only decoder-only causal language models can be pruned"
        )


def _require_unquantised(name: str, config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config(decoder=True)):
        for key in ("quantization_config", "compression_config"):
            settings = getattr(part, key, None)
            if settings:
                method = settings.get("quant_method") if isinstance(settings, dict) else None
                raise ModelError(
                    f"{name} is already quantised ({method or key}); dequantise it first, or prune the original"
                )


def _require_weights(name: str, folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a folder without safetensors, and an index that leads out of it."""
    named = getattr(config, "transformers_weights", None)
    candidates = [named] if isinstance(named, str) else [WEIGHTS, INDEX]
    weights = next((folder / file for file in candidates if (folder / file).is_file()), None)
    if weights is None:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{name} has its weights in {pickled[0]}, a pickle that can run code when it is read; convert it with "
                "save_pretrained, which writes safetensors"
            )
        raise ModelError(f"the folder {name} has no {' or '.join(candidates)}; get the model's weights first")
    if weights.name.endswith(".index.json"):
        _check_index(name, folder, weights)


def _check_index(name: str, folder: Path, index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        odd = [shard for shard in shards if not (isinstance(shard, str) and shard.endswith(".safetensors"))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index.name} of {name} is not a readable index of weights; get the file again") from error
    if odd or not shards:
        raise ModelError(f"{index.name} of {name} must name safetensors files only, not {odd[0] if odd else 'nothing'}")
    allowed = homes(folder)
    for shard in sorted(shards):
        target = (folder / shard).resolve()
        lexical = Path(shard).is_absolute() or ".." in Path(shard).parts
        if lexical or not any(target.is_relative_to(root) for root in allowed):
            raise ModelError(f"{index.name} of {name} points outside the folder ({shard}); refused")
        if not target.is_file():
            raise ModelError(f"{index.name} of {name} names {shard}, which is missing; get the file")


def _model(
    name: str,
    source: str,
    folder: Path | None,
    config: PreTrainedConfig,
    dtype: str | torch.dtype,
    where: dict[str, Any],
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            # Reported below with the names of the weights instead of transformers' multi-line error.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **where,
        )
    except Exception as error:
        advice = "check the folder's files" if folder is not None else "check the connection and the model's page"
        raise ModelError(f"{name} cannot be loaded ({_first_line(error)}); {advice}") from error
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(f"{name} holds an adapter; merge it into its base model first, or give that with --adapter")
    # transformers fills what is missing or has another shape with random numbers and goes on.
    if report["missing_keys"]:
        raise ModelError(
            f"the checkpoint {name} lacks {_listed(sorted(report['missing_keys']))}; get the complete checkpoint"
        )
    if report["mismatched_keys"]:
        key, found, expected = min(report["mismatched_keys"])
        raise ModelError(
            f"the weight {key} of {name} has shape {tuple(found)} where its config.json asks for {tuple(expected)}; "
            "get matching files"
        )
    if report["unexpected_keys"]:
        warnings.warn(
            f"the model does not use {_listed(sorted(report['unexpected_keys']))} of the checkpoint {name}",
            stacklevel=3,
        )
    return model


def _compressed_model(
    name: str, folder: Path | None, config: PreTrainedConfig, dtype: str | torch.dtype
) -> PreTrainedModel:
    from wandapp_kernels.runtime.folder import load_compressed  # the runtime stands above this module

    if folder is None:
        raise ModelError(f"{name} is a compressed model of wandapp; download its folder and give the path")
    try:
        return load_compressed(folder, config, None if isinstance(dtype, str) else dtype)
    except WandappError:
        raise
    except Exception as error:
        raise ModelError(f"{name} cannot be loaded ({_first_line(error)}); check the folder's files") from error


def _tokenizer(
    name: str, source: str, folder: Path | None, config: PreTrainedConfig, where: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    if folder is not None and not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **where)
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {name} cannot be loaded ({_first_line(error)}); put the right files beside the model"
        ) from error
    # Where its files are missing, transformers makes a tokenizer of special tokens only, and says nothing.
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - {*tokenizer.all_special_tokens}:
        raise ModelError(
            f"the tokenizer of {name} ({type(tokenizer).__name__}) knows no words: the file with its vocabulary is "
            "missing; put tokenizer.json (or tokenizer.model, or vocab.json with merges.txt) beside the model"
        )
    begin = getattr(config, "bos_token_id", None)
    described = folder is None or (folder / "tokenizer_config.json").is_file()
    if tokenizer.bos_token_id is None and begin is not None and not described:
        warnings.warn(
            f"{name} has no tokenizer_config.json, so that its tokenizer knows no token to begin a text with, which "
            f"config.json says is {begin}: figures will differ; put the file beside the model",
            stacklevel=3,
        )
    return tokenizer


def _listed(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:3])
    return f"{len(keys)} weight{'s'[: len(keys) > 1]} ({shown}{', ...' if len(keys) > 3 else ''})"


def _first_line(error: Exception) -> str:
    """The first line of an error of a library, as a part of a sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".:;") if lines else "") or type(error).__name__
