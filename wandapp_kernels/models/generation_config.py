"""A model's own settings for generation: set aside, and written as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def plain_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Within it ``model`` has transformers' default settings instead of its own, which may be None."""
    if not hasattr(model, "generation_config"):
        yield
        return
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def write_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Write ``generation_config.json``, where the model generates and has settings.

    transformers validates before it writes. It then refuses what many published models have, such as a temperature
    without sampling (5.17; 5.23 only where it was changed): hours of pruning must not end with that.
    """
    own = getattr(model, "generation_config", None)
    if own is not None and model.can_generate():
        own.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True, keys_to_pop=["compile_config"])
