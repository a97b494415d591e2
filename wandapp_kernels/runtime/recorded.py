"""What a swapped model's config says is compressed, so that a plain ``save_pretrained`` writes a readable folder."""

from __future__ import annotations

import copy
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
    if any(isinstance(module, SparseLinear) for module in owner.modules()):
        config.quantization_config = CompressedLayers(owner)
    elif _is_ours(getattr(config, "quantization_config", None)):
        del config.quantization_config


def _is_ours(entry: Any) -> bool:
    return getattr(entry, "quant_method", None) == METHOD or is_compressed({"quantization_config": entry})
