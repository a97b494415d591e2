"""Gradients of the whole dense model against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import PreTrainedModel

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.models.blocks import find_decoder
from wandapp_kernels.pruning.model_gradients import ModelGradients
from wandapp_kernels.pruning.statistics import MODEL_GRADIENT_L1, MODEL_GRADIENT_L2

NORMS = (MODEL_GRADIENT_L1, MODEL_GRADIENT_L2)
IDS = token_ids(3, 10)
CPU = torch.device("cpu")

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]


def collect(model: PreTrainedModel, ignore: tuple[str, ...] = ()) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Per block: name of the Linear -> norm -> gradient."""
    decoder = find_decoder(model)
    gradients = ModelGradients(decoder, NORMS, ignore)
    gradients.collect(model, IDS, CPU, lambda done, total: None)
    return [gradients.of_block(index, CPU) for index in range(len(decoder.blocks))]


def naive(model: PreTrainedModel) -> Sums:
    """Parameter name -> (sum of |g|, root of the sum of g²) over the samples."""
    model = model.double()
    model.config._experts_implementation = "eager"  # the others take no float64
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad_(True) is not None}
    found = {name: [torch.zeros(p.shape).double(), torch.zeros(p.shape).double()] for name, p in parameters.items()}
    for sample in IDS:
        model.zero_grad()
        model(input_ids=sample[None], labels=sample[None]).loss.backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                found[name][0] += parameter.grad.abs()
                found[name][1] += parameter.grad.square()
    return {name: (absolute, squares.sqrt()) for name, (absolute, squares) in found.items()}


def as_stored(model: PreTrainedModel, sums: Sums, name: str, norm: int) -> torch.Tensor:
    """The gradient of a Linear ``[out, in]``, looked up where the model stores its weight."""
    if f"{name}.weight" in sums:
        gradient = sums[f"{name}.weight"][norm]
        return gradient.T if model.config.model_type == "gpt2" else gradient
    experts, number, matrix = name.rsplit(".", 2)
    return sums[f"{experts}.{matrix}"][norm][int(number)]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_gradients_equal_autograd_in_float64(arch: str) -> None:
    found, expected = collect(tiny_model(arch)), naive(tiny_model(arch))
    model = tiny_model(arch)
    names = [name for block in found for name in block]
    assert len(names) == {"llama": 21, "gpt2": 12, "mixtral": 36, "qwen3_moe": 7 + 2 * 16}[arch]
    for block in found:
        for name, by_norm in block.items():
            for norm, key in enumerate(NORMS):
                wanted = as_stored(model, expected, name, norm).float()
                assert by_norm[key].dtype == torch.float32
                torch.testing.assert_close(by_norm[key], wanted, rtol=1e-3, atol=1e-6 * float(wanted.abs().max()))


def test_only_the_norms_asked_for_are_kept() -> None:
    model = tiny_model("llama")
    gradients = ModelGradients(find_decoder(model), {MODEL_GRADIENT_L2})
    gradients.collect(model, IDS, CPU, lambda done, total: None)
    assert {frozenset(by_norm) for by_norm in gradients.of_block(0, CPU).values()} == {frozenset({MODEL_GRADIENT_L2})}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_models_in_other_types(dtype: torch.dtype) -> None:
    model, rounded = tiny_model("llama").to(dtype), tiny_model("llama").to(dtype).float()
    for block, expected in zip(collect(model), collect(rounded), strict=True):
        for name, by_norm in block.items():
            found, wanted = by_norm[MODEL_GRADIENT_L2], expected[name][MODEL_GRADIENT_L2]
            assert found.dtype in (torch.float32, torch.float64)
            error = (found - wanted).norm() / wanted.norm()
            assert error < {torch.bfloat16: 0.2, torch.float16: 0.05, torch.float64: 1e-4}[dtype], name


def test_small_gradients_survive_half_precision() -> None:
    """Half are below 4e-7, where fp16 counts in steps of 6e-8: without a scaled loss they are three quarters off."""
    model = tiny_model("llama").half()
    model.lm_head.weight.data *= 2.0**-12
    model.model.norm.weight.data *= 2.0**-6
    exact = tiny_model("llama").half()
    exact.load_state_dict(model.state_dict())
    name = "model.layers.0.mlp.down_proj"
    found, wanted = (collect(net)[0][name][MODEL_GRADIENT_L1] for net in (model, exact.float()))
    assert float(wanted.median()) < 4e-7
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_the_model_is_left_as_it_was(arch: str) -> None:
    model, before = tiny_model(arch), tiny_model(arch)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    storages = [p.data_ptr() for p in model.parameters()]
    collect(model)
    for index, (parameter, expected) in enumerate(zip(model.parameters(), before.parameters(), strict=True)):
        assert parameter.requires_grad is (index % 3 == 0)
        assert parameter.grad is None
        assert torch.equal(parameter, expected)
    assert [p.data_ptr() for p in model.parameters()] == storages


def test_dropout_is_off_and_every_module_keeps_its_mode() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    expected = collect(model)[0]
    model.train()
    model.transformer.h[1].eval()
    found = collect(model)[0]
    for name, by_norm in expected.items():
        assert torch.equal(found[name][MODEL_GRADIENT_L1], by_norm[MODEL_GRADIENT_L1]), name
    assert model.training and model.transformer.h[0].training and not model.transformer.h[1].training


def test_an_expert_that_no_token_reaches_has_no_gradient() -> None:
    model = tiny_model("mixtral", num_local_experts=6)
    router = model.model.layers[0].mlp.gate.weight.data
    router[1], router[3], router[4:] = -router[0], -router[2], 0.0
    block = collect(model)[0]
    totals = [float(block[f"model.layers.0.mlp.experts.{e}.down_proj"][MODEL_GRADIENT_L1].sum()) for e in range(6)]
    assert all(total > 0 for total in totals[:4]) and totals[4:] == [0.0, 0.0]


def test_ignored_modules_are_not_listed() -> None:
    names = set(collect(tiny_model("mixtral"), ignore=("mlp.experts", "q_proj"))[1])
    assert names == {f"model.layers.1.self_attn.{x}_proj" for x in "kvo"}


def test_gradients_that_are_not_finite_name_the_weight_and_the_flags_come_back() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[:] = torch.nan
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(NonFiniteError, match=r"^1024 of 1024 gradients of model\.layers\.0\.self_attn\.q_proj\.weight"):
        collect(model)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_a_failure_while_gradients_are_handed_out_leaves_the_weights() -> None:
    model, before = tiny_model("llama"), tiny_model("llama")
    gradients = ModelGradients(find_decoder(model), NORMS)
    gradients.collect(model, IDS, CPU, lambda done, total: None)
    model.model.layers[0].extra = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(Exception, match="extra is not in memory"):
        gradients.of_block(0, CPU)
    del model.model.layers[0].extra
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
