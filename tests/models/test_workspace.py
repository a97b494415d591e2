from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model, token_ids
from torch import nn
from transformers import PreTrainedModel

from wandapp_kernels.errors import ModelError, NonFiniteError
from wandapp_kernels.models.blocks import find_decoder
from wandapp_kernels.models.calls import call_block, map_tensors
from wandapp_kernels.models.capture import capture
from wandapp_kernels.models.workspace import BlockWorkspace

TOKENS = 11


def workspace(model: PreTrainedModel, index: int = 1, **options: Any) -> BlockWorkspace:
    decoder = find_decoder(model)
    return BlockWorkspace(decoder.blocks[index], decoder.block_name(index), "cpu", **options)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, TOKENS), use_cache=False).logits


def disturb(linear: nn.Linear, seed: int = 0) -> torch.Tensor:
    """Put values of a narrow grid into the weight, exact in every dtype; returns them."""
    values = torch.randint(-8, 9, linear.weight.shape, generator=torch.Generator().manual_seed(seed)) / 8
    with torch.no_grad():
        linear.weight.copy_(values)
    return values


def widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_copy_computes_what_the_block_computes(arch: str, dtype: torch.dtype) -> None:
    model = tiny_model(arch).to(dtype)
    decoder = find_decoder(model)
    calls = capture(model, decoder, token_ids(3, TOKENS))
    reference = tiny_model(arch).to(dtype).float()  # fp32 arithmetic on the rounded weights
    expected = got = torch.cat(calls.hidden).float()
    for index, block in enumerate(find_decoder(reference).blocks):
        space = workspace(model, index)
        assert space.dtype == torch.float32 and not space.module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in space.module.parameters())
        arguments = calls.arguments(index, 0, batch=3)
        with torch.no_grad():
            expected = call_block(block, expected, *map_tensors(arguments, widen))
            got = space.run(got, *arguments)
        assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_unchanged_weights_written_back_are_bit_identical(arch: str, dtype: torch.dtype) -> None:
    model = tiny_model(arch).to(dtype)
    before, output = weights(model), logits(model)
    for index in range(len(find_decoder(model).blocks)):
        space = workspace(model, index)
        space.write_back(extra=[space.name + "." + name for name, _ in space.module.named_parameters()])
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_changed_linears_are_written_back_and_nothing_else(arch: str, dtype: torch.dtype) -> None:
    model = tiny_model(arch).to(dtype)
    before, output = weights(model), logits(model)
    space = workspace(model)
    chosen = list(space.linears)[::2]
    wanted = {name: disturb(space.linears[name], seed) for seed, name in enumerate(chosen)}
    assert torch.equal(logits(model), output)  # untouched until written back
    space.write_back()
    assert not torch.equal(logits(model), output)

    again = workspace(model)
    for name, linear in again.linears.items():
        if name in wanted:
            assert torch.equal(linear.weight, wanted[name])
    prefixes = {name if f"{name}.weight" in before else name.split("experts.")[0] + "experts" for name in chosen}
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    for name in changed:
        assert any(name.startswith(prefix) for prefix in prefixes) and not name.endswith("bias")
    assert all(value.dtype == dtype for name, value in weights(model).items() if value.is_floating_point())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_matrix_of_a_block_is_listed_and_no_router(arch: str) -> None:
    model = tiny_model(arch)
    block, space = find_decoder(model).blocks[1], workspace(model)
    matrices = sum(p.numel() for name, p in block.named_parameters() if p.dim() > 1 and ".gate.weight" not in name)
    assert sum(linear.weight.numel() for linear in space.linears.values()) == matrices
    for name, linear in space.linears.items():
        assert name.startswith(space.name + ".")
        assert space.module.get_submodule(name.removeprefix(space.name + ".")) is linear
    assert not any("gate" in name.split(".") for name in space.linears)


def test_expert_names() -> None:
    space = workspace(tiny_model("mixtral"))
    names = {f"model.layers.1.mlp.experts.{n}.{m}_proj" for n in range(4) for m in ("gate_up", "down")}
    assert space.expert_names == names < space.linears.keys()
    assert not workspace(tiny_model("qwen3_moe"), 0).expert_names  # its first block is dense
    assert not workspace(tiny_model("llama")).expert_names


def test_writing_one_expert_changes_its_slice_only() -> None:
    model = tiny_model("mixtral").to(torch.bfloat16)
    stored = model.model.layers[1].mlp.experts
    before = stored.gate_up_proj.clone(), stored.down_proj.clone()
    space = workspace(model)
    wanted = disturb(space.linears["model.layers.1.mlp.experts.2.down_proj"])
    space.write_back()
    assert torch.equal(stored.gate_up_proj, before[0])
    assert torch.equal(stored.down_proj[2], wanted.to(torch.bfloat16))
    others = [0, 1, 3]
    assert torch.equal(stored.down_proj[others], before[1][others])


