"""Linears that share an input (q, k and v; gate and up) run as one call at decode.

Nothing is said about the model: a layer that is called with the very tensor that the layer before it was called with
becomes that layer's follower. From then on its product is computed along with the leader's, and handed over when it is
asked for; a leader whose followers were not asked for several times computes nothing ahead any more. Every thread has
its own memory of the last input. A change of the input in place in between is noticed, unless it is made through
``.data`` or NumPy.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import torch

from wandapp_kernels.backends import Call

if TYPE_CHECKING:
    from wandapp_kernels.runtime.kernel_linear import KernelLinear

# Beyond, a call is long and its overhead short.
MOST_TOKENS = 64
MOST_MISSES = 8


class Followers:
    """The layers that a leader computes ahead for, and how often one of them was not asked for."""

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


class _Last(threading.local):
    """The last input of this thread, the first call on it, and what was computed ahead and not asked for yet."""

    x: torch.Tensor | None = None
    version = -1
    leader: weakref.ref[KernelLinear] | None = None
    call: Call | None = None
    ready: tuple[tuple[weakref.ref[KernelLinear], torch.Tensor], ...] = ()


_last = _Last()


def take(layer: KernelLinear, x: torch.Tensor) -> torch.Tensor | None:
    """What was computed ahead for ``layer`` on x, if anything was."""
    last = _last
    if last.x is not x or not last.ready or last.version != x._version:
        return None
    for position, (owner, y) in enumerate(last.ready):
        if owner() is layer:
            last.ready = last.ready[:position] + last.ready[position + 1 :]
            return y
    return None


def run(layer: KernelLinear, call: Call, x: torch.Tensor, given: torch.Tensor, tokens: int) -> torch.Tensor:
    """``call(x)``, and what the layer's followers will ask for.

    Args:
        layer: whose call it is.
        x: ``[..., K]``, contiguous.
        given: what the layer was called with: x, or what x is a copy of.
        tokens: rows of x.
    """
    if given.is_inference():  # such tensors do not count their changes
        return call(x)
    last, version = _last, given._version
    leader = last.leader() if last.leader is not None else None
    if last.x is given and last.version == version:
        if leader is not None and leader is not layer and last.call is not None and last.call.fits(call):
            leader.followers.add(layer)
        return call(x)
    if last.ready and leader is not None:
        leader.followers.miss()
    last.x, last.version, last.leader, last.call, last.ready = given, version, weakref.ref(layer), call, ()
    members = layer.followers.members
    if not members:
        return call(x)
    owners, calls = [], []
    for member in members:
        follower = member()
        other = None if follower is None else follower.call_for(x, tokens)
        if other is not None and call.fits(other):
            owners.append(member)
            calls.append(other)
    y, *ahead = call.together(calls, x)
    last.ready = tuple(zip(owners, ahead, strict=True))
    return y
