from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from wandapp_kernels.errors import ModelError
from wandapp_kernels.models.blocks import find_decoder, stacked_parameters

NAMES = {"opt": "model.decoder.layers", "gpt2": "transformer.h"}


def linears(count: int, size: int = 8) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(size, size)) for _ in range(count))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_finds_the_blocks_of_every_architecture(arch: str) -> None:
    model = tiny_model(arch)
    decoder = find_decoder(model)
    assert decoder.name == NAMES.get(arch, "model.layers")
    assert decoder.blocks is model.get_submodule(decoder.name)
    assert len(decoder.blocks) == model.config.num_hidden_layers
    assert model.get_submodule(decoder.block_name(1)) is decoder.blocks[1]


def test_a_single_block_is_enough() -> None:
    assert len(find_decoder(tiny_model("llama", num_hidden_layers=1)).blocks) == 1


def test_a_large_vocabulary_does_not_count_against_the_blocks() -> None:
    model = tiny_model("llama", vocab_size=4000)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert find_decoder(model).name == "model.layers"


def test_experts_in_a_list_inside_a_block_do_not_win() -> None:
    block = nn.Module()
    block.mixer = nn.Linear(8, 8)
    block.experts = linears(16)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert find_decoder(model).name == "layers"


def test_the_list_with_more_weights_wins_not_the_longer_one() -> None:
    model = nn.Module()
    model.vision = nn.Module()
    model.vision.layers = linears(5, size=4)
    model.text = nn.Module()
    model.text.layers = linears(2, size=32)
    assert find_decoder(model).name == "text.layers"


def test_a_list_with_an_entry_without_linear_layers_is_no_decoder() -> None:
    model = nn.Module()
    model.mixed = nn.ModuleList([nn.Linear(32, 32), nn.LayerNorm(32)])
    model.layers = linears(6, size=16)
    assert find_decoder(model).name == "layers"


def test_linear_layers_outside_the_blocks_may_not_outweigh_them() -> None:
    model = nn.Module()
    model.layers = linears(2)
    model.mystery = nn.Parameter(torch.zeros(1000, 100))
    with pytest.raises(ModelError, match="hold only 0% of"):
        find_decoder(model)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(3, 3)), nn.ModuleDict({"layers": nn.ModuleList()})])
def test_no_blocks(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_decoder(model)


def bert() -> AutoConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoConfig.for_model("bert", vocab_size=32, **sizes)


def test_encoders_and_headless_models_are_refused() -> None:
    for model in (
        AutoModelForMaskedLM.from_config(bert()),
        AutoModel.from_config(bert()),
        tiny_model("llama").model,
    ):
        with pytest.raises(ModelError, match="AutoModelForCausalLM"):
            find_decoder(model)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused(kind: str) -> None:
    sizes = {
        "t5": {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 2, "num_heads": 2},
        "bart": {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
        },
    }[kind]
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, vocab_size=32, **sizes))
    with pytest.raises(ModelError, match="encoder-decoder"):
        find_decoder(model)


def test_convolutions_and_broadcast_scales_are_no_expert_stacks() -> None:
    assert stacked_parameters(nn.Conv1d(4, 4, 3)) == {}
    module = nn.Module()
    module.scale = nn.Parameter(torch.ones(1, 1, 8))
    module.experts = nn.Parameter(torch.ones(2, 3, 4))
    assert list(stacked_parameters(module)) == ["experts"]
