"""sparsify and desparsify: what is swapped, what is left alone, and that nothing is lost."""

from __future__ import annotations

import gc
import json
import weakref
from collections import Counter
from pathlib import Path

import accelerate
import pytest
import torch
from fake_backends import remember
from peft import LoraConfig, get_peft_model
from pruned_models import pruned_linear, pruned_model
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

import wandapp_kernels as wk
from wandapp_kernels import dispatch
from wandapp_kernels.backends import Problem
from wandapp_kernels.errors import ModelError, UsageError
from wandapp_kernels.models.load import LoadedModel
from wandapp_kernels.ops.layouts import CANONICAL
from wandapp_kernels.runtime import SparseLinear, desparsify, sparsify
from wandapp_kernels.runtime.prepare import prepare
from wandapp_kernels.runtime.swap import sparse_layers

ARCHITECTURES = ("llama", "qwen2", "gemma3", "opt", "gpt2", "phi", "mixtral")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(token_ids(2, 9)).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_swapped_model_computes_the_same_and_comes_back_bit_for_bit(arch: str) -> None:
    model = pruned_model(arch)
    expected, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    linears = [name for name, kind in kinds.items() if kind in (nn.Linear, Conv1D)]
    report = sparsify(model)
    assert {layer.name for layer in report.swapped} == {n for n in linears if n != "lm_head"}
    assert {layer.pattern for layer in report.swapped} == {"2:4", "unstructured"}
    assert report.left_dense.keys() == {"lm_head"}
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert sorted(desparsify(model)) == sorted(layer.name for layer in report.swapped)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(logits(model), expected)
    assert not hasattr(model.config, "quantization_config")


def test_the_report_counts_bytes(tmp_path) -> None:
    model = pruned_model("llama", ("2:4",)).to(torch.bfloat16)
    report = sparsify(model, layouts="canonical")
    layer = next(layer for layer in report.swapped if layer.name == "model.layers.0.mlp.down_proj")
    assert (layer.shape, layer.pattern, layer.layout) == ((32, 48), "2:4", "nm")
    assert layer.dense_bytes == 32 * 48 * 2 and layer.bytes == 32 * 48 * 2 * 9 // 16
    assert layer.sparsity == pytest.approx(0.5)
    assert report.bytes * 16 == report.dense_bytes * 9
    assert report.bytes == sum(layer.nbytes for _, layer in sparse_layers(model))
    assert json.loads(json.dumps(report.to_dict()))["left_dense"] == {"lm_head": report.left_dense["lm_head"]}


def mixed() -> nn.Sequential:
    class Odd(nn.Linear):
        """A subclass, whose forward may do anything."""

    odd = Odd(16, 12)
    odd.weight.data.copy_(pruned_linear().weight.data)
    hooked = pruned_linear()
    hooked.register_forward_hook(lambda *_: None)
    infinite = pruned_linear()
    infinite.weight.data[infinite.weight.data != 0] = torch.inf
    return nn.Sequential(
        nn.Linear(16, 12), pruned_linear(pattern="30%"), odd, hooked, infinite, pruned_linear(), pruned_linear()
    )


def test_what_stays_dense_is_listed_with_the_reason() -> None:
    model = mixed()
    report = sparsify(model, ignore=["6"])
    assert [layer.name for layer in report.swapped] == ["5"]
    words = {"0": "zeros", "1": "zeros", "2": "Odd", "3": "hooks", "4": "infinite", "6": "ignored"}
    assert report.left_dense.keys() == words.keys()
    for name, word in words.items():
        assert word in report.left_dense[name], name
        assert not isinstance(model[int(name)], SparseLinear)
    again = sparsify(model)
    assert [layer.name for layer in again.swapped] == ["6"] and "5" not in again.left_dense


def test_sparse_experts_that_stay_dense_are_listed() -> None:
    model = pruned_model("mixtral", ("2:4",))
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj.view(-1)[::2] = 0
    left = sparsify(model).left_dense
    assert left.keys() == {"lm_head", "model.layers.1.mlp.experts.down_proj"}
    assert "several matrices (experts) in one tensor" in left["model.layers.1.mlp.experts.down_proj"]


def test_what_a_swap_would_silence_stays() -> None:
    seen: list[str] = []
    hooked, replaced = pruned_linear(), pruned_linear()
    hooked.register_full_backward_pre_hook(lambda *_: seen.append("backward"))
    plain = replaced.forward
    replaced.forward = lambda x: plain(x) + 7
    model = nn.Sequential(nn.Sequential(hooked), nn.Sequential(replaced))
    x = torch.randn(2, 16, requires_grad=True)
    expected = model[1](x)
    report = sparsify(model)
    assert "hooks" in report.left_dense["0.0"] and "forward" in report.left_dense["1.0"]
    model[0](x).sum().backward()
    assert seen == ["backward"] and torch.equal(model[1](x), expected)


