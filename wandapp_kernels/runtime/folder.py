"""A swapped model and its folder: building the model from a compressed checkpoint, and writing one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

from wandapp_kernels.checkpoint.atomic import check_target, new_folder
from wandapp_kernels.checkpoint.compressed import CompressedFolder, LayerForm, quantization_config, write_tensors
from wandapp_kernels.checkpoint.format import DTYPES
from wandapp_kernels.checkpoint.save import RECORD, check_disk_space, share_modes, strip_config, to_json
from wandapp_kernels.errors import CheckpointError, ModelError, NonFiniteError, SparsityError
from wandapp_kernels.models.generation_config import write_generation_config
from wandapp_kernels.runtime.choice import fastest_layout
from wandapp_kernels.runtime.dense_linear import use_dense_kernels
from wandapp_kernels.runtime.memory import release_free_memory
from wandapp_kernels.runtime.recorded import record_layers
from wandapp_kernels.runtime.sparse_linear import SparseLinear
from wandapp_kernels.runtime.swap import sparse_layers


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
    with torch.device("cpu"), _weights_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    for name in checkpoint.layers:
        drop_weight(model, name, checkpoint)
    fill(model, checkpoint, dtype)
    if model.can_generate() and (found := _generation_config(checkpoint.folder)) is not None:
        model.generation_config = found
    return model.eval()


def drop_weight(model: nn.Module, name: str, checkpoint: CompressedFolder) -> None:
    """Take the weight from a linear layer that `fill` will replace; its bias stays.

    Raises:
        CheckpointError: the model has no linear layer of that name, or one of another shape.
    """
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
    form = checkpoint.layers[name]
    if found != form.shape:
        raise CheckpointError(
            f"the tensor {name}.weight of {checkpoint.folder} is {list(form.shape)}, but the model needs "
            f"{list(found)}; get matching files"
        )
    # A plain attribute, for transformers' initialisation, which asks for its shape.
    shape = module.weight.shape
    del module.weight
    module.__dict__["weight"] = torch.empty(shape, device="meta")


def fill(
    model: PreTrainedModel,
    checkpoint: CompressedFolder,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Give a model, whose compressed layers have passed `drop_weight`, every tensor of its folder, checked.

    Args:
        model: its other parameters may be anywhere, and are replaced; buffers that the folder lacks are kept.
        dtype: as for `load_compressed`.
        device: where the tensors go, and whose kernels the layers are packed for.

    Raises:
        CheckpointError: as `load_compressed`.
    """
    for name in checkpoint.layers:
        module = model.get_submodule(name)
        weight = checkpoint.weight(name)
        try:
            weight = weight.to(device=device, dtype=dtype)
        except (NonFiniteError, SparsityError) as error:
            where = f"the weight {name} of {checkpoint.folder}"
            raise CheckpointError(f"{where} cannot be read as {dtype}: {error}") from error
        transposed = isinstance(module, Conv1D)
        sparse = SparseLinear(weight, module.bias, layout=fastest_layout(weight), transposed=transposed)  # type: ignore[arg-type]
        model.set_submodule(name, sparse)
        del weight
    placed = {name: _assign(model, name, checkpoint, dtype, device) for name in checkpoint.other}
    model.tie_weights()
    _require_kept(model, checkpoint, placed)
    known = list(placed.values())
    # Tied parameters are one object. Tensors are compared by identity: what the model held before may have any value.
    known += [own for _, layer in sparse_layers(model) for name, own in layer.named_parameters() if name != "bias"]
    present = {id(tensor) for tensor in known}
    for name, parameter in model.named_parameters():
        if id(parameter) not in present:
            raise _missing(checkpoint, name)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise _missing(checkpoint, name)
    use_dense_kernels(model)
    record_layers(model)
    release_free_memory()


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
        ModelError: nothing in the model is compressed, or tensors that its config ties differ.
        NonFiniteError: a tensor holds NaN or infinity, which loading would refuse.
    """
    check_target(folder, force)
    layers = {name: layer.form for name, layer in sparse_layers(model)}
    if not layers:
        raise ModelError("no layer of the model is compressed; swap them with sparsify, or save the model dense")
    state = _untied_state(model)
    _require_finite(state)
    check_disk_space(folder, sum(tensor.nbytes for tensor in state.values()))
    with new_folder(folder, force=force) as partial:
        try:
            model.config.save_pretrained(partial)
            _complete_config(partial / "config.json", model, layers)
            write_generation_config(model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            write_tensors(state, partial, shard_bytes)
            if record:
                (partial / RECORD).write_text(to_json(record), encoding="utf-8")
            share_modes(partial)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the model could not be written to {folder}: {reason}") from error


def _untied_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict without the tensors that `fill` ties again, by the config that is written."""

    def place(tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    state: dict[str, torch.Tensor] = model.state_dict()
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if name not in state or source not in state:
            continue
        if place(state[name]) != place(state[source]) and not torch.equal(state[name], state[source]):
            raise ModelError(
                f"{name} differs from {source}, but the model's config ties them, so that loading would replace it; "
                "set config.tie_word_embeddings = False"
            )
        del state[name]
    return state


def _require_finite(state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        # No temporaries: NaN passes through aminmax.
        if tensor.dtype in DTYPES and tensor.numel() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
            raise NonFiniteError(
                f"the tensor {name} holds NaN or infinity, and a compressed folder may not; if a cast to "
                f"{tensor.dtype} made it so, load the model again in a wider type"
            )


def _complete_config(path: Path, model: PreTrainedModel, layers: dict[str, LayerForm]) -> None:
    strip_config(path)
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": quantization_config(layers),
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Building(threading.local):
    """Whether this thread is building a model without weights."""

    now = False


_building = _Building()
_hook_lock = threading.Lock()
_hooked = False


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if not _building.now or parameter is None or parameter.is_meta:
        return None  # as it is
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Parameters this thread makes inside have no memory; buffers, which checkpoints may lack, are initialised."""
    global _hooked
    with _hook_lock:
        if not _hooked:
            # Never removed: torch walks through its hooks without a lock, while another thread may build a module.
            register_module_parameter_registration_hook(_on_meta)  # type: ignore[arg-type]
            _hooked = True
    before, _building.now = _building.now, True
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        _building.now = before


def _generation_config(folder: Path) -> GenerationConfig | None:
    """The folder's own: where generation ends, how it samples. None where it has none."""
    if not (folder / GENERATION_CONFIG_NAME).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a file written by others makes transformers raise
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{GENERATION_CONFIG_NAME} in {folder} cannot be used ({reason}); get it again"
        ) from error


def _missing(checkpoint: CompressedFolder, name: str) -> CheckpointError:
    return CheckpointError(f"the tensor {name} of {checkpoint.folder} is missing; get the complete checkpoint")


def _require_kept(model: nn.Module, checkpoint: CompressedFolder, placed: dict[str, torch.Tensor]) -> None:
    """Refuse a folder one of whose tensors was replaced by another one, with which config.json ties it."""
    held = dict(model.named_parameters(remove_duplicate=False))
    sources = {id(own): name for name, own in placed.items()}
    for name, tensor in placed.items():
        source = sources.get(id(held.get(name)), name)
        if source != name and not torch.equal(placed[source], tensor):
            raise CheckpointError(
                f"the tensor {name} of {checkpoint.folder} differs from {source}, with which config.json ties it; get "
                "matching files, or set tie_word_embeddings to false there"
            )


def check_place(model: nn.Module, name: str, checkpoint: CompressedFolder) -> tuple[nn.Module, torch.Tensor]:
    """The module that owns a tensor which belongs to no compressed weight, and what the module holds there now.

    Raises:
        CheckpointError: the model has no such parameter or buffer, or one of another shape or kind of type.
    """
    owner, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        module = nn.Module()
    known = {**module._parameters, **module._buffers}.get(own)
    if known is None or own in module._non_persistent_buffers_set:
        raise CheckpointError(f"the tensor {name} of {checkpoint.folder} has no place in the model; get matching files")
    dtype, shape = checkpoint.kind(name)
    if shape != known.shape or dtype.is_floating_point != known.is_floating_point():
        raise CheckpointError(
            f"the tensor {name} of {checkpoint.folder} is {dtype} {list(shape)}, but the model needs "
            f"{known.dtype} {list(known.shape)}; get matching files"
        )
    return module, known


def _assign(
    model: nn.Module, name: str, checkpoint: CompressedFolder, dtype: torch.dtype | None, device: torch.device | str
) -> torch.Tensor:
    """Put a tensor that belongs to no compressed weight into the model; returns the new parameter or buffer."""
    module, known = check_place(model, name, checkpoint)
    tensor = checkpoint.tensor(name)
    if tensor.is_floating_point():
        wanted = dtype or tensor.dtype
        if tensor.numel():
            # No temporaries: an embedding is the largest tensor of a small model. NaN passes through aminmax, and what
            # lies between two bounds that a cast leaves finite stays finite too.
            bounds = torch.stack(tensor.aminmax())
            if not bounds.isfinite().all():
                raise CheckpointError(f"the tensor {name} of {checkpoint.folder} holds NaN or infinity; do not use it")
            if not bounds.to(wanted).isfinite().all():
                raise CheckpointError(
                    f"the tensor {name} of {checkpoint.folder} cannot be read as {wanted}: it holds values from "
                    f"{bounds[0]:.3g} to {bounds[1]:.3g}; choose a wider type"
                )
        tensor = tensor.to(wanted)
    tensor = tensor.to(device)
    own = name.rpartition(".")[2]
    if own not in module._parameters:
        module._buffers[own] = tensor
        return tensor
    module._parameters[own] = parameter = nn.Parameter(tensor, requires_grad=known.requires_grad)
    return parameter
