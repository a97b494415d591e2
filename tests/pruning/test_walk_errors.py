"""What stops the walk: values that are not finite, by the name of the module, and models that cannot be walked."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from wandapp_kernels import api
from wandapp_kernels.errors import ModelError, NonFiniteError, UsageError
from wandapp_kernels.pruning.methods import build_settings
from wandapp_kernels.pruning.walk import prune_blocks

IDS = token_ids(3, 8)


def prune(model: nn.Module, method: str = "wanda", sparsity: str = "2:4", **changes) -> None:
    prune_blocks(model, IDS, build_settings(method, sparsity, **changes))


def llama() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_weights_that_are_not_finite(value: float, method: str) -> None:
    model = llama()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[:3, 5] = value
    with pytest.raises(NonFiniteError, match=r"^3 of 1536 weights of model\.layers\.1\.mlp\.up_proj are NaN or inf"):
        prune(model, method)


@pytest.mark.parametrize("method", ["gblm", "best"])
def test_damage_is_found_before_the_whole_model_runs(method: str) -> None:
    """Its logits, or its gradients, would only tell that some weight is not finite."""
    model = llama()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[:3, 5] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^3 of 1536 values of model\.layers\.1\.mlp\.up_proj\.weight are NaN"):
        prune(model, method)


def test_logits_that_are_not_finite_while_the_model_writes() -> None:
    model = llama()
    model.lm_head.weight.data *= 1e38
    with pytest.raises(NonFiniteError, match="logits of the dense model are NaN or infinite"):
        prune(model, "best")


def test_a_damaged_weight_that_stays_dense_shows_in_the_next_layers_input() -> None:
    model = llama()
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[2, 5] = torch.nan
    expected = r"^1 of 48 input channels of model\.layers\.0\.mlp\.down_proj are NaN or infinite"
    with pytest.raises(NonFiniteError, match=expected):
        prune(model, ignore=("up_proj",))


def test_embeddings_that_are_not_finite() -> None:
    model = llama()
    model.model.embed_tokens.weight.data[IDS[1, 4], 7] = torch.nan
    count = int((IDS[1] == IDS[1, 4]).sum())
    with pytest.raises(NonFiniteError, match=rf"the embedding output of sample \d has {count} NaN or infinite"):
        prune(model)


def test_activations_that_are_not_finite() -> None:
    model = llama()
    model.model.layers[1].post_attention_layernorm.weight.data[[2, 9]] = torch.inf
    expected = r"^2 of 32 input channels of model\.layers\.1\.mlp\.gate_proj are NaN or infinite"
    with pytest.raises(NonFiniteError, match=expected):
        prune(model)


def test_outputs_that_are_not_finite() -> None:
    model = tiny_model("gpt2", num_hidden_layers=2)
    model.transformer.h[0].mlp.c_proj.bias.data[4] = torch.nan
    expected = rf"^{IDS.numel()} of {IDS.numel() * 32} outputs of transformer\.h\.0 are NaN or infinite"
    with pytest.raises(NonFiniteError, match=expected):
        prune(model)


@pytest.mark.parametrize("method", ["wanda", "wanda++rgs", "pruner-zero"])
def test_scores_that_overflow_name_their_layer(method: str) -> None:
    model = llama()
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[:, 3] = 0.0
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[0, 3] = 3e38
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0(\.mlp\.down_proj)?\b.* NaN or infinite"):
        prune(model, method)


@pytest.mark.parametrize("mask", ["regrow", "keep", "rechoose"])
def test_a_diverging_optimizer_names_its_block(mask: str) -> None:
    changes = {"mask": mask, "relative_lr": 1e30, "samples": 2, "rounds": 2}
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\b.*NaN or infinite"):
        prune(llama(), "wanda++ro", optimizer=changes)


def test_the_advice_for_a_diverging_optimizer_names_the_option() -> None:
    with pytest.raises(NonFiniteError, match=r"loss in model\.layers\.0 became NaN .* \(--relative-lr\)$"):
        prune(llama(), "wanda++ro", optimizer={"mask": "keep", "relative_lr": 1e30, "samples": 2, "rounds": 2})


def test_a_half_precision_stream_that_overflows_is_noticed() -> None:
    """65,504 is the largest fp16 value: a residual stream above it would be infinite in the model's own type."""
    model = tiny_model("gpt2", num_hidden_layers=2).half()
    model.transformer.h[0].mlp.c_proj.bias.data[4] = 6e4
    model.transformer.h[0].attn.c_proj.bias.data[4] = 6e4
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.0\b"):
        prune(model)


def test_encoders_are_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=128, **sizes))
    with pytest.raises(ModelError, match="BertForMaskedLM cannot generate text"):
        prune(model)


def test_models_without_decoder_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="has no list of decoder blocks"):
        prune(nn.Sequential(nn.Embedding(128, 8), nn.Linear(8, 128)))
    with pytest.raises(ModelError, match="has no list of decoder blocks"):
        prune(tiny_model("llama", num_hidden_layers=0))


def test_nothing_left_to_prune_is_an_error() -> None:
    with pytest.raises(ModelError, match="every one matches --ignore"):
        prune(llama(), ignore=("re:layers",))


def test_a_wrong_ignore_pattern_is_reported_before_anything_is_pruned() -> None:
    model, before = llama(), llama()
    with pytest.raises(UsageError, match="not a valid regular expression"):
        prune(model, ignore=("re:(",))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.rand(2, 8), "must be integer token ids"),
        (torch.ones(8, dtype=torch.long), "must be integer token ids"),
        (torch.ones(0, 8, dtype=torch.long), "must be integer token ids"),
        (torch.ones(2, 8, dtype=torch.bool), "must be integer token ids"),
        (torch.ones(2, 1, dtype=torch.long), "samples have 1 token"),
        (torch.full((1, 8), 128), "outside the vocabulary of 128"),
        (torch.full((1, 8), -1), "outside the vocabulary of 128"),
    ],
)
def test_wrong_tokens_are_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        api.prune(llama(), ids, "wanda")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_tokens_may_be_any_integers(dtype: torch.dtype) -> None:
    model, expected = llama(), llama()
    report, wanted = api.prune(model, IDS.to(dtype).numpy(), "gblm"), api.prune(expected, IDS, "gblm")
    assert report.text_hash == wanted.text_hash
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_model_with_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=["o_proj"])
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.o_proj has an adapter, which would be pruned too"):
        api.prune(model, IDS, "wanda")
    api.prune(model.merge_and_unload(), IDS, "wanda")


def test_a_name_to_ignore_must_be_a_layers() -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match="'nosuch', is that of no linear layer"):
        api.prune(model, token_ids(2, 8), "magnitude", ignore=["q_proj", "nosuch"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    api.prune(model, token_ids(2, 8), "magnitude", ignore="q_proj")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == 18 and not any("q_proj" in name for name in changed)


def test_the_python_face_passes_everything_on(tmp_path) -> None:
    model, expected = llama(), llama()
    seen: list[object] = []
    report = api.prune(
        model,
        IDS.tolist(),
        "wanda++rgs",
        0.5,
        seed=4,
        ignore=["down_proj"],
        device="cpu",
        progress=seen.append,
        alpha=7,
    )
    prune(expected, "wanda++rgs", "50%", ignore=("down_proj",), alpha=7.0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert (report.seed, report.sparsity, report.settings["ignore"], len(seen)) == (4, "50%", ("down_proj",), 2)
    api.save(model, None, tmp_path / "out", report)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", "model.safetensors", "wandapp.json"}