def test_conv1d_is_transposed_both_ways() -> None:
    model = tiny_model("gpt2")
    stored = model.transformer.h[1].mlp.c_fc
    space = workspace(model)
    linear = space.linears["transformer.h.1.mlp.c_fc"]
    assert type(linear) is nn.Linear and (linear.out_features, linear.in_features) == (48, 32)
    assert torch.equal(linear.weight, stored.weight.T) and torch.equal(linear.bias, stored.bias)
    assert linear.weight.is_contiguous()
    wanted = disturb(linear)
    space.write_back()
    assert stored.weight.shape == (32, 48) and torch.equal(stored.weight, wanted.T)


def test_reload_shows_the_rounding_of_the_models_dtype() -> None:
    for arch, name in (
        ("llama", "model.layers.1.mlp.up_proj"),
        ("gpt2", "transformer.h.1.attn.c_attn"),
        ("mixtral", "model.layers.1.mlp.experts.3.gate_up_proj"),
    ):
        model = tiny_model(arch).to(torch.bfloat16)
        space = workspace(model)
        linear = space.linears[name]
        linear.weight.normal_(generator=torch.Generator().manual_seed(0))
        fine = linear.weight.clone()
        norm = next(p for key, p in space.module.named_parameters() if "norm" in key or "ln_1" in key)
        stored_norm = norm.clone()
        norm.fill_(7.0)
        space.write_back()
        assert torch.equal(linear.weight, fine)
        space.reload()
        assert torch.equal(linear.weight, fine.to(torch.bfloat16).float()) and not torch.equal(linear.weight, fine)
        assert torch.equal(norm, stored_norm)  # it was not written, so its stored value comes back


def test_extra_parameters_are_written_only_when_named() -> None:
    model = tiny_model("qwen2")
    before = weights(model)
    space = workspace(model)
    norm, bias = "model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.bias"
    for name in (norm, bias, "model.layers.1.self_attn.k_proj.bias"):
        space.module.get_parameter(name.removeprefix("model.layers.1.")).fill_(5.0)
    space.write_back(extra=[norm, bias])
    after = weights(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {norm, bias}
    with pytest.raises(ModelError, match=r"has no parameter model\.layers\.0\.input"):
        space.write_back(extra=["model.layers.0.input_layernorm.weight"])


def test_expert_biases_are_written_when_named() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 40, "head_dim": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 5, "num_experts_per_tok": 2}
    model = tiny_model("gpt_oss", **sizes, **heads)
    stored = model.model.layers[1].mlp.experts
    before = stored.down_proj_bias.clone()
    space = workspace(model)
    name = "model.layers.1.mlp.experts.4.down_proj"
    space.linears[name].bias.fill_(2.0)
    wanted = disturb(space.linears[name])
    space.write_back(extra=[f"{name}.bias"])
    assert torch.equal(stored.down_proj[4], wanted.T)
    assert (stored.down_proj_bias[4] == 2.0).all() and torch.equal(stored.down_proj_bias[:4], before[:4])


def test_signed_zeros_and_nan_are_copied_as_they_are() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, :5] = special
    space = workspace(model)
    space.write_back()
    row = model.model.layers[1].mlp.up_proj.weight[0, :5].detach()
    assert row.signbit().tolist()[:2] == [False, True]
    assert row.isnan().tolist() == [False, False, True, False, False] and row[3] == -row[4] == float("inf")


def test_values_too_large_for_the_models_dtype_stop_before_they_are_written() -> None:
    model = tiny_model("llama").half()
    space = workspace(model)
    before = model.model.layers[1].self_attn.k_proj.weight.clone()
    space.linears["model.layers.1.self_attn.k_proj"].weight[0, :2] = 1e6
    with pytest.raises(NonFiniteError, match=r"2 values of model\.layers\.1\.self_attn\.k_proj\.weight.*float16"):
        space.write_back()
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, before)


def test_wider_models_keep_their_precision() -> None:
    model = tiny_model("llama").double()
    before = weights(model)
    space = workspace(model)
    assert space.dtype == torch.float64
    space.write_back()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


