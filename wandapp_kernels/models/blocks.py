"""Finding the decoder blocks of a causal language model by its shape, whatever its architecture calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModelError

_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Decoder:
    """The decoder blocks in the order they run, and where they are: ``model.layers``, ``transformer.h``."""

    blocks: nn.ModuleList
    name: str

    def block_name(self, index: int) -> str:
        """The dotted name of block ``index`` in the model."""
        return f"{self.name}.{index}"


def find_decoder(model: nn.Module) -> Decoder:
    """The list of decoder blocks of a decoder-only model.

    Taken is the outermost `nn.ModuleList` whose entries all hold weights of linear maps (`nn.Linear`, transformers'
    `Conv1D`, fused experts) and together hold most of them. It must hold more than half of the model's weights other
    than the embeddings and the output head, so that pruning its blocks means pruning the model. Lists inside a block,
    such as the experts of a mixture, are never taken.

    Raises:
        ModelError: the model is an encoder or an encoder-decoder, or no list of blocks holds most of its weights.
    """
    _refuse_encoders(model)
    best: Decoder | None = None
    most = 0
    for name, blocks in _outermost_lists(model):
        sizes = [_linear_weights(block) for block in blocks]
        if all(sizes) and sum(sizes) > most:
            best, most = Decoder(blocks, name), sum(sizes)
    kind = type(model).__name__
    if best is None:
        raise ModelError(f"{kind} has no list of decoder blocks with linear layers; give a decoder-only language model")
    total = _body_weights(model)
    if most <= _LEAST_SHARE * total:
        raise ModelError(
            f"the linear layers in {best.name} hold only {most / total:.0%} of {kind}'s weights outside its embeddings,"
            " so the layout of its blocks is not understood; give another model or open an issue"
        )
    return best


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own 3-D parameters that stack one matrix per expert, by name; convolutions have none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return {}
    # a dimension of 1 is there to broadcast (a scale per channel): no matrix
    return {name: p for name, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1}


def _refuse_encoders(model: nn.Module) -> None:
    kind = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{kind} is an encoder-decoder; only decoder-only language models can be pruned, choose one")
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and not can_generate():
        raise ModelError(
            f"{kind} cannot generate text: it is an encoder or lacks its language-model head; "
            "load a decoder-only model with AutoModelForCausalLM"
        )


def _outermost_lists(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, nn.ModuleList) and len(child) > 0:
            yield path, child
        else:
            yield from _outermost_lists(child, path)


def _linear_weights(block: nn.Module) -> int:
    count = 0
    for module in block.modules():
        if isinstance(module, nn.Linear | Conv1D):
            count += module.weight.numel()
        count += _count(stacked_parameters(module).values())
    return count


def _body_weights(model: nn.Module) -> int:
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside.append(head)
    return _count(model.parameters()) - _count(nn.ModuleList(outside).parameters())


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
