"""What ``SparseLinear.weight`` returns: the dense weight, which nothing is written into by mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from wandapp_kernels.errors import UsageError

_ALIASES = (torch.Tensor.data.__get__, torch.Tensor.detach)  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_NO_WRITES = {"__invert__", "__int__", "__index__", "requires_grad_"}


class DecompressedWeight(torch.Tensor):
    """A copy that is made at every read: what is computed from it are plain tensors, and writing into it raises.

    Adapters are merged with ``layer.weight.data += delta``; into a copy, that would lose them without a word. A
    Parameter made of it is its maker's, and may be written.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs):
            raise UsageError(
                "the weight of a SparseLinear is decompressed anew at every read, so what is written into it would be "
                "lost; make the model dense first (desparsify(model), or to_linear() of the layer)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            return result.as_subclass(cls) if func in _ALIASES and _guarded(args[0]) else result

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.clone()
        memo[id(self)] = copied = copied if _guarded(self) else nn.Parameter(copied, self.requires_grad)
        return copied


def _guarded(tensor: Any) -> bool:
    return isinstance(tensor, DecompressedWeight) and not isinstance(tensor, nn.Parameter)


def _writes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if _guarded(kwargs.get("out")):
        return True
    # nn.init passes what it fills by name.
    if not _guarded(args[0] if args else kwargs.get("tensor")):
        return False
    name = getattr(func, "__name__", "")
    if name in _NO_WRITES:
        return False
    if name.startswith("__"):
        return func == _SET_DATA or name.startswith(("__i", "__setitem"))
    return name.endswith("_")
