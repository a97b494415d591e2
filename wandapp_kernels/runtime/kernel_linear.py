"""The way from a layer to its kernel at decode, where finding a kernel would take as long as running it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import nn

from wandapp_kernels.backends import Call, Held, epoch, marks_of
from wandapp_kernels.ops.operator import is_plain
from wandapp_kernels.runtime import shared_input

_CALLS, _FOLLOWERS = "_kernel_calls", "_kernel_followers"


class KernelLinear(nn.Linear):
    """An ``nn.Linear`` whose product a kernel computes. Subclasses say what the weight is and ask for the kernel."""

    def _weight_tensors(self) -> Sequence[torch.Tensor]:
        """The tensors of the weight, values first."""
        raise NotImplementedError

    def _find_call(self, x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Call | None:
        """The call for x ``[..., K]``, on the device of the tensors and in their type; None: no kernel fits."""
        raise NotImplementedError

    def held(self) -> Held:
        """The tensors of the weight, and the bias, as the layer holds them now."""
        try:
            return self._weight_tensors(), self._parameters["bias"]
        except KeyError:  # parametrized, pruned by torch, or a replica: a plain attribute
            return self._weight_tensors(), self.bias

    def _run_kernel(self, x: torch.Tensor) -> torch.Tensor | None:
        """``x @ Wᵀ + bias``, or None when this is no plain call on a fitting x ``[..., K]``."""
        held = self.held()
        if not is_plain(x, held[1]) or not (tokens := self._tokens(x, held)):
            return None
        marks = marks_of(held)
        if (ahead := shared_input.take(self, x, held, marks)) is not None:
            return ahead
        given = x
        if not x.is_contiguous():
            x = x.contiguous()
        call = self._call(x, held, marks, tokens)
        if call is None:
            return None
        if call.kind is None or tokens > shared_input.MOST_TOKENS:
            return call(x, held)
        return shared_input.run(self, call, x, given, held)

    def _tokens(self, x: torch.Tensor, held: Held) -> int:
        """How many x ``[..., K]`` has; 0 when it does not fit the tensors of the weight, or they are no plain ones."""
        values, bias, shape, columns = held[0][0], held[1], x.shape, self.in_features
        if not shape or shape[-1] != columns or x.dtype != values.dtype:
            return 0
        # Kernels get addresses: they would not see that signs are to be turned.
        if values.is_neg() or (bias is not None and bias.is_neg()):
            return 0
        # Half the time of comparing devices; `_call` does that once, for -1 is the CPU's number and that of meta.
        if x.get_device() != values.get_device():
            return 0
        return x.numel() // columns if columns else 0

    def _call(self, x: torch.Tensor, held: Held, marks: list[Hashable], tokens: int) -> Call | None:
        """The call for contiguous x, kept from the last time; None when x, weight and bias do not go together."""
        known: _KnownCalls | None = self.__dict__.get(_CALLS)
        now = epoch()
        if known is None or known.marks != marks or known.epoch != now:
            tensors, bias = held
            if bias is not None and (bias.dtype != x.dtype or bias.device != x.device or not bias.is_contiguous()):
                return None
            if not all(tensor.device == x.device and tensor.is_contiguous() for tensor in tensors):
                return None
            known = self.__dict__[_CALLS] = _KnownCalls(marks, now)
        key = ((tokens - 1).bit_length(), torch.get_num_threads())
        call = known.calls.get(key)
        if call is None and (call := self._find_call(x, *held)) is not None:
            known.calls[key] = call
        return call

    def call_ahead(self, x: torch.Tensor) -> tuple[Call, Held, list[Hashable]] | None:
        """The call that a plain forward of contiguous x would make now, if it would make one."""
        held = tensors, bias = self.held()
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, bias) if t is not None)
        if learning or not (tokens := self._tokens(x, held)):
            return None
        marks = marks_of(held)
        call = self._call(x, held, marks, tokens)
        return None if call is None else (call, held, marks)

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
    """Calls by bucket of tokens and threads, good for tensors with these marks and for one epoch of choices."""

    __slots__ = ("calls", "epoch", "marks")

    def __init__(self, marks: list[Hashable], epoch: int):
        self.marks, self.epoch = marks, epoch
        self.calls: dict[tuple[int, int], Call] = {}

    def __reduce__(self) -> tuple[type[_KnownCalls], tuple[list[Hashable], int]]:
        """A copy of the layer, or the layer in another process, has other tensors: it starts without calls."""
        return _KnownCalls, ([], -1)
