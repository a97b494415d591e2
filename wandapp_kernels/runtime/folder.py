"""A swapped model and its folder: building the model from a compressed checkpoint, and writing one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from wandapp_kernels.checkpoint.atomic import check_target, new_folder
from wandapp_kernels.checkpoint.compressed import CompressedFolder, LayerForm, quantization_config, write_tensors
from wandapp_kernels.checkpoint.save import RECORD, check_disk_space, share_modes, strip_config, to_json
from wandapp_kernels.errors import CheckpointError, ModelError, NonFiniteError, SparsityError
from wandapp_kernels.runtime.choice import fastest_layout
from wandapp_kernels.runtime.dense_linear import use_dense_kernels
from wandapp_kernels.runtime.memory import release_free_memory
from wandapp_kernels.runtime.sparse_linear import SparseLinear
from wandapp_kernels.runtime.swap import mark_config, sparse_layers


def load_compressed(
    folder: str | Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model of a compressed folder, its layers already `SparseLinear`, on the CPU.

    No dense weight is ever in memory: the model is built without weights, and layer after layer is read, checked and
    packed for the kernels of this machine.

    Args:
        folder: see ``docs/format.md``.
        config: of the folder, as ``AutoConfig`` read it.
        dtype: cast floating-point weights to this type; None keeps what is stored.

    Raises:
        CheckpointError: see `checkpoint.compressed.CompressedFolder`; or a tensor does not fit the model, is missing,
            or overflows ``dtype``.
    """
    checkpoint = CompressedFolder(folder)
    config = type(config).from_dict({**config.to_dict(), "quantization_config": None})
    with _weights_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    for name, form in checkpoint.layers.items():
        transposed = _check_module(model, name, form, checkpoint)
        weight = checkpoint.weight(name)
        try:
            weight = weight.to(dtype=dtype)
        except (NonFiniteError, SparsityError) as error:
            raise CheckpointError(f"the weight {name} of {folder} cannot be read as {dtype}: {error}") from error
        bias = model.get_submodule(name).bias
        sparse = SparseLinear(weight, bias, layout=fastest_layout(weight), transposed=transposed)  # type: ignore[arg-type]
        model.set_submodule(name, sparse)
        del weight
    for name in checkpoint.other:
        _assign(model, name, checkpoint, dtype)
    model.tie_weights()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"the tensor {name} of {folder} is missing; get the complete checkpoint")
    use_dense_kernels(model)
    mark_config(model)
    release_free_memory()
    return model.eval()


def save_compressed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    record: dict[str, Any],
    *,
    force: bool = False,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a swapped model as a compressed checkpoint: complete or not at all, the same bytes for the same weights.

    Args:
        model: with at least one `SparseLinear`; on any device.
        folder: absent, empty, or (with ``force``) to be replaced.
        record: written as ``wandapp.json``; an empty one is not written.
        shard_bytes: size above which the weights are split into several files.

    Raises:
        CheckpointError: the folder cannot be written, or the disk is too full.
        ModelError: nothing in the model is compressed.
    """
    check_target(folder, force)
    layers = {name: layer.form for name, layer in sparse_layers(model)}
    if not layers:
        raise ModelError("no layer of the model is compressed; swap them with sparsify, or save the model dense")
    state = model.state_dict()
    check_disk_space(folder, sum(tensor.nbytes for tensor in state.values()))
    with new_folder(folder, force=force) as partial:
        try:
            model.config.save_pretrained(partial)
            _complete_config(partial / "config.json", model, layers)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            write_tensors(state, partial, shard_bytes)
            if record:
                (partial / RECORD).write_text(to_json(record), encoding="utf-8")
            share_modes(partial)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the model could not be written to {folder}: {reason}") from error


def _complete_config(path: Path, model: PreTrainedModel, layers: dict[str, LayerForm]) -> None:
    strip_config(path)
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": quantization_config(layers),
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Parameters made inside have no memory; buffers, which checkpoints may lack, are real and initialised."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check_module(model: nn.Module, name: str, form: LayerForm, checkpoint: CompressedFolder) -> bool:
    """Whether the layer is a ``Conv1D``; raises CheckpointError unless the form fits the model's layer."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if type(module) is Conv1D:
        found = (module.nf, module.nx)
    elif type(module) is nn.Linear:
        found = (module.out_features, module.in_features)
    else:
        raise CheckpointError(f"config.json in {checkpoint.folder} compresses {name}, which is no linear layer there")
    if found != form.shape:
        raise CheckpointError(
            f"the tensor {name}.weight of {checkpoint.folder} is {list(form.shape)}, but the model needs "
            f"{list(found)}; get matching files"
        )
    return isinstance(module, Conv1D)


def _assign(model: nn.Module, name: str, checkpoint: CompressedFolder, dtype: torch.dtype | None) -> None:
    owner, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        module = nn.Module()
    places: dict[str, Any] = module._parameters if own in module._parameters else module._buffers
    if places.get(own) is None or own in module._non_persistent_buffers_set:
        raise CheckpointError(f"the tensor {name} of {checkpoint.folder} has no place in the model; get matching files")
    tensor, known = checkpoint.tensor(name), places[own]
    if tensor.shape != known.shape or tensor.is_floating_point() != known.is_floating_point():
        raise CheckpointError(
            f"the tensor {name} of {checkpoint.folder} is {tensor.dtype} {list(tensor.shape)}, but the model needs "
            f"{known.dtype} {list(known.shape)}; get matching files"
        )
    if tensor.is_floating_point():
        # No temporaries: an embedding is the largest tensor of a small model. NaN passes through aminmax.
        if tensor.numel() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
            raise CheckpointError(f"the tensor {name} of {checkpoint.folder} holds NaN or infinity; do not use it")
        tensor = tensor.to(dtype or tensor.dtype)
    places[own] = nn.Parameter(tensor, requires_grad=known.requires_grad) if places is module._parameters else tensor
