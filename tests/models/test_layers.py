from __future__ import annotations

import pytest
from tiny_models import tiny_model
from torch import nn

from wandapp_kernels.errors import UsageError
from wandapp_kernels.models.layers import check_ignored, layer_names
from wandapp_kernels.models.workspace import BlockWorkspace


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_every_layer_that_can_be_pruned_has_a_name(arch: str) -> None:
    model = tiny_model(arch)
    names = set(layer_names(model))
    blocks = "transformer.h" if arch == "gpt2" else "model.layers"
    for index, block in enumerate(model.get_submodule(blocks)):
        workspace = BlockWorkspace(block, f"{blocks}.{index}", "cpu")
        assert workspace.linears.keys() <= names
    assert "lm_head" in names


def test_names_that_choose_nothing() -> None:
    model = tiny_model("mixtral")
    check_ignored(model, [])
    check_ignored(model, ["lm_head", "q_proj", "mlp.experts", "re:experts\\.3\\.", "1.down_proj"])
    for wrong in ("q_prj", "self_attn", "experts.4.down_proj", "model.embed_tokens", "re:layers\\.3\\."):
        with pytest.raises(UsageError, match="no linear layer of the model; there is lm_head, for example"):
            check_ignored(model, ["q_proj", wrong])
    with pytest.raises(UsageError, match=r"of no linear layer of the model$"):
        check_ignored(nn.LayerNorm(4), ["q_proj"])