def test_what_was_put_on_a_sparse_layer_is_not_lost() -> None:
    seen: list[str] = []
    model = nn.Sequential(pruned_linear(), pruned_linear(16, 12))
    sparsify(model)
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    gone = model[1].register_forward_pre_hook(lambda *_, **__: seen.append("gone"), with_kwargs=True)
    model[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    desparsify(model)
    gone.remove()
    model(torch.randn(2, 16, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"] and not any(sparse_layers(model))
    sparsify(model := nn.Sequential(pruned_linear(), pruned_linear(16, 12)))
    model[1].forward = model[1].forward
    with pytest.raises(ModelError, match=r"forward of 1 was replaced .*remove_hook_from_module"):
        desparsify(model)
    assert len(list(sparse_layers(model))) == 2


def test_adapters_go_on_being_trained() -> None:
    lora = LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(pruned_model("llama", ("2:4",)), lora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    report = sparsify(model)
    assert len(report.swapped) == 21 and not any("lora" in layer.name for layer in report.swapped)
    assert sum("adapter" in reason for reason in report.left_dense.values()) == 3 * 2 + 3
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    model(token_ids(1, 6), labels=token_ids(1, 6)).loss.backward()
    assert model.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight").grad.any()


def test_a_named_pattern_is_used_where_it_holds() -> None:
    model = nn.Sequential(pruned_linear(pattern="2:4"), pruned_linear(pattern="60%"), pruned_linear(pattern="1:4"))
    report = sparsify(model, "2:4")
    assert [(layer.name, layer.pattern) for layer in report.swapped] == [("0", "2:4"), ("2", "2:4")]
    assert report.left_dense == {"1": "it breaks the pattern 2:4"}
    desparsify(model)
    assert {layer.pattern for layer in sparsify(model, "unstructured").swapped} == {"unstructured"}
    desparsify(model)
    assert [layer.pattern for layer in sparsify(model).swapped] == ["2:4", "unstructured", "1:4"]


def test_few_zeros_do_not_make_a_layer_sparse() -> None:
    for share, least, swapped in (("39%", 0.4, 0), ("45%", 0.4, 1), ("39%", 0.2, 1), ("60%", 0.7, 0)):
        model = nn.Sequential(pruned_linear(32, 100, share))
        assert len(sparsify(model, min_sparsity=least).swapped) == swapped, share
    # 95 % dense: the bitmap and the offsets take more than the zeros give
    assert "as many bytes" in sparsify(nn.Sequential(pruned_linear(32, 100, "5%")), min_sparsity=0).left_dense["0"]


def test_targets_choose_layers() -> None:
    model = pruned_model("llama")
    report = sparsify(model, targets=["down_proj", "re:layers\\.1\\..*q_proj"])
    names = [layer.name for layer in report.swapped]
    assert names == [n for n in names if n.endswith("down_proj") or n == "model.layers.1.self_attn.q_proj"]
    assert len(names) == 4 and report.left_dense["model.layers.0.self_attn.q_proj"] == "not among the targets"
    with pytest.raises(UsageError, match="no linear layer of the model is chosen by nothing;"):
        sparsify(model, targets=["nothing"])
    with pytest.raises(UsageError, match="no linear layer of the model is chosen by nothing;"):
        sparsify(model, targets="nothing")
    one = pruned_model("llama", ("2:4",))
    left = sparsify(one, targets="mlp.down_proj", ignore="model.layers.1.mlp.down_proj").left_dense
    assert [name for name, _ in sparse_layers(one)] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 2)]
    assert left["model.layers.1.mlp.down_proj"] == "ignored"


def test_wrong_requests() -> None:
    for pattern in ("50%", 0.5, "sparse"):
        with pytest.raises(UsageError):
            sparsify(pruned_model("llama"), pattern)
    with pytest.raises(UsageError, match="must be 'auto' or 'canonical'"):
        sparsify(pruned_model("llama"), layouts="nm_pairs")
    loaded, ids = LoadedModel(pruned_model("llama"), None, "m", None), token_ids(1, 4)
    for call in (
        lambda: wk.sparsify(loaded),
        lambda: wk.desparsify(loaded),
        lambda: wk.prune(loaded, ids),
        lambda: wk.save(loaded, None, "nowhere"),
        lambda: wk.evaluate(loaded, None),
    ):
        with pytest.raises(UsageError, match="a LoadedModel, which is no torch module; give its"):
            call()
    with pytest.raises(UsageError, match="must be token ids"):
        wk.prune(loaded.model, "wiki")
    with pytest.raises(UsageError, match="samples have 65 tokens, but the model's context is 64"):
        wk.prune(loaded.model, token_ids(1, 65))
    with pytest.raises(UsageError, match="'down_prj', is that of no linear layer"):
        sparsify(pruned_model("llama"), ignore="down_prj")
    with pytest.raises(UsageError, match="leave one out"):
        sparsify(pruned_model("llama"), tune=True, layouts="canonical")
    with pytest.raises(UsageError, match="give a torch module"):
        sparsify(None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="from_linear"):
        sparsify(pruned_linear())
    with pytest.raises(ModelError, match="to_linear"):
        desparsify(SparseLinear.from_linear(pruned_linear()))


def test_canonical_layers_can_be_offloaded() -> None:
    model = pruned_model("llama")
    sparsify(model, layouts="canonical")
    expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), expected)


