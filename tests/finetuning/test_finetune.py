"""``wk.finetune``: that it learns, repeats itself, and leaves a model as it found it when it fails."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from pruned_models import pruned_model
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import PreTrainedModel

import wandapp_kernels as wk
from wandapp_kernels.data.calibration import TokenSet, token_hash
from wandapp_kernels.errors import ModelError, UsageError

RECIPE: dict[str, Any] = {"targets": "all", "rank": 4, "lr": 2e-2, "batch": 4, "micro_batch": 2, "warmup": 1}


def text() -> torch.Tensor:
    """Sequences that repeat eight tokens: easily learnt."""
    return token_ids(8, 4).repeat(1, 3)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("merge", [True, False])
def test_the_loss_falls(arch: str, merge: bool) -> None:
    model = pruned_model(arch)
    before = weights(model)
    model.transformer.wte.weight.requires_grad_(False) if arch == "gpt2" else model.train()
    flags, training, cache = [own.requires_grad for own in model.parameters()], model.training, model.config.use_cache
    tuned, report = wk.finetune(model, text(), merge=merge, epochs=5, **RECIPE)
    assert len(report.losses) == 10 and report.losses[-1] < report.losses[0] - 0.5
    assert (model.training, model.config.use_cache) == (training, cache)
    assert all(module.training == training for module in tuned.modules())
    assert len(report.layers) == (12 if arch == "gpt2" else 21) and report.to_dict()["settings"]["rank"] == 4
    assert report.text_hash == token_hash(text()) and (report.samples, report.seqlen) == (8, 12)
    with torch.no_grad():
        loss = model.eval()(text(), labels=text()).loss.item()
    assert loss < report.losses[0] - 0.5
    if merge:
        assert tuned is model and [own.requires_grad for own in model.parameters()] == flags
        for name, tensor in weights(model).items():
            touched = name.removesuffix(".weight") in report.layers
            assert torch.equal(tensor == 0, before[name] == 0) and torch.equal(tensor, before[name]) != touched, name
    else:
        assert isinstance(tuned, peft.PeftModel) and report.versions["peft"] == peft.__version__
        assert all(own.requires_grad == ("lora_" in name) for name, own in tuned.named_parameters())
        assert report.trained_parameters == sum(own.numel() for own in tuned.parameters() if own.requires_grad)
        assert same(weights(tuned.unload()), before)


@pytest.mark.parametrize("merge", [True, False])
def test_one_seed_one_result(merge: bool) -> None:
    def run(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(1)  # torch's own random state is another one every time
        model = pruned_model("llama")
        wk.finetune(model, TokenSet(text(), "", "", "calibration", 0), merge=merge, seed=seed, **RECIPE)
        return weights(model)

    first = run(0)
    assert same(first, run(0)) and not same(first, run(1))
    state = torch.get_rng_state()
    wk.finetune(pruned_model("llama"), text(), merge=merge, **RECIPE)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("merge", [True, False])
def test_an_interrupted_run_leaves_the_model_as_it_was(merge: bool) -> None:
    model = pruned_model("llama")
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[1].train()
    before, flags = weights(model), [own.requires_grad for own in model.parameters()]
    modules = [(type(module), module.training) for module in model.modules()]

    def stop(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wk.finetune(model, text(), merge=merge, gradient_checkpointing=True, progress=stop, **RECIPE)
    assert same(weights(model), before) and [own.requires_grad for own in model.parameters()] == flags
    assert [(type(module), module.training) for module in model.modules()] == modules
    assert not hasattr(model, "peft_config")
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    wk.finetune(model, text(), merge=merge, **RECIPE)  # and may be tried again


def test_adapters_train_on_a_compressed_model_as_on_a_dense_one() -> None:
    recipe = {**RECIPE, "dropout": 0, "epochs": 2}
    dense, compressed = pruned_model("llama"), pruned_model("llama")
    wk.sparsify(compressed)
    _, expected = wk.finetune(dense, text(), **recipe)
    tuned, report = wk.finetune(compressed, text(), **recipe)
    torch.testing.assert_close(report.losses, expected.losses, rtol=1e-4, atol=1e-4)
    assert report.layers == expected.layers
    with torch.no_grad():
        torch.testing.assert_close(tuned(text()).logits, dense(text()).logits, rtol=1e-2, atol=1e-2)


def test_adapters_of_a_model_in_bf16_are_fp32() -> None:
    for merge in (True, False):
        model = pruned_model("llama").bfloat16()
        _, report = wk.finetune(model, text(), merge=merge, epochs=3, **RECIPE)
        assert report.losses[-1] < report.losses[0] - 0.3
        kinds = {own.dtype for name, own in model.named_parameters() if "lora_" in name}
        assert kinds == (set() if merge else {torch.float32}) and model.model.norm.weight.dtype == torch.bfloat16


def test_targets() -> None:
    model = pruned_model("llama")
    model.model.layers[1].self_attn.k_proj.weight.data.fill_(1)
    _, report = wk.finetune(model, text(), merge=True, **RECIPE)
    assert len(report.layers) == 20 and "model.layers.1.self_attn.k_proj" not in report.layers
    names = ["k_proj", "model.layers.0.mlp.up_proj", r"re:layers\.2\..*gate"]
    _, report = wk.finetune(model, text(), merge=True, **{**RECIPE, "targets": names})
    chosen = ["0.self_attn.k_proj", "0.mlp.up_proj", "1.self_attn.k_proj", "2.self_attn.k_proj", "2.mlp.gate_proj"]
    assert report.layers == [f"model.layers.{name}" for name in chosen]


def test_an_embedding_with_zeros_is_no_pruned_layer() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight.data[:50] = 0
    with pytest.raises(UsageError, match="is pruned"):
        wk.finetune(model, text(), merge=True, **RECIPE)


def swapped() -> PreTrainedModel:
    model = pruned_model("llama")
    wk.sparsify(model)
    return model


def with_adapters() -> PreTrainedModel:
    model = pruned_model("llama")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (lambda: tiny_model("llama"), {}, "prune the model first"),
        (
            lambda: pruned_model("gpt2"),
            {"targets": ("q_proj", "v_proj")},
            "'q_proj' is no .* c_attn, c_proj, c_fc, lm_head, or",
        ),
        (lambda: pruned_model("llama"), {"targets": ["up_proj", "foo"]}, "'foo' is no linear layer"),
        (lambda: pruned_model("llama"), {"targets": []}, "no targets are given; there are q_proj"),
        (lambda: pruned_model("llama").half(), {}, "float16, in which gradients vanish"),
        (lambda: pruned_model("llama").to("meta"), {"targets": "q_proj"}, "prune the model first"),
        (swapped, {}, "desparsify"),
        (with_adapters, {}, "has an adapter already"),
        (lambda: pruned_model("llama"), {"warmup": 2}, "no more than the 2 of the warm-up"),
    ],
    ids=[
        "dense",
        "no such targets",
        "one wrong target",
        "no targets",
        "fp16",
        "meta",
        "compressed",
        "adapters",
        "short",
    ],
)
def test_what_is_refused(model: Any, change: dict, message: str) -> None:
    with pytest.raises((UsageError, ModelError), match=message):
        wk.finetune(model(), text(), merge=True, **{**RECIPE, **change})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("wiki", "tokens is the text 'wiki'"),
        (torch.full((8, 4), 128), "training token ids run from 128"),
        (token_ids(8, 1), "training samples have 1 token"),
        (token_ids(8, 65), "training samples have 65 tokens"),
        (torch.rand(8, 4), "training must be integer"),
    ],
)
def test_wrong_tokens(tokens: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        wk.finetune(pruned_model("llama"), tokens, merge=True, **RECIPE)
