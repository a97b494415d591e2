"""Swapping the linears of a model for sparse ones, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from wandapp_kernels.backends import DENSE
from wandapp_kernels.checkpoint.compressed import METHOD
from wandapp_kernels.checkpoint.format import DTYPES, UNSTRUCTURED, compressed_bytes, smallest_pattern
from wandapp_kernels.errors import ModelError, NonFiniteError, SparsityError, UsageError
from wandapp_kernels.models.checks import WRAPPED, adapter_wrappers, require_module
from wandapp_kernels.models.layers import check_ignored
from wandapp_kernels.models.names import as_patterns, matches
from wandapp_kernels.ops.layouts import CANONICAL
from wandapp_kernels.runtime.choice import fastest_layout
from wandapp_kernels.runtime.dense_linear import DenseLinear, tune_dense_kernels, use_dense_kernels, use_torch
from wandapp_kernels.runtime.memory import release_free_memory
from wandapp_kernels.runtime.recorded import owner_of, record_layers
from wandapp_kernels.runtime.sparse_linear import SparseLinear
from wandapp_kernels.sparsity import Pattern, satisfies

# Below this share of zeros a bitmap would still save a little memory, but no kernel gains time.
MIN_SPARSITY = 0.4

_DENSE_IS_FASTER = "the dense product is faster here"


@dataclass(frozen=True)
class SwappedLayer:
    """One layer that is compressed now.

    Attributes:
        sparsity: fraction of exact zeros.
        dense_bytes, bytes: of its weight before and now, in the layout it is held in.
    """

    name: str
    shape: tuple[int, int]
    pattern: str
    layout: str
    sparsity: float
    dense_bytes: int
    bytes: int


@dataclass(frozen=True)
class SwapReport:
    """What `sparsify` did.

    Attributes:
        swapped: layer by layer.
        left_dense: name -> why, for every other linear layer, and for sparse experts that are held in one tensor.
    """

    swapped: list[SwappedLayer] = field(default_factory=list)
    left_dense: dict[str, str] = field(default_factory=dict)

    @property
    def dense_bytes(self) -> int:
        """Of the weights that were swapped, before."""
        return sum(layer.dense_bytes for layer in self.swapped)

    @property
    def bytes(self) -> int:
        """Of the weights that were swapped, now."""
        return sum(layer.bytes for layer in self.swapped)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return asdict(self)


@torch.no_grad()
def sparsify(
    model: nn.Module,
    pattern: str | Pattern = "auto",
    *,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] = (),
    tune: bool = False,
    min_sparsity: float = MIN_SPARSITY,
    layouts: str = "auto",
) -> SwapReport:
    """Replace, in place, every linear layer that is really sparse by a `SparseLinear`.

    One layer at a time: its compressed weight is made, the layer replaced, and the dense weight freed before the next
    is looked at. Looked at are ``nn.Linear`` and transformers' ``Conv1D``. A layer stays dense, and the report says
    why, when its weight is shared with another module, breaks the pattern, has too few zeros, holds NaN or infinity, or
    would take as many bytes compressed, when it has hooks or a replaced ``forward``, or is part of an adapter (PEFT),
    of which LoRA's start as zeros. Layers that are compressed already keep their form, and are packed (and, with
    ``tune``, measured) for the device they are on now. Plain ``nn.Linear`` that stay dense become `DenseLinear`, with
    the same Parameters and the dense kernel that is fastest at few tokens. The model's config records what is
    compressed; nothing else in the model changes.

    Args:
        model: any module; on any device.
        pattern: ``"auto"`` takes for each layer the form with the fewest bytes; ``"2:4"`` or another n:m, or
            ``"unstructured"``, is used for every layer that satisfies it.
        targets: only these layers (`models.names.matches`: full names, suffixes, ``re:`` patterns); None means all.
        ignore: never these.
        tune: measure the kernels for every shape (seconds to minutes, kept in the cache), take the layout of the
            fastest, leave a layer dense where the dense product is fastest at decode, and run layers that stay dense,
            the head too, with the dense product that is.
        min_sparsity: least fraction of zeros for ``"unstructured"``.
        layouts: ``"auto"`` packs each weight for the kernel that will run it; ``"canonical"`` leaves it as it is saved,
            and dense layers as they are: for writing a checkpoint.

    Raises:
        UsageError: an impossible pattern, ``min_sparsity`` or ``layouts``, ``tune`` with ``layouts="canonical"``,
            ``targets`` that choose no layer, an ``ignore`` that is no layer's name, or something that is no module.
        ModelError: ``model`` itself is a linear layer, so that there is nothing to hang the new one in.
    """
    if not 0 <= min_sparsity <= 1:
        raise UsageError(f"min_sparsity is {min_sparsity}, but must be a fraction of zeros from 0 to 1")
    if layouts not in ("auto", "canonical"):
        raise UsageError(f"layouts is {layouts!r}, but must be 'auto' or 'canonical'")
    if tune and layouts == "canonical":
        raise UsageError("tune=True chooses layouts, but layouts='canonical' leaves weights as saved; leave one out")
    wanted = pattern if pattern in ("auto", UNSTRUCTURED) else _nm(pattern)
    require_module(model)
    if isinstance(model, nn.Linear | Conv1D):
        raise ModelError("the model is a single linear layer; compress it with SparseLinear.from_linear")
    names = [name for name, module in model.named_modules() if _is_linear(module)]
    chosen = [name for name in names if targets is None or matches(name, targets)]
    if targets is not None and not chosen:
        raise UsageError(
            f"no linear layer of the model is chosen by {', '.join(as_patterns(targets))}; its last is {names[-1:]}"
        )
    check_ignored(model, as_patterns(ignore))
    shared, adapters = _shared_weights(model), _adapters(model)
    report = SwapReport()
    for name in names:
        # Only names are kept: a list of modules would keep every dense weight alive.
        layer = model.get_submodule(name)
        if isinstance(layer, SparseLinear):
            if name in chosen and not matches(name, ignore):
                _pack(model, name, layer, tune, layouts, report)
            continue
        reason = "not among the targets" if name not in chosen else "ignored" if matches(name, ignore) else None
        if name in adapters:
            reason = "it is part of an adapter, which is trained"
        if name in shared:
            reason = f"its weight is shared with {shared[name]}"
        if reason is None:
            reason = _swap(model, name, layer, str(wanted), min_sparsity, tune, layouts, report)
        del layer
        if reason is not None:
            report.left_dense[name] = reason
    report.left_dense.update(_stacked(model, min_sparsity))
    if layouts == "auto":
        use_dense_kernels(model)
        if tune:
            tune_dense_kernels(model)
    record_layers(model)
    release_free_memory()
    return report


@torch.no_grad()
def desparsify(model: nn.Module) -> list[str]:
    """Give every `SparseLinear` of the model its dense layer back, in place; returns their names. -0.0 becomes +0.0.

    Hooks of a layer go on working; their handles remove them.

    Raises:
        UsageError: something that is no module.
        ModelError: ``model`` itself is a `SparseLinear`; or the ``forward`` of a layer was replaced, which would be
            lost. Nothing has been changed then.
    """
    require_module(model)
    names = [name for name, _ in sparse_layers(model)]
    for name in names:
        if not name:
            raise ModelError("the model is a single SparseLinear; use its to_linear()")
        if "forward" in model.get_submodule(name).__dict__:
            raise ModelError(
                f"the forward of {name} was replaced (as accelerate's hooks do) and would be lost; undo that first, "
                "with accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        _make_dense(model, name, layer)
        del layer
    use_torch(model)
    record_layers(model)
    owner = owner_of(model)
    quantizer: Any = getattr(owner, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == METHOD:
        # transformers would go on refusing what it does not allow with quantised weights: training, half()
        quantizer.remove_quantization_config(owner)
    release_free_memory()
    return names


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """Name and module of every `SparseLinear`."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            yield name, module