def test_tied_weights_are_left_alone() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.view(-1)[::2] = 0
    with pytest.raises(UsageError, match="fraction of zeros"):
        sparsify(model, min_sparsity=7)
    report = sparsify(model, min_sparsity=0.4)
    assert "shared with model.embed_tokens.weight" in report.left_dense["lm_head"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shared = pruned_linear()
    both = nn.Sequential(shared, nn.ReLU(), shared)  # one module in two places is swapped in both or in none
    sparsify(both)
    assert both[0] is both[2] or {type(both[0]), type(both[2])} == {nn.Linear}


def test_dense_weights_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the second compressed weight is made, the first dense one is gone already, and so on."""
    model = pruned_model("llama", ("2:4",))
    alive: dict[str, weakref.ref] = {
        name: weakref.ref(module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    counts: list[int] = []
    made = SparseLinear.from_linear.__func__

    def counting(cls, linear, *args, **options):
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive.values()))
        return made(cls, linear, *args, **options)

    monkeypatch.setattr(SparseLinear, "from_linear", classmethod(counting))
    total = len(alive)
    sparsify(model)
    assert counts == [total - done for done in range(total - 1)]  # all but the head
    gc.collect()
    assert [name for name, ref in alive.items() if ref() is not None] == ["lm_head"]


def test_what_save_pretrained_writes_of_a_swapped_model_can_be_loaded(tmp_path) -> None:
    model = pruned_model("llama")
    expected = logits(model)
    sparsify(model)
    model.save_pretrained(tmp_path / "out")
    loaded = wk.load(str(tmp_path / "out"), tokenizer=False).model
    assert Counter(type(m).__name__ for m in loaded.modules())["SparseLinear"] == 21
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_compressed_already_are_packed_for_where_they_are() -> None:
    model = pruned_model("llama")

    def layouts() -> dict[str, str]:
        return {name: layer.layout for name, layer in sparse_layers(model)}

    sparsify(model)
    expected, packed = logits(model), layouts()
    canonical = {name: CANONICAL[layer._operator] for name, layer in sparse_layers(model)}
    sparsify(model, layouts="canonical", ignore="q_proj")
    assert layouts() == {name: (packed if "q_proj" in name else canonical)[name] for name in packed}
    model.double().float()  # kernels take no fp64
    assert layouts() == canonical
    sparsify(model, targets="up_proj")
    assert layouts() == {name: (packed if "up_proj" in name else canonical)[name] for name in packed}
    assert not sparsify(model).swapped and layouts() == packed
    assert torch.equal(logits(model), expected)


def test_prepare_swaps_for_a_family_of_backends() -> None:
    model = pruned_model("llama", ("2:4",))
    expected = logits(model)
    for backend, words in (("reference", "21 × 2:4"), ("dense", "all layers dense"), ("auto", "21 × 2:4")):
        prepared = prepare(model, backend)
        assert prepared.layers == words
        assert len(list(sparse_layers(model))) == (0 if backend == "dense" else 21)
        with prepared.running():
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="there is no backend 'abacus'"):
        prepare(model, "abacus")


def test_prepare_measures_for_a_model_that_is_compressed_already(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = pruned_model("llama", ("2:4",))
    expected = logits(model)
    sparsify(model)
    asked: set[tuple[int, int]] = set()

    def tune(problems: list[Problem]) -> None:
        """Where the weight has 48 rows, dense wins."""
        asked.update((problem.out_features, problem.in_features) for problem in problems)
        for problem in problems:
            remember(problem, {"dense": 2.0, "decompress-nm": 9.0 if problem.out_features == 48 else 1.0})

    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "tune", tune)
    dispatch.forget()
    try:
        assert prepare(model).layers == "21 × 2:4" and not asked
        left = sparsify(model, tune=True).left_dense
        assert sum(reason == "the dense product is faster here" for reason in left.values()) == 6
        assert prepare(model, tune=True).layers == "15 × 2:4"
        assert asked == {(32, 32), (16, 32), (48, 32), (32, 48), (128, 32)}  # the head too
        assert {layer.layout for _, layer in sparse_layers(model)} == {"nm"}
        assert not any(isinstance(block.mlp.gate_proj, SparseLinear) for block in model.model.layers)
        assert len(model.config.quantization_config.to_dict()["layers"]) == 15
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    finally:
        dispatch.forget()


def test_a_swapped_model_is_not_pruned() -> None:
    model = pruned_model("llama")
    sparsify(model)
    with pytest.raises(UsageError, match="desparsify"):
        wk.prune(model, token_ids(2, 8), "magnitude")


def test_a_model_is_moved_before_it_is_swapped() -> None:
    model = pruned_model("llama", ("2:4",))
    # What is nowhere cannot be compressed.
    assert prepare(model, device=torch.device("meta")).layers == "no layer is sparse"
    assert all(parameter.is_meta for parameter in model.parameters())
