"""The parametrisation against its formula, and merging against the function that was trained."""

from __future__ import annotations

import pytest
import torch
from pruned_models import pruned_linear, pruned_model
from tiny_models import token_ids
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from wandapp_kernels import sparsify
from wandapp_kernels.errors import UsageError
from wandapp_kernels.finetuning.masked_lora import MaskedLora, masked_lora
from wandapp_kernels.finetuning.settings import FinetuneSettings

LAYERS = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
}
SETTINGS = FinetuneSettings(rank=3, alpha=6)


def lora_of(weight: torch.Tensor, transposed: bool = False, dropout: float = 0.0) -> MaskedLora:
    torch.manual_seed(0)
    lora = MaskedLora(weight, FinetuneSettings(rank=3, alpha=6, dropout=dropout), transposed)
    nn.init.normal_(lora.b)
    return lora


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_formula(transposed: bool, dtype: torch.dtype) -> None:
    weight = pruned_linear(dtype=dtype).weight.detach()
    weight = weight.T.contiguous() if transposed else weight
    lora = lora_of(weight, transposed)
    assert lora.a.dtype == lora.b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    change = 2 * (lora.b.double() @ lora.a.double())
    expected = weight.double() + (weight != 0) * (change.T if transposed else change)
    found = lora(weight)
    assert found.dtype == dtype
    assert torch.equal(found == 0, weight == 0) and not torch.equal(found, weight)
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_finite_differences(transposed: bool) -> None:
    weight = pruned_linear(5, 8, dtype=torch.float64).weight.detach()
    weight = weight.T.contiguous() if transposed else weight
    lora = lora_of(weight, transposed)

    def changed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional_call(lora, {"a": a, "b": b}, (weight,))

    assert torch.autograd.gradcheck(changed, (lora.a, lora.b))


def test_the_gradient_passes_the_rounding() -> None:
    weight = pruned_linear(dtype=torch.bfloat16).weight.detach()
    lora = lora_of(weight)
    seed = torch.randn(weight.shape)
    (lora(weight) * seed.bfloat16()).sum().backward()
    kept = seed.bfloat16().float() * (weight != 0)
    torch.testing.assert_close(lora.b.grad, 2 * kept @ lora.a.detach().T)
    torch.testing.assert_close(lora.a.grad, 2 * lora.b.detach().T @ kept)


def test_dropout_takes_input_channels_from_the_adapter() -> None:
    weight = torch.ones(4, 2000)
    lora = lora_of(weight, dropout=0.25)
    torch.nn.init.ones_(lora.a)
    torch.nn.init.ones_(lora.b)
    change = lora(weight) - weight
    assert set(change.unique().tolist()) == {0.0, 8.0}  # 2 · 3 / (1 - 0.25)
    assert torch.equal(change, change[:1].expand(4, -1)) and 0.15 < (change[0] == 0).float().mean() < 0.35
    assert torch.equal(lora.eval()(weight), torch.full_like(weight, 7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", LAYERS)
def test_merged_is_what_was_trained_bit_for_bit(arch: str, dtype: torch.dtype) -> None:
    model = pruned_model(arch).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = token_ids(2, 9)
    with torch.no_grad():
        first = model(ids).logits
        with masked_lora(model, LAYERS[arch], SETTINGS) as trained:
            assert torch.equal(model.train()(ids).logits, first) or arch == "gpt2"  # B is zero; GPT-2 has dropout
            for parameter in trained:
                nn.init.normal_(parameter, std=0.3)
            expected = model.eval()(ids).logits
            model.train()  # dropout is no part of what is merged
        assert torch.equal(model.eval()(ids).logits, expected) and not torch.equal(expected, first)
    after = model.state_dict()
    assert list(after) == list(before) or after.keys() == before.keys()
    for name, tensor in before.items():
        touched = name.removesuffix(".weight") in LAYERS[arch]
        assert torch.equal(after[name], tensor) != touched, name
        if touched:
            assert torch.equal(after[name] == 0, tensor == 0), name
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_nothing_is_left_of_a_failed_run() -> None:
    model = pruned_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt), masked_lora(model, LAYERS["llama"], SETTINGS) as trained:
        nn.init.ones_(trained[1])
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: id(own) for name, own in model.named_parameters()} == {name: id(own) for name, own in held.items()}


def test_what_cannot_be_merged() -> None:
    model = pruned_model("llama", tie_word_embeddings=True)
    with pytest.raises(UsageError, match="weight of lm_head is shared"), masked_lora(model, ["lm_head"], SETTINGS):
        pass
    sparsify(model)
    with (
        pytest.raises(UsageError, match=r"call desparsify\(model\) first"),
        masked_lora(model, LAYERS["llama"], SETTINGS),
    ):
        pass