def _nm(pattern: str | Pattern) -> Pattern:
    parsed = Pattern.parse(pattern)
    if not parsed.is_nm:
        raise UsageError(f"pattern {pattern!r} names no form to store; give n:m, 'unstructured' or 'auto'")
    return parsed


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Layer name -> another parameter that is the same tensor."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return {
        name.removesuffix(".weight"): next(other for other in group if other != name)
        for group in owners.values()
        if len(group) > 1
        for name in group
        if name.endswith(".weight")
    }


def _adapters(model: nn.Module) -> set[str]:
    """Names of the layers of adapters."""
    return {
        f"{name}.{own}".lstrip(".")
        for name, wrapper in adapter_wrappers(model)
        for own, _ in wrapper.named_modules()
        if own and own.partition(".")[0] not in WRAPPED
    }


def _stacked(model: nn.Module, min_sparsity: float) -> dict[str, str]:
    """Sparse weights of several matrices in one tensor (experts), which no layer here holds: name -> why."""
    return {
        name: "it holds several matrices (experts) in one tensor; only nn.Linear and Conv1D are swapped"
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and not parameter.is_meta and _zeros(parameter) >= max(min_sparsity, 0.01)
    }


def _zeros(tensor: torch.Tensor) -> float:
    return 1 - int(torch.count_nonzero(tensor)) / max(tensor.numel(), 1)


