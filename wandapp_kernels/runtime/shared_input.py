"""Linears that share an input (q, k and v; gate and up) run as one call at decode.

Nothing is said about the model: a layer that is called with the very tensor that the layer before it was called with
becomes that layer's follower. From then on its product is computed along with the leader's, and handed over when it is
asked for, provided that neither the input nor the follower has changed in between. A leader whose followers were not
asked for several times in a row computes nothing ahead any more. Every thread has its own memory of the last input.
Inputs and weights that were made in inference mode are left out: they do not count their changes.

A change of the values through ``.data`` or NumPy, between two layers that share an input, is not noticed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from wandapp_kernels.backends import Call, Held, epoch
from wandapp_kernels.errors import WandappError

if TYPE_CHECKING:
    from wandapp_kernels.runtime.kernel_linear import KernelLinear

# Beyond, a call is long and its overhead short.
MOST_TOKENS = 64
MOST_MISSES = 8


class Followers:
    """The layers that a leader computes ahead for, and how often in a row one of them was not asked for."""

    __slots__ = ("members", "misses")

    def __init__(self) -> None:
        self.members: tuple[weakref.ref[KernelLinear], ...] = ()
        self.misses = 0

    def __reduce__(self) -> tuple[type[Followers], tuple[()]]:
        """A copy of a layer starts with none: the members are the original's neighbours."""
        return Followers, ()

    def add(self, layer: KernelLinear) -> None:
        """Take a layer in, unless too much was computed for nothing already."""
        if self.misses < MOST_MISSES and all(member() is not layer for member in self.members):
            self.members = (*(member for member in self.members if member() is not None), weakref.ref(layer))

    def miss(self) -> None:
        """Note that something computed ahead was not asked for."""
        self.misses += 1
        if self.misses >= MOST_MISSES:
            self.members = ()


class _Ahead(NamedTuple):
    """A product computed ahead, and what it was computed from."""

    owner: weakref.ref[KernelLinear]
    tensors: list[weakref.ref[torch.Tensor]]  # marks alone may be those of a new tensor in the place of a freed one
    marks: list[Hashable]
    versions: list[int]
    product: torch.Tensor


class _Last(threading.local):
    """The last input of this thread, the first layer called with it, and what nobody has asked for yet."""

    x: weakref.ref[torch.Tensor] | None = None
    state: tuple[Hashable, ...] = ()
    leader: weakref.ref[KernelLinear] | None = None
    kind: Hashable = None
    ahead: tuple[_Ahead, ...] = ()


_last = _Last()


def _state(x: torch.Tensor) -> tuple[Hashable, ...]:
    return x._version, x.data_ptr(), x.shape, epoch()


def _present(held: Held) -> Sequence[torch.Tensor]:
    tensors, bias = held
    return tensors if bias is None else (*tensors, bias)


def _versions(held: Held) -> list[int] | None:
    """How often each tensor was changed; None where one, made in inference mode, does not count that."""
    try:
        return [tensor._version for tensor in _present(held)]
    except RuntimeError:
        return None


def take(layer: KernelLinear, x: torch.Tensor, held: Held, marks: list[Hashable]) -> torch.Tensor | None:
    """What was computed ahead for ``layer`` on x, if something was, from what the layer holds now."""
    last = _last
    if not last.ahead or last.x is None or last.x() is not x or last.state != _state(x):
        return None
    for position, found in enumerate(last.ahead):
        if found.owner() is layer:
            last.ahead = last.ahead[:position] + last.ahead[position + 1 :]
            leader = last.leader() if last.leader is not None else None
            if not last.ahead and leader is not None:
                leader.followers.misses = 0
            if found.marks != marks or found.versions != _versions(held):
                return None
            same = all(ref() is tensor for ref, tensor in zip(found.tensors, _present(held), strict=True))
            return found.product if same else None
    return None


def run(layer: KernelLinear, call: Call, x: torch.Tensor, given: torch.Tensor, held: Held) -> torch.Tensor:
    """``call(x, held)``, and what the layer's followers will ask for.

    Args:
        layer: whose call it is, of some kind.
        x: ``[..., K]``, contiguous.
        given: what the layer was called with: x, or what x is a copy of.
        held: of the layer.
    """
    if given.is_inference():  # such tensors do not count their changes
        return call(x, held)
    last, state = _last, _state(given)
    leader = last.leader() if last.leader is not None else None
    if last.x is not None and last.x() is given and last.state == state:
        if leader is not None and leader is not layer and last.kind == call.kind:
            leader.followers.add(layer)
        return call(x, held)
    if last.ahead and leader is not None:
        leader.followers.miss()
    last.x, last.state, last.kind, last.ahead = weakref.ref(given), state, call.kind, ()
    last.leader = weakref.ref(layer)
    others = []
    for member in layer.followers.members:
        follower = member()
        try:
            found = None if follower is None else follower.call_ahead(x)
        except WandappError:  # the follower will say so itself
            found = None
        if found is not None and found[0].kind == call.kind and (versions := _versions(found[1])) is not None:
            others.append((member, *found, versions))
    if not others:
        return call(x, held)
    y, *products = call.run_together(x, [(other, its) for _, other, its, *_ in others], held)
    last.ahead = tuple(
        _Ahead(member, [weakref.ref(tensor) for tensor in _present(its)], marks, versions, product)
        for (member, _, its, marks, versions), product in zip(others, products, strict=True)
    )
    return y
