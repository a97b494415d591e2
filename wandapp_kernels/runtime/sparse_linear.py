"""A linear layer that holds its weight compressed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from wandapp_kernels import dispatch
from wandapp_kernels.backends import Call, load_backends
from wandapp_kernels.checkpoint.compressed import LayerForm
from wandapp_kernels.checkpoint.format import (
    UNSTRUCTURED,
    compress,
    from_tensors,
    pattern_of,
    tensor_names,
    to_tensors,
)
from wandapp_kernels.errors import NonFiniteError, SparsityError, UsageError
from wandapp_kernels.ops import bitmap_linear, nm_linear
from wandapp_kernels.ops.layouts import CANONICAL, LAYOUTS, CompressedWeight, get_layout
from wandapp_kernels.ops.linears import linears, traced_without_gradients
from wandapp_kernels.ops.operator import is_compiling
from wandapp_kernels.runtime.decompressed_weight import DecompressedWeight
from wandapp_kernels.runtime.kernel_linear import KernelLinear
from wandapp_kernels.sparsity import Pattern

_PICKLE = (
    "a SparseLinear is not pickled: save the model with wk.save, or its state_dict() with safetensors, and copy a "
    "layer with copy.deepcopy"
)


class SparseLinear(KernelLinear):
    """``y = x Wᵀ + b`` with a compressed ``W [out, in]``; ``x [..., in]``, ``y [..., out]`` in the type of ``x``.

    The layer holds the tensors of one layout (`ops.layouts`) and nothing else of the weight: the first is a Parameter
    without gradient, the others are buffers. The kernel is chosen call by call (`wandapp_kernels.dispatch`). Gradients
    flow to ``x`` and to the bias, so adapters train on top of it.

    `weight` is decompressed anew whenever it is read: writing into it and assigning it are refused.
    Whatever the layout, ``state_dict()`` holds the canonical tensors (``docs/format.md``): ``weight_values`` with
    ``weight_indices``, or with ``weight_bitmap`` and ``weight_row_offsets``, and ``bias``; ``load_state_dict``
    checks them and takes nothing else.

    Attributes:
        pattern: ``"2:4"`` or another n:m, or ``"unstructured"``.
        layout: name of the layout held; see `set_layout`.
        transposed: the layer stands for transformers' ``Conv1D``, which stores ``[in, out]``.
    """

    in_features: int
    out_features: int

    def __init__(
        self,
        weight: CompressedWeight,
        bias: torch.Tensor | None = None,
        *,
        layout: str | None = None,
        transposed: bool = False,
    ):
        """
        Args:
            weight: an ``NMWeight`` or a ``BitmapWeight`` of shape ``(out, in)``, already valid.
            bias: ``[out]`` or None; a Parameter is kept as it is.
            layout: a name of ``LAYOUTS`` for this kind of weight; None is the canonical one.
            transposed: see the class.

        Raises:
            UsageError: the layout is unknown or is not for this kind of weight.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.pattern: Final[str] = pattern_of(weight)
        self.transposed = transposed
        self._trained = False
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self._tensor_names: tuple[str, ...] = ()
        self._hold(weight, layout or CANONICAL[self._operator])

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        pattern: str = "auto",
        *,
        mask: torch.Tensor | None = None,
        layout: str | None = None,
    ) -> SparseLinear:
        """Compress an ``nn.Linear`` (or transformers' ``Conv1D``); the original is left as it is.

        Args:
            linear: the bias Parameter is shared with it, not copied.
            pattern: n:m, ``"unstructured"``, or ``"auto"``: the form that takes the fewest bytes.
            mask: bool ``[out, in]``, True = kept; None keeps the non-zeros.
            layout: see the constructor.

        Raises:
            SparsityError: the weight does not follow the pattern, or has a type that cannot be compressed.
            NonFiniteError: a weight is NaN or infinite.
        """
        transposed = isinstance(linear, Conv1D)
        assert isinstance(linear.weight, torch.Tensor)
        dense, trained = linear.weight.detach(), linear.weight.requires_grad
        weight = compress(dense.T.contiguous() if transposed else dense, pattern, mask)
        layer = cls(weight, linear.bias, layout=layout, transposed=transposed)  # type: ignore[arg-type]
        layer._trained = trained
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear | Conv1D:
        """The dense layer, bit for bit: an ``nn.Linear``, or the ``Conv1D`` it was made from. Shares the bias."""
        dense = self._decompress()
        linear: nn.Linear | Conv1D
        with torch.device("meta"):
            if self.transposed:
                linear = Conv1D(self.out_features, self.in_features)
                dense = dense.T.contiguous()
            else:
                linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(dense, requires_grad=self._trained)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dense weight ``[out, in]``, decompressed now: a copy that is nobody's Parameter and cannot be written."""
        dense = self._decompress()
        return dense if is_compiling() else dense.as_subclass(DecompressedWeight)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def layout(self) -> str:
        return self._layout

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weight."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors held for the weight, without the bias."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def form(self) -> LayerForm:
        """How a checkpoint stores the weight."""
        return LayerForm(self.pattern, self.shape, str(self.dtype).removeprefix("torch."))

    def compressed(self) -> CompressedWeight:
        """The weight in canonical form; shares memory with the layer when that is its layout."""
        return get_layout(self.layout).unpack(self._tensors(), self.shape, self._nm)

    def set_layout(self, layout: str) -> SparseLinear:
        """Hold the weight in another layout of the same kind; exact. Returns the layer."""
        if layout != self.layout:
            self._hold(self.compressed(), layout)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (y := self._run_kernel(x)) is not None:
            return y
        if not self.out_features:  # no kernel takes it
            return functional.linear(x, x.new_empty(0, self.in_features), self.bias)
        if traced_without_gradients(x, self._tensors()[0]):
            pattern = "" if self.pattern == UNSTRUCTURED else self.pattern
            weight = (self._tensors(), self.bias, self.out_features)
            return linears(x, [weight], self.in_features, pattern, self._layout)[0]
        # In eager mode the operators hand addresses over, which know nothing of signs to be turned.
        tensors = [tensor.resolve_neg() for tensor in self._tensors()]
        bias = None if self.bias is None else self.bias.resolve_neg()
        if self.pattern == UNSTRUCTURED:
            return bitmap_linear(x, tensors, bias, self.out_features, self.in_features, self._layout)
        return nm_linear(x, tensors, bias, self.out_features, self.in_features, self.pattern, self._layout)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, pattern={self.pattern}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UsageError(
                "the weight of a SparseLinear cannot be assigned: change to_linear() and compress that with from_linear"
            )
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLinear:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(_PICKLE)

    # The tensors of the weight

    @property
    def _operator(self) -> str:
        return "bitmap_linear" if self.pattern == UNSTRUCTURED else "nm_linear"

    @property
    def _nm(self) -> Pattern | None:
        return None if self.pattern == UNSTRUCTURED else Pattern.parse(self.pattern)

    def _decompress(self) -> torch.Tensor:
        return get_layout(self.layout).decompress(self._tensors(), self.shape, self._nm)

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self._tensor_names]

    def _weight_tensors(self) -> Sequence[torch.Tensor]:
        first, *others = self._tensor_names
        try:
            return [self._parameters[first], *(self._buffers[name] for name in others)]  # type: ignore[list-item]
        except KeyError:  # a replica of nn.DataParallel has plain attributes
            return self._tensors()

    def _find_call(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Call | None:
        if not self.out_features:
            return None
        pattern = "" if self.pattern == UNSTRUCTURED else self.pattern
        return dispatch.bind(x, tensors, bias, self.shape, pattern, self._layout)

    def _hold(self, weight: CompressedWeight, layout: str) -> None:
        if layout not in LAYOUTS:
            load_backends()  # whose layout it may be
        found = get_layout(layout)
        reason = f"it is for {found.operator}" if found.operator != self._operator else found.supports(weight)
        if reason is not None:
            raise UsageError(f"layout {layout!r} cannot hold this {self.pattern} weight ({reason}); choose another")
        self.forget_calls()
        for name in self._tensor_names:
            delattr(self, name)
        tensors = found.pack(weight)
        canonical = layout == CANONICAL[self._operator]
        names = tensor_names(self.pattern) if canonical else tuple(f"packed_{i}" for i in range(len(tensors)))
        for name, tensor in zip(names, tensors, strict=True):
            if name == names[0]:
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
            else:
                self.register_buffer(name, tensor.detach())
        self._tensor_names, self._layout, self._dtype = names, layout, weight.values.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        probe = torch.empty(0, dtype=self._dtype, device=self._tensors()[0].device)
        moved = fn(probe)
        if moved.dtype == probe.dtype and moved.device == probe.device:
            held = {id(tensor) for tensor in self._tensors()}

            def apply(tensor: torch.Tensor) -> torch.Tensor:
                # Packed values may have the dimensions of images, but no memory format.
                if tensor.dim() < 4 or id(tensor) not in held:
                    return fn(tensor)
                flat = tensor.flatten()
                applied = fn(flat)
                return tensor if applied is flat else applied.view(tensor.shape)

            return super()._apply(apply, recurse)  # type: ignore[return-value]
        # A packed layout may depend on the type or the device: go through the canonical form.
        layout, weight = self.layout, self.compressed()
        self._hold(weight, CANONICAL[self._operator])
        del weight
        super()._apply(fn, recurse)
        self._dtype = moved.dtype
        if moved.device == probe.device and get_layout(layout).supports(self.compressed()) is None:
            self.set_layout(layout)
        return self

    # state_dict: the weight canonical whatever the layout, the rest as in any module

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        others: dict[str, Any] = {}
        super()._save_to_state_dict(others, prefix, keep_vars)
        for name in self._tensor_names:
            del others[prefix + name]
        for name, tensor in to_tensors(self.compressed()).items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        destination.update(others)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = {name: prefix + name for name in tensor_names(self.pattern)}
        given = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        if len(given) == len(keys):
            try:
                self._load_weight(given, local_metadata.get("assign_to_params_buffers", False))
            except (SparsityError, NonFiniteError) as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
        packed = {prefix + name for name in self._tensor_names} - set(keys.values())
        if strict:
            missing_keys.extend(key for name, key in keys.items() if name not in given)
            unexpected_keys.extend(sorted(packed & state_dict.keys()))
        weights = packed | set(keys.values())
        others = {key: value for key, value in state_dict.items() if key not in weights}
        absent: list[str] = []
        super()._load_from_state_dict(others, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in absent if key not in weights)

    def _load_weight(self, given: Mapping[str, torch.Tensor], assign: bool) -> None:
        weight = from_tensors(given, self.shape, self.pattern)
        weight.validate()
        device, layout = self._tensors()[0].device, self._layout
        if not assign:
            cast = to_tensors(weight.to(device=device, dtype=self._dtype))
            weight = from_tensors({name: tensor.clone() for name, tensor in cast.items()}, self.shape, self.pattern)
        elif weight.values.device != device or get_layout(layout).supports(weight) is not None:
            layout = CANONICAL[self._operator]
        self._hold(weight, layout)
