"""What is asked of a model before anything is done to it."""

from __future__ import annotations

from typing import Any

from torch import nn

from wandapp_kernels.errors import UsageError


def require_module(model: Any) -> None:
    """Raise UsageError for what is no module; ``load`` returns a model together with its tokenizer."""
    if not isinstance(model, nn.Module):
        hint = "give its .model" if isinstance(getattr(model, "model", None), nn.Module) else "give a torch module"
        raise UsageError(f"the model is a {type(model).__name__}, which is no torch module; {hint}")
