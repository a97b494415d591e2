"""Models that were made under ``torch.inference_mode()``, whose tensors autograd takes no part in, ever."""

from __future__ import annotations

import torch
from torch import nn


@torch.inference_mode(False)
@torch.no_grad()
def leave_inference_mode(model: nn.Module) -> None:
    """Give ``model`` plain tensors, in place: equal Parameters and buffers, tied as they were.

    One at a time, so that the model is not in memory twice. Tensors that are plain already are kept.
    """
    # By id: what is looked up was there from the start, so that nothing made here can have its id.
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_inference():
                continue
            if id(parameter) not in plain:
                plain[id(parameter)] = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
            module._parameters[name] = plain[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()