def test_ignored_modules_stay_as_they_are() -> None:
    space = workspace(tiny_model("mixtral"), ignore=["re:mlp.experts$", "q_proj"])
    names = [f"model.layers.1.self_attn.{name}" for name in ("k_proj", "v_proj", "o_proj")]
    assert list(space.linears) == names
    assert space.module.mlp.experts.gate_up_proj.dim() == 3
    assert "transformer.h.1.attn.c_attn" not in workspace(tiny_model("gpt2"), ignore=["c_attn"]).linears


class Mixture(nn.Module):
    """A block whose router is an `nn.Linear` and whose experts are a list."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)  # beside no experts: an ordinary gate
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(4, 2)
        self.mlp.shared_expert_gate = nn.Linear(4, 1)
        self.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.mlp.shared_experts = nn.Sequential(nn.Linear(4, 4))
        self.other = nn.Module()
        self.other.router = nn.Module()
        self.other.router.classifier = nn.Linear(4, 2)
        self.other.local_experts = nn.Sequential(nn.Linear(4, 4))
        self.glu = nn.Module()
        self.glu.gate = nn.Linear(4, 4)


def test_linear_routers_are_not_listed() -> None:
    space = BlockWorkspace(Mixture(), "layers.0", "cpu")
    assert list(space.linears) == [
        "layers.0.gate",
        "layers.0.mlp.experts.0.0",
        "layers.0.mlp.experts.1.0",
        "layers.0.mlp.shared_experts.0",
        "layers.0.other.local_experts.0",
        "layers.0.glu.gate",
    ]
    assert space.expert_names == {"layers.0.mlp.experts.0.0", "layers.0.mlp.experts.1.0"}


def test_unknown_stacked_weights_are_refused_unless_ignored() -> None:
    block = nn.Module()
    block.up = nn.Linear(4, 4)
    block.moe = nn.Module()
    block.moe.weight = nn.Parameter(torch.zeros(3, 4, 4))
    with pytest.raises(ModelError, match=r"Module \(layers.5.moe\) is not understood"):
        BlockWorkspace(block, "layers.5", "cpu")
    assert list(BlockWorkspace(block, "layers.5", "cpu", ignore=["moe"]).linears) == ["layers.5.up"]


def test_buffers_keep_their_dtype_and_shared_parameters_stay_shared() -> None:
    block = nn.Module()
    block.a = nn.Linear(4, 4).bfloat16()
    block.b = nn.Linear(4, 4).bfloat16()
    block.b.weight = block.a.weight
    block.register_buffer("inv_freq", torch.tensor([1.0, 0.1], dtype=torch.float64))
    block.register_buffer("narrow", torch.tensor([1.0], dtype=torch.bfloat16))
    space = BlockWorkspace(block, "layers.0", "cpu")
    assert space.module.inv_freq.dtype == torch.float64 and space.module.narrow.dtype == torch.bfloat16
    assert space.module.inv_freq.data_ptr() != block.inv_freq.data_ptr()
    assert space.module.a.weight is space.module.b.weight


def test_arguments_are_moved_and_widened_once() -> None:
    seen: list[tuple[Any, ...]] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
            seen.append((hidden, *args, *kwargs.values()))
            return self.linear(hidden), None

    space = BlockWorkspace(Block(), "layers.0", "cpu")
    cosine, wide, mask = torch.ones(3).bfloat16(), torch.ones(3).double(), torch.ones(2, 2, dtype=torch.bool)
    hidden = torch.ones(1, 2, 4).bfloat16()
    for _ in range(2):
        assert space.run(hidden, (cosine,), {"wide": wide, "mask": mask, "flag": False}).dtype == torch.float32
    first, second = seen
    assert [getattr(item, "dtype", item) for item in first] == [
        torch.float32,
        torch.float32,
        torch.float64,
        torch.bool,
        False,
    ]
    assert all(a is b for a, b in zip(first[1:], second[1:], strict=True))


def test_gradients_flow_through_the_copy_and_not_into_the_model() -> None:
    model = tiny_model("mixtral")
    decoder = find_decoder(model)
    calls = capture(model, decoder, token_ids(1, TOKENS))
    space = workspace(model, 0)
    for linear in space.linears.values():
        linear.weight.requires_grad_(True)
    space.run(calls.hidden[0], *calls.arguments(0, 0)).square().mean().backward()
    assert all(linear.weight.grad is not None for linear in space.linears.values())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.int8), "stored as torch.int8"),
        (torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "stored as torch.float8_e4m3fn"),
        (torch.zeros(4, 4, device="meta"), "not in memory"),
    ],
)
def test_weights_that_cannot_be_worked_on_are_refused(weight: torch.Tensor, message: str) -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    block[0].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ModelError, match=rf"layers\.0\.0\.weight.*{message}"):
        BlockWorkspace(block, "layers.0", "cpu")
