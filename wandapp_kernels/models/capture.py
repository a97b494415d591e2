"""What a model calls each of its decoder blocks with, recorded without running the blocks.

A block is a function ``block(hidden, *args, **kwargs) -> hidden``. Only ``hidden`` changes from block to block; masks,
positions and rotary embeddings are computed before the first one. So each block's `forward` is replaced for a moment by
one that records its arguments and hands ``hidden [1, T, H]`` on as it is, and the pass is cut off at the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, NonFiniteError, UsageError
from .blocks import Decoder
from .calls import Arguments, BlockCalls, CallStore, call_block, hidden_of, split_hidden, tensors_in

__all__ = ["BlockCalls", "call_block", "capture"]

_PROBE_TOKENS = 8
_ATTENTION = ("eager", "sdpa")

_Form = Callable[[torch.Tensor], Any]  # puts a hidden state into what the model's blocks return


@torch.no_grad()
def capture(
    model: nn.Module, decoder: Decoder, token_ids: torch.Tensor, device: torch.device | str = "cpu"
) -> BlockCalls:
    """Record what the model calls each decoder block with, for every sample, one sample at a time.

    Equal tensors are stored once, so a model whose masks and positions do not depend on the tokens needs the memory of
    one sample. A few tokens are also run through the real blocks, to check that a token changes nothing before it and
    that the blocks, run one after the other with the recorded arguments, give what the model computes.

    Args:
        model: a decoder-only language model; left as it was, also after an error.
        decoder: its blocks, from `find_decoder`.
        token_ids: ``[N, T]`` integers, N calibration samples of T tokens.
        device: where the hidden states are kept.

    Raises:
        UsageError: ``token_ids`` is not a non-empty integer matrix.
        ModelError: the model is not causal, its blocks pass more to each other than the hidden state, or its attention
            is neither eager nor sdpa (what the others are called with cannot be used in fp32).
        NonFiniteError: the embedding output is NaN or infinite somewhere.
    """
    if token_ids.dim() != 2 or token_ids.numel() == 0 or token_ids.is_floating_point():
        raise UsageError(
            f"the token ids must be an integer matrix [samples, tokens], not {token_ids.dtype} {[*token_ids.shape]}"
        )
    _check_attention(model)
    token_ids = token_ids.to(next(model.parameters()).device)
    device = torch.device(device)
    with evaluating(model):
        form = _check_blocks(model, decoder, token_ids[:1, :_PROBE_TOKENS])
        hidden, calls = _record(model, decoder, list(token_ids[:, None]), form, device)
        _, doubled = _record(model, decoder, [token_ids[:1].repeat(2, 1)], form, device)
    return BlockCalls(hidden, calls, [_growing(one[0], two[0]) for one, two in zip(calls, doubled, strict=True)])


class _Stop(Exception):
    """Ends a forward pass at the last block."""


def _record(
    model: nn.Module, decoder: Decoder, inputs: Sequence[torch.Tensor], form: _Form, device: torch.device
) -> tuple[list[torch.Tensor], list[list[Arguments]]]:
    """Block 0's hidden state of each input ``[B, T]``, and the other arguments as ``[block][input]``."""
    store = CallStore()
    hidden: list[torch.Tensor] = []
    calls: list[list[Arguments]] = [[] for _ in decoder.blocks]

    def stand_in(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, args, kwargs = split_hidden(args, kwargs)
        if index == 0:
            _check_hidden(state, inputs[len(hidden)], len(hidden))
            hidden.append(state.detach().to(device, copy=True))
        calls[index].append(store.put(args, kwargs))
        return form(state)

    for ids in inputs:
        store.start_pass()
        _run_to_last_block(model, decoder, ids, stand_in)
    return hidden, calls


def _check_blocks(model: nn.Module, decoder: Decoder, ids: torch.Tensor) -> _Form:
    """Check with ``ids [1, t]`` that the blocks are causal and can be run one by one; returns their output's form."""
    last = ids[0, -1]
    others = ids[ids != last]
    changed = ids.clone()
    changed[0, -1] = others[0] if others.numel() > 0 else int(last == 0)
    output, form = _real_output(model, decoder, ids)
    hidden, calls = _record(model, decoder, [ids], form, output.device)
    other, _ = _real_output(model, decoder, changed)
    if not (output.isfinite().all() and other.isfinite().all()):
        return form  # nothing to compare; whoever runs the blocks one by one can name the guilty module

    kind = type(model).__name__
    # Rounding may differ between the two passes where experts get other tokens, but then in few values or by little.
    limit = 1e-4 * output.abs().mean(dim=-1, keepdim=True)
    differs = ((output - other).abs() > limit)[:, :-1].float()
    if differs.numel() > 0 and differs.mean() > 0.1:
        raise ModelError(f"{kind} is not causal, a token changes what is before it; give a decoder-only language model")

    alone = BlockCalls(hidden, calls, [[False] * len(tensors_in(call[0])) for call in calls])
    state = hidden[0]
    try:
        for index, block in enumerate(decoder.blocks):
            place = next((p.device for p in block.parameters()), state.device)
            state = call_block(block, state.to(place), *alone.arguments(index, 0))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(_not_alone(kind, decoder, f"{type(error).__name__}: {error}")) from error
    off = float((state.to(output.device).float() - output).abs().mean() / output.abs().mean().clamp(min=1e-30))
    if off > torch.finfo(hidden[0].dtype).eps ** 0.5:
        raise ModelError(_not_alone(kind, decoder, f"the outputs differ by {off:.2g} of their size"))
    return form


def _real_output(model: nn.Module, decoder: Decoder, ids: torch.Tensor) -> tuple[torch.Tensor, _Form]:
    """The last block's output ``[1, t, H]`` in fp32, and the form in which the blocks return it."""
    forwards = [block.forward for block in decoder.blocks]
    last: Any = None

    def real(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal last
        last = forwards[index](*args, **kwargs)
        return last

    _run_to_last_block(model, decoder, ids, real)
    output = hidden_of(last).float()
    if isinstance(last, torch.Tensor):
        return output, lambda hidden: hidden
    others = (None,) * (len(last) - 1)
    return output, lambda hidden: (hidden, *others)


def _run_to_last_block(
    model: nn.Module,
    decoder: Decoder,
    ids: torch.Tensor,
    forward: Callable[[int, tuple[Any, ...], dict[str, Any]], Any],
) -> None:
    """One pass in which ``forward(index, args, kwargs)`` stands for every block's own forward, up to the last block.

    The modules stay in their places, so that whatever a model reads off its blocks is there.
    """
    count = len(decoder.blocks)
    following = 0

    def replace(index: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal following
        if index != following:
            raise ModelError(
                f"the model does not run the blocks of {decoder.name} once each and in order, so they cannot be pruned "
                "one by one; give another model"
            )
        following += 1
        output = forward(index, args, kwargs)
        if following == count:
            raise _Stop
        return output

    with _replaced_forwards(decoder, replace):
        try:
            model(input_ids=ids, use_cache=False)
        except _Stop:
            return
    raise ModelError(
        f"the model runs {following} of the {count} blocks in {decoder.name}; make its config agree with its blocks"
    )


@contextmanager
def _replaced_forwards(decoder: Decoder, forward: Callable[..., Any]) -> Iterator[None]:
    # an instance may have a forward of its own already, for instance where weights are off-loaded
    own = [vars(block).get("forward") for block in decoder.blocks]
    try:
        for index, block in enumerate(decoder.blocks):
            block.forward = lambda *args, _index=index, **kwargs: forward(_index, *args, **kwargs)
        yield
    finally:
        for block, before in zip(decoder.blocks, own, strict=True):
            if before is not None:
                block.forward = before
            else:
                vars(block).pop("forward", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), and back to each module's own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _growing(single: Arguments, doubled: Arguments) -> list[bool]:
    """For each tensor of a call, whether a batch of two makes it twice as long."""
    return [
        two.dim() > 0 and two.shape[0] == 2 * one.shape[0]
        for one, two in zip(tensors_in(single), tensors_in(doubled), strict=True)
    ]


def _check_hidden(hidden: torch.Tensor, ids: torch.Tensor, sample: int) -> None:
    if hidden.dim() != 3 or hidden.shape[:2] != ids.shape:
        raise ModelError(
            f"the decoder blocks get hidden states {[*hidden.shape]} for token ids {[*ids.shape]}, but only "
            "[batch, tokens, hidden] is supported; give another model"
        )
    bad = hidden.numel() - int(hidden.isfinite().sum())
    if bad > 0:
        raise NonFiniteError(
            f"the embedding output of sample {sample} has {bad} NaN or infinite values; check the embedding weights"
        )


def _check_attention(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    chosen = getattr(text, "_attn_implementation", None)
    if chosen is not None and chosen not in _ATTENTION:
        raise ModelError(f"the model uses {chosen} attention; load it with attn_implementation='sdpa' or 'eager'")


def _not_alone(kind: str, decoder: Decoder, why: str) -> str:
    return (
        f"the blocks of {kind} ({decoder.name}) pass more to each other than the hidden state and so cannot be pruned "
        f"one by one ({why}); give another model"
    )