def _swap(
    model: nn.Module,
    name: str,
    layer: nn.Module,
    pattern: str,
    min_sparsity: float,
    tune: bool,
    layouts: str,
    report: SwapReport,
) -> str | None:
    """Swap one layer and enter it in the report; or return why it stays dense."""
    if type(layer) not in (nn.Linear, DenseLinear, Conv1D):
        return f"a {type(layer).__name__} may not compute what nn.Linear does"
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    if any(hooks) or hasattr(layer, "_hf_hook"):
        return "it has hooks, which the swap would lose"
    if "forward" in layer.__dict__:
        return "its forward was replaced, which the swap would lose"
    dense = layer.weight
    assert isinstance(dense, torch.Tensor)
    if dense.is_meta or dense.dtype not in DTYPES:
        return "its weight is not in memory" if dense.is_meta else f"its weight is {dense.dtype}"
    mask = (dense != 0).T if isinstance(layer, Conv1D) else dense != 0
    form, reason = _form(mask, pattern, dense.element_size(), min_sparsity)
    if reason is not None:
        return reason
    kept, size = int(mask.sum()), dense.nbytes
    del mask
    try:
        sparse = SparseLinear.from_linear(layer, form)
    except (SparsityError, NonFiniteError) as error:
        return str(error)
    if layouts == "auto":
        layout = fastest_layout(sparse.compressed(), tune=tune)
        if layout == DENSE:
            return _DENSE_IS_FASTER
        sparse.set_layout(layout)
    model.set_submodule(name, sparse)
    report.swapped.append(
        SwappedLayer(name, sparse.shape, form, sparse.layout, 1 - kept / max(dense.numel(), 1), size, sparse.nbytes)
    )
    return None


def _pack(model: nn.Module, name: str, layer: SparseLinear, tune: bool, layouts: str, report: SwapReport) -> None:
    """Hold a layer that is compressed already as one that is swapped now would be."""
    if layer._tensors()[0].is_meta:  # offloaded
        return
    if layouts == "canonical":
        layer.set_layout(CANONICAL[layer._operator])
        return
    layout = fastest_layout(layer.compressed(), tune=tune)
    if layout != DENSE:
        layer.set_layout(layout)
    elif "forward" not in layer.__dict__:  # which would be lost
        _make_dense(model, name, layer)
        report.left_dense[name] = _DENSE_IS_FASTER


def _make_dense(model: nn.Module, name: str, layer: SparseLinear) -> None:
    dense = layer.to_linear()
    dense.__dict__.update({name: kept for name, kept in layer.__dict__.items() if "_hook" in name})
    model.set_submodule(name, dense)


def _form(mask: torch.Tensor, pattern: str, element_size: int, min_sparsity: float) -> tuple[str, str | None]:
    """The form to store a weight in, and None; or why it stays dense."""
    rows, columns = mask.shape
    kept = int(mask.sum())
    zeros = 1 - kept / max(mask.numel(), 1)
    form = smallest_pattern(mask, element_size) if pattern == "auto" else pattern
    if form != UNSTRUCTURED and not satisfies(mask, Pattern.parse(form)):
        return form, f"it breaks the pattern {form}"
    if form == UNSTRUCTURED and zeros < min_sparsity:
        return form, f"{100 * zeros:.1f} % of it are zeros, fewer than {100 * min_sparsity:g} %"
    if compressed_bytes(form, rows, columns, kept, element_size) >= mask.numel() * element_size:
        return form, f"it takes as many bytes compressed ({form}) as dense"
    return form, None
