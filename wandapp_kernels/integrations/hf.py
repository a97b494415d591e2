"""``transformers.AutoModelForCausalLM.from_pretrained`` on a compressed folder (``docs/format.md``).

transformers builds the model without weights and hands it over twice. Before it reads any, the folder's files, names,
types and shapes are checked, and the compressed layers lose their weight, so that it reads only what is dense.
Afterwards every tensor is read, checked and put in place by the code that ``wandapp_kernels.load`` uses: what
transformers did about tensors that are missing (random numbers) or damaged (nothing) does not matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# From the modules themselves: the package is still being imported when `register` is called.
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from wandapp_kernels.checkpoint.compressed import METHOD, VERSION, CompressedFolder
from wandapp_kernels.checkpoint.format import DTYPES
from wandapp_kernels.errors import ModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WandappConfig(QuantizationConfigMixin):
    """``quantization_config`` of a compressed folder; `CompressedFolder` is who checks it."""

    def __init__(self, format_version: int = VERSION, layers: dict[str, Any] | None = None, **others: Any):
        self.__dict__.update({**others, "quant_method": METHOD, "format_version": format_version})
        self.layers = layers or {}


class WandappQuantizer(HfQuantizer):
    """Loads a compressed folder on one device, its layers `SparseLinear`; trains adapters, not the weights."""

    requires_calibration = True  # a dense model is pruned and swapped by other means

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any):
        if not kwargs.get("pre_quantized", True):
            raise UsageError(
                "from_pretrained reads models that are compressed already; load the dense one without "
                "quantization_config, and compress it with wandapp_kernels.sparsify"
            )
        super().__init__(quantization_config, **kwargs)
        self._folder: CompressedFolder | None = None
        self._dtype: torch.dtype | None = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse a map that spreads the model: its hooks would be lost with the layers that are replaced."""
        if isinstance(device_map, dict) and ("disk" in device_map.values() or len(set(device_map.values())) > 1):
            raise UsageError("a compressed model is loaded on one device; give device_map='cpu' or 'cuda:0'")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in DTYPES:
            raise UsageError(
                f"a compressed model cannot be loaded as {dtype}; choose one of {', '.join(map(str, DTYPES))}"
            )
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from wandapp_kernels.runtime.folder import (
            check_place,
            drop_weight,
        )  # needs transformers, which is being imported above

        if not checkpoint_files:
            raise UsageError("a compressed model is loaded from its folder; a state_dict cannot be given")
        folder = self._folder = CompressedFolder(Path(checkpoint_files[0]).parent)
        written = folder.config.get("architectures")
        if isinstance(written, list) and type(model).__name__ not in written:
            raise ModelError(
                f"{folder.folder} holds a {' or '.join(map(str, written))} and cannot be loaded as a "
                f"{type(model).__name__}; use AutoModelForCausalLM"
            )
        for name in folder.layers:
            drop_weight(model, name, folder)
            model.get_submodule(name)._is_hf_initialized = True  # type: ignore[assignment]
        for name in folder.other:
            check_place(model, name, folder)
        # Only for this model: the tensors of compressed weights are not for transformers to read.
        ignored = {rf"^{re.escape(name)}\.weight_" for name in folder.layers}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from wandapp_kernels.runtime.folder import fill

        folder = self._folder
        assert folder is not None
        del model._keys_to_ignore_on_load_unexpected  # the class's again
        stored = getattr(torch, str(folder.config.get("dtype")), None)
        # With dtype="auto" every tensor keeps its own type.
        fill(model, folder, None if self._dtype == stored else self._dtype, next(model.parameters()).device)
        self._folder = None
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from wandapp_kernels.runtime.swap import desparsify

        desparsify(model)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Tell transformers who reads folders whose quant_method is ours; again is allowed."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(WandappConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(WandappQuantizer)
