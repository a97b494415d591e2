"""The way from a layer to its kernel at decode, where finding a kernel would take as long as running it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from wandapp_kernels import dispatch
from wandapp_kernels.backends import Call
from wandapp_kernels.ops.operator import is_plain
from wandapp_kernels.runtime import shared_input

_CALLS, _FOLLOWERS = "_kernel_calls", "_kernel_followers"


class KernelLinear(nn.Linear):
    """An ``nn.Linear`` whose product a kernel computes. Subclasses say what the weight is and ask for the kernel."""

    def _weight_tensors(self) -> list[torch.Tensor]:
        """The tensors of the weight, values first."""
        raise NotImplementedError

    def _find_call(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Call:
        """The call for x ``[..., K]``, which is on the device of the tensors and in their type."""
        raise NotImplementedError

    def _run_kernel(self, x: torch.Tensor) -> torch.Tensor | None:
        """``x @ Wᵀ + bias``, or None when this is no plain call on a fitting x ``[..., K]``."""
        bias = self._parameters["bias"]
        if not is_plain(x, bias):
            return None
        if (ahead := shared_input.take(self, x)) is not None:
            return ahead
        tensors = self._weight_tensors()
        size, columns = x.numel(), self.in_features
        if not size or x.shape[-1] != columns or x.dtype != tensors[0].dtype or x.device != tensors[0].device:
            return None
        given, tokens = x, size // columns
        if not x.is_contiguous():
            x = x.contiguous()
        call = self._call(x, tokens, tensors, bias)
        if call is None:
            return None
        return shared_input.run(self, call, x, given, tokens) if tokens <= shared_input.MOST_TOKENS else call(x)

    def _call(
        self, x: torch.Tensor, tokens: int, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None
    ) -> Call | None:
        """The call for x, kept from the last time; None when weight and bias do not go together."""
        known: _KnownCalls | None = self.__dict__.get(_CALLS)
        addresses = [tensor.data_ptr() for tensor in tensors]
        if bias is not None:
            addresses.append(bias.data_ptr())
        epoch = dispatch.epoch()
        if known is None or known.addresses != addresses or known.epoch != epoch:
            if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
                return None
            if not all(tensor.is_contiguous() for tensor in tensors):
                return None
            known = self.__dict__[_CALLS] = _KnownCalls(addresses, epoch)
        key = ((tokens - 1).bit_length(), torch.get_num_threads())
        call = known.calls.get(key)
        if call is None:
            call = known.calls[key] = self._find_call(x, tensors, bias)
        return call

    def call_for(self, x: torch.Tensor, tokens: int) -> Call | None:
        """The call of a plain forward of contiguous x, if it would make one."""
        bias = self._parameters["bias"]
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        return self._call(x, tokens, self._weight_tensors(), bias)

    @property
    def followers(self) -> shared_input.Followers:
        """See `shared_input`."""
        found: shared_input.Followers | None = self.__dict__.get(_FOLLOWERS)
        if found is None:
            found = self.__dict__[_FOLLOWERS] = shared_input.Followers()
        return found

    def forget_calls(self) -> None:
        """Let go of everything that was found out about calling the kernel; it is found out again."""
        self.__dict__.pop(_CALLS, None)
        self.__dict__.pop(_FOLLOWERS, None)


class _KnownCalls:
    """Calls by bucket of tokens and threads, good for tensors at these addresses and for one epoch of dispatch."""

    __slots__ = ("addresses", "calls", "epoch")

    def __init__(self, addresses: list[int], epoch: int):
        self.addresses, self.epoch = addresses, epoch
        self.calls: dict[tuple[int, int], Call] = {}

    def __reduce__(self) -> tuple[type[_KnownCalls], tuple[list[int], int]]:
        """A copy of the layer, or the layer in another process, has other tensors: it starts without calls."""
        return _KnownCalls, ([], -1)
