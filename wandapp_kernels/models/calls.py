"""The recorded arguments of decoder blocks, each tensor stored once, and calling a block with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..errors import ModelError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Hidden:
    def __repr__(self) -> str:
        return "HIDDEN"


HIDDEN = _Hidden()  # stands in recorded keyword arguments where the model passes the hidden state by name


@dataclass
class BlockCalls:
    """What a model calls each of its decoder blocks with.

    Attributes:
        hidden: block 0's input per sample, ``[1, T, H]`` in the model's dtype.
        calls: ``calls[block][sample]``, the other arguments; equal ones are one object.
        grows: ``grows[block]`` tells for each tensor of a call whether its leading size grows with the batch size.
    """

    hidden: list[torch.Tensor]
    calls: list[list[Arguments]]
    grows: list[list[bool]]
    _tiled: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def arguments(self, block_index: int, sample: int, batch: int = 1) -> Arguments:
        """The arguments of a block besides the hidden state, as positional and keyword arguments.

        Args:
            block_index: position of the block in the decoder.
            sample: position in `hidden`.
            batch: how many samples the block is run with at once. Tensors that the model itself makes larger for larger
                batches are repeated; the values are those of ``sample``, so a batch is only right where `shared` holds.

        Returns:
            args, kwargs: tensors are where the model ran, in the dtype it passes; caches are left out (None).
        """
        grows = iter(self.grows[block_index])
        # containers are made anew, so that a block that writes into one leaves the record as it is
        return map_tensors(
            self.calls[block_index][sample],
            lambda tensor: self._tile(tensor, batch) if next(grows) else tensor,
        )

    def shared(self) -> bool:
        """Whether every block gets the same arguments for all samples, so that samples can be run as one batch."""
        return all(call is calls[0] for calls in self.calls for call in calls)

    def _tile(self, tensor: torch.Tensor, batch: int) -> torch.Tensor:
        if batch == 1:
            return tensor
        key = (id(tensor), batch)
        if key not in self._tiled:
            first, *rest = tensor.shape
            self._tiled[key] = tensor.expand(batch, *rest) if first == 1 else tensor.repeat(batch, *[1] * len(rest))
        return self._tiled[key]


class CallStore:
    """Keeps one copy of equal tensors and of equal calls, so that memory grows neither with samples nor with blocks."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], torch.Tensor] = {}
        self._calls: dict[Any, Arguments] = {}
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def start_pass(self) -> None:
        """Begin a forward pass; within one, a tensor is known by identity and compared by content only once."""
        self._seen.clear()

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The stored equal of a call, without key-value caches."""
        call = map_tensors(_without_caches((args, kwargs)), self._tensor)
        return self._calls.setdefault(_key(call), call)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._seen:
            # a digest stands for the content: comparing with all stored tensors would take quadratic time
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            key = (blake2b(content, digest_size=16).digest(), tensor.shape, tensor.dtype, tensor.device)
            if key not in self._tensors:
                self._tensors[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
            self._seen[id(tensor)] = (tensor, self._tensors[key])
        return self._seen[id(tensor)][1]


def call_block(
    block: nn.Module, hidden: torch.Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """Run one block on ``hidden [B, T, H]``; returns the next hidden state ``[B, T, H]``, also out of a tuple."""
    kwargs = dict(kwargs or {})
    name = next((name for name, value in kwargs.items() if value is HIDDEN), None)
    if name is not None:
        return hidden_of(block(*args, **{**kwargs, name: hidden}))
    return hidden_of(block(hidden, *args, **kwargs))


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state a block returns: its output, or the first item of it."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(first, torch.Tensor):
        raise ModelError(
            f"a decoder block returns a {type(output).__name__} that does not begin with its hidden state, "
            "which is not understood; give another model"
        )
    return first


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden state of a call and the rest: it comes first, or by keyword as a floating-point ``[B, T, H]``."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], args[1:], kwargs
    for name in ("hidden_states", *kwargs):
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point():
            return value, args, {**kwargs, name: HIDDEN}
    raise ModelError(
        "a decoder block is called without a hidden state [batch, tokens, hidden], which is not understood; "
        "give another model"
    )


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with every tensor in its tuples, lists and mappings replaced; containers are new, the rest is kept."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in ``value``, in the order `map_tensors` meets them."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found


def _without_caches(value: Any) -> Any:
    """Key-value caches become None: every calibration sample is a sequence of its own."""
    if isinstance(value, Cache):
        return None
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_without_caches(item) for item in value)
    if isinstance(value, dict):
        return {key: _without_caches(item) for key, item in value.items()}
    return value


def _key(value: Any) -> Any:
    """Equal for calls with the same stored tensors and equal other values."""
    if isinstance(value, torch.Tensor):
        return id(value)
    if isinstance(value, tuple | list):
        return (type(value), *(_key(item) for item in value))
    if isinstance(value, dict):
        return (dict, *((name, _key(item)) for name, item in value.items()))
    return (type(value), value if type(value).__hash__ is not None else id(value))
