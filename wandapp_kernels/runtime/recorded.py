"""What a swapped model's config says is compressed, so that a plain ``save_pretrained`` writes a readable folder."""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from wandapp_kernels.checkpoint.compressed import METHOD, is_compressed, quantization_config
from wandapp_kernels.runtime.sparse_linear import SparseLinear


class CompressedLayers:
    """``quantization_config`` of a swapped model: read from its layers whenever the config is written.

    Types change with ``.to()``, layers are replaced one by one, adapters wrap and unwrap the model: none of these tells
    the config. In a copy of the model it reads the copy's layers; a copy of the config alone, and what outlives the
    model, says what was true last.
    """

    quant_method = METHOD

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._last: dict[str, Any] = {}
        self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        model = self._model()
        if model is not None:
            modules = model.named_modules()
            self._last = quantization_config({name: m.form for name, m in modules if isinstance(m, SparseLinear)})
        return copy.deepcopy(self._last)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedLayers | dict[str, Any]:
        twin = memo.get(id(self._model()))
        if twin is None:
            return self.to_dict()
        copied = type(self).__new__(type(self))  # the twin has no layers yet that could be read
        copied._model, copied._last = weakref.ref(twin), self.to_dict()
        return copied

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (self.to_dict(),)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == (other.to_dict() if isinstance(other, CompressedLayers) else other)

    __hash__ = None  # type: ignore[assignment]


def owner_of(model: nn.Module) -> nn.Module:
    """The transformers model inside ``model`` (a wrapper for adapters, perhaps): who has the config and writes it."""
    config = getattr(model, "config", None)
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel) and module.config is config)
    return next(inside, model)


def record_layers(model: nn.Module) -> None:
    """Let the config of a model say which layers are compressed, or nothing when none is."""
    owner = owner_of(model)
    config = getattr(owner, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return
    if _is_swapped(owner):
        config.quantization_config = CompressedLayers(owner)
        for inner in owner.modules():
            own = getattr(inner, "config", None)
            if own is not config and isinstance(own, PreTrainedConfig):
                _forget(own)  # one entry, at the top of config.json
    else:
        _forget(config)


def _is_swapped(model: nn.Module) -> bool:
    return any(isinstance(module, SparseLinear) for module in model.modules())


def _forget(config: PreTrainedConfig) -> None:
    entry = getattr(config, "quantization_config", None)
    if getattr(entry, "quant_method", None) == METHOD or is_compressed({"quantization_config": entry}):
        del config.quantization_config


def _record_when_saved() -> None:
    """Let ``save_pretrained`` record the layers of the very model that is saved.

    A module does not know what it is part of: where an inner one was swapped (``model.model``, one block), only the
    call that saves the outer one says what the names are relative to. And it writes the config before it asks any
    layer for its tensors, so that nothing but the call itself comes in time.
    """
    save = PreTrainedModel.save_pretrained
    if hasattr(save, "_records_layers"):
        return

    @functools.wraps(save)
    def save_recorded(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if _is_swapped(self):
            record_layers(self)
        return save(self, *args, **kwargs)

    save_recorded._records_layers = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_recorded  # type: ignore[method-assign]


_record_when_saved()
