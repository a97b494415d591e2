from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch import nn

from wandapp_kernels.errors import ModelError
from wandapp_kernels.models.blocks import stacked_parameters
from wandapp_kernels.models.experts import LinearExperts, linearise
from wandapp_kernels.models.load import load_model

_GROUPED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
# layout: plain, plain; transposed, interleaved, with biases; ungated; not decorated as transformers' experts
LAYOUTS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": _GROUPED,
    "nemotron_h": {
        **_GROUPED,
        "n_routed_experts": 5,
        "moe_intermediate_size": 16,
        "layers_block_type": ["moe"],
        "n_group": 1,
        "topk_group": 1,
    },
}


def fused_experts(arch: str) -> nn.Module:
    model = tiny_model(arch, **LAYOUTS[arch])
    module = next(module for module in reversed(list(model.modules())) if stacked_parameters(module))
    return module.requires_grad_(False)


def routed(module: nn.Module, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = next(iter(stacked_parameters(module).values()))
    size = up.shape[1] if getattr(module, "is_transposed", False) else up.shape[2]
    hidden = torch.randn(tokens, size, generator=generator)
    index = torch.stack([torch.randperm(len(up), generator=generator)[:2] for _ in range(tokens)])
    return hidden, index, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("arch", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 17])
def test_output_equals_the_fused_modules(arch: str, tokens: int) -> None:
    fused = fused_experts(arch)
    replacement, _ = linearise(copy.deepcopy(fused), "experts")
    call = routed(fused, tokens)
    expected = fused(*call)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(replacement(*call), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", LAYOUTS)
def test_every_linear_is_the_slice_it_names(arch: str) -> None:
    fused = fused_experts(arch)
    replacement, slices = linearise(copy.deepcopy(fused), "experts")
    assert set(slices) == {name for name, _ in replacement.named_parameters()}
    for name, source in slices.items():
        stored = getattr(fused, source.name)[source.expert]
        assert torch.equal(replacement.get_parameter(name), stored.T if source.transposed else stored)
    linears = [module for module in replacement.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * replacement.count
    assert all(linear.weight.is_contiguous() for linear in linears)
    assert {source.transposed for name, source in slices.items() if "weight" in name} == {arch == "gpt_oss"}


@pytest.mark.parametrize("arch", LAYOUTS)
def test_an_expert_pruned_by_hand_is_the_pruned_slice(arch: str) -> None:
    fused = fused_experts(arch)
    replacement, slices = linearise(copy.deepcopy(fused), "experts")
    name = "3.down_proj.weight"
    mask = torch.rand(replacement.get_parameter(name).shape, generator=torch.Generator().manual_seed(1)) < 0.5
    replacement.get_parameter(name).mul_(mask)
    call = routed(fused, 20)
    assert not torch.allclose(replacement(*call), fused(*call), atol=1e-4)
    getattr(fused, slices[name].name)[3].mul_(mask.T if slices[name].transposed else mask)
    torch.testing.assert_close(replacement(*call), fused(*call), rtol=1e-4, atol=1e-5)


def test_weights_stored_as_linears_store_them_are_not_copied() -> None:
    fused = fused_experts("mixtral")
    storage = fused.gate_up_proj.untyped_storage().data_ptr()
    replacement, _ = linearise(fused, "experts")
    assert replacement.get_parameter("2.gate_up_proj.weight").untyped_storage().data_ptr() == storage
    assert not stacked_parameters(fused)


def test_an_expert_without_tokens_is_not_called_and_gradients_reach_the_others() -> None:
    fused = fused_experts("mixtral")
    hidden, _, weights = routed(fused, 6)
    replacement, _ = linearise(fused, "experts")
    called: list[int] = []
    for number in range(replacement.count):
        down = replacement.get_submodule(f"{number}.down_proj").requires_grad_(True)
        down.register_forward_hook(lambda *_, number=number: called.append(number))
    replacement(hidden, torch.tensor([[0, 2]] * 6), weights).square().mean().backward()
    assert called == [0, 2]
    gradients = [replacement.get_parameter(f"{number}.down_proj.weight").grad for number in range(4)]
    assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [True, False, True, False]


def test_taking_apart_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    linearise(fused_experts("mixtral"), "experts")
    assert torch.equal(torch.rand(1), expected)


class Known(nn.Module):
    """A layout like transformers', without its decorator."""

    def __init__(self, flavour: str = "plain", size: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.flavour = flavour
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * size, size, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(3, size, size, generator=generator))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for token in range(len(hidden)):
            for slot in range(index.shape[1]):
                expert = int(index[token, slot])
                gate, up = (self.gate_up_proj[expert] @ hidden[token]).chunk(2)
                if self.flavour == "up first":
                    gate, up = up, gate
                if self.flavour == "one expert differs" and expert == 2:
                    up = up + 0.01
                output[token] += weights[token, slot] * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return output


def test_a_module_without_transformers_decorator_is_taken_apart_by_its_shapes() -> None:
    known = Known().requires_grad_(False)
    call = routed(known, 7)
    expected = known(*call)
    replacement, _ = linearise(known, "experts")
    assert isinstance(replacement, LinearExperts)
    torch.testing.assert_close(replacement(*call), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flavour", ["up first", "one expert differs"])
def test_a_module_that_computes_something_else_is_refused(flavour: str) -> None:
    with pytest.raises(
        ModelError, match=r"Known \(layers.0.experts\) is not understood \(taken apart its output differs"
    ):
        linearise(Known(flavour), "layers.0.experts")


def test_unknown_names_of_stacked_weights_are_refused() -> None:
    module = nn.Module()
    module.input_linear = nn.Parameter(torch.zeros(3, 4, 5))
    with pytest.raises(ModelError, match=r"its 3-D weights are input_linear.*exclude it with --ignore"):
        linearise(module, "experts")
    known = Known()
    known.extra = nn.Parameter(torch.zeros(3, 4, 5))
    with pytest.raises(ModelError, match="down_proj, extra, gate_up_proj"):
        linearise(known, "experts")


def test_another_way_to_be_called_is_refused() -> None:
    class Bare(Known):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    with pytest.raises(ModelError, match=r"Bare .*TypeError"):
        linearise(Bare(), "experts")


def test_weights_that_are_not_finite_are_left_to_those_who_read_them() -> None:
    known = Known().requires_grad_(False)
    known.down_proj[1, 0, 0] = float("nan")
    replacement, _ = linearise(known, "experts")
    assert replacement.get_parameter("1.down_proj.weight")[0, 0].isnan()


def test_a_folder_loaded_in_fp64_runs(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float64").model
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids(2, 6)).logits.float(), model(token_ids(2, 6)).logits)
    assert model.config._experts_implementation != "eager"  # elsewhere the faster one is kept
