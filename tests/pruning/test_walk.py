"""The walk over the decoder blocks: what is pruned, what is left alone, and against a straightforward rewrite."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model, token_ids
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from wandapp_kernels import api
from wandapp_kernels.models.calls import BlockCalls
from wandapp_kernels.pruning import walk
from wandapp_kernels.pruning.methods import METHODS, build_settings
from wandapp_kernels.pruning.reports import PruneReport
from wandapp_kernels.sparsity import Pattern, satisfies, sparsity_of

TWO_OF_FOUR = Pattern.parse("2:4")
SAMPLES, TOKENS = 4, 12
IDS = token_ids(SAMPLES, TOKENS)
FEW = {"rounds": 2, "samples": 2}  # of the regional optimiser

Matrices = dict[str, torch.Tensor]


def prune(model: PreTrainedModel, method: str = "wanda", sparsity: str = "2:4", **changes) -> PruneReport:
    if METHODS[method].optimizer is not None:
        changes["optimizer"] = {**FEW, **changes.get("optimizer", {})}
    if METHODS[method].self_calibration:
        changes.setdefault("self_calibration", 0)  # tested elsewhere; slow
    return walk.prune_blocks(model, IDS, build_settings(method, sparsity, **changes))


def matrices(model: PreTrainedModel) -> Matrices:
    """Every weight that is to be pruned, as ``[out, in]``: Linears, GPT-2's Conv1D, and each expert's matrices."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            found[f"{name}.weight"] = module.weight.detach()
        elif isinstance(module, Conv1D):
            found[f"{name}.weight"] = module.weight.detach().T
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                found |= {f"{name}.{own}[{e}]": matrix for e, matrix in enumerate(parameter.detach())}
    return found


def copies(model: PreTrainedModel) -> Matrices:
    return {name: matrix.clone() for name, matrix in matrices(model).items()}


def keep_two_of_four(scores: torch.Tensor) -> torch.Tensor:
    groups = scores.reshape(len(scores), -1, 4)
    kept = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, kept, True).reshape(scores.shape)


def keep_half_of_rows(scores: torch.Tensor) -> torch.Tensor:
    kept = scores.argsort(dim=-1, descending=True, stable=True)[:, : scores.shape[1] // 2]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_matrix_of_every_block_is_pruned_and_nothing_else(arch: str) -> None:
    model = tiny_model(arch)
    before, others = copies(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    report = prune(model)

    after = matrices(model)
    for name, matrix in after.items():
        mask = matrix != 0
        assert satisfies(mask, TWO_OF_FOUR), name
        assert sparsity_of(matrix) == 0.5, name
        assert torch.equal(matrix, before[name] * mask), name
    pruned = {name.split("[")[0] for name in after}
    untouched = [name for name, p in model.named_parameters() if name not in pruned]
    assert any("norm" in name or "ln_" in name for name in untouched)
    for name in untouched:
        assert torch.equal(model.get_parameter(name), others[name]), name
    assert all(p.grad is None for p in model.parameters())

    assert report.achieved_sparsity == 0.5 and report.warnings == []
    assert [block.name.rpartition(".")[2] for block in report.blocks] == ["0", "1", "2"]
    assert sum(len(block.layers) for block in report.blocks) == len(after)
    assert all(layer.sparsity == 0.5 and layer.output_error > 0 for block in report.blocks for layer in block.layers)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_conv1d_is_pruned_along_its_input() -> None:
    model = tiny_model("gpt2")
    prune(model)
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")  # stored [in, out]
    assert weight.shape == (32, 48)
    assert satisfies(weight.T != 0, TWO_OF_FOUR) and not satisfies(weight != 0, TWO_OF_FOUR)


def naive(model: PreTrainedModel, keep: Callable[[torch.Tensor], torch.Tensor], alpha: float) -> None:
    """Wanda (alpha 0) or RGS by the book: the whole model in float64, once for every block."""
    blocks = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]
        squares = {layer: torch.zeros(layer.weight.shape) for layer in layers}
        norms: dict[nn.Module, torch.Tensor] = {}
        outputs: list[torch.Tensor] = []

        def see_input(layer: nn.Module, inputs: tuple[torch.Tensor], norms=norms) -> None:
            norms[layer] = norms.get(layer, 0) + inputs[0].detach().flatten(0, 1).square().sum(0)

        def see_output(_block: nn.Module, _inputs: object, output: object, outputs=outputs) -> None:
            outputs.append(output if isinstance(output, torch.Tensor) else output[0])

        handles = [layer.register_forward_pre_hook(see_input) for layer in layers]
        handles.append(block.register_forward_hook(see_output))
        for sample in range(SAMPLES):
            model(IDS[sample : sample + 1])
            gradients = torch.autograd.grad(outputs[-1].norm(), [layer.weight for layer in layers])
            for layer, gradient in zip(layers, gradients, strict=True):
                squares[layer] = squares[layer] + gradient.square()
        for handle in handles:
            handle.remove()
        for layer in layers:
            transpose = isinstance(layer, Conv1D)
            weight, gradient = layer.weight.data, (squares[layer] / SAMPLES).sqrt()
            norm = norms[layer].sqrt()
            score = (alpha * gradient + (norm[:, None] if transpose else norm)) * weight.abs()
            weight *= keep(score.T).T if transpose else keep(score)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("method", "alpha", "sparsity", "keep"),
    [
        ("wanda", 0.0, "2:4", keep_two_of_four),
        ("wanda", 0.0, "0.5", keep_half_of_rows),
        ("wanda++rgs", 100.0, "2:4", keep_two_of_four),
    ],
)
def test_masks_equal_a_straightforward_rewrite(arch: str, method: str, alpha: float, sparsity: str, keep) -> None:
    model, expected = tiny_model(arch), tiny_model(arch).double()
    original = copies(model)
    prune(model, method, sparsity)
    naive(expected, keep, alpha)
    wanted = matrices(expected)
    for name, matrix in matrices(model).items():
        assert torch.equal(matrix, original[name] * (wanted[name] != 0)), name


def test_the_next_block_sees_the_pruned_output() -> None:
    """Statistics of the dense stream would give other masks in the second block, as the rewrite shows."""
    model, dense = tiny_model("llama"), tiny_model("llama")
    seen: dict[str, torch.Tensor] = {}
    layer = dense.model.layers[1].mlp.up_proj
    layer.register_forward_pre_hook(lambda _m, inputs: seen.update(x=inputs[0].flatten(0, 1)))
    with torch.no_grad():
        dense(IDS)
    on_dense_stream = keep_two_of_four(seen["x"].norm(dim=0) * layer.weight.abs())
    prune(model)
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight != 0, on_dense_stream)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_regional_gradient_without_weight_is_wanda_bit_for_bit(arch: str) -> None:
    wanda, regional = tiny_model(arch), tiny_model(arch)
    prune(wanda)
    prune(regional, "wanda++rgs", alpha=0.0)
    for (name, expected), found in zip(wanda.named_parameters(), regional.parameters(), strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("method", ["wanda++", "best", "gblm"])
def test_one_seed_gives_one_result(method: str) -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    torch.manual_seed(1)
    prune(first, method)
    torch.manual_seed(2)  # the global random state does not matter
    state = torch.random.get_rng_state()
    prune(second, method)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, expected), found in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_another_seed_draws_other_samples() -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    prune(first, "wanda++ro", seed=0)
    prune(second, "wanda++ro", seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm", "gblm", "best"])
@pytest.mark.parametrize("default", ["dtype", "device"])
def test_torchs_defaults_do_not_matter(method: str, default: str) -> None:
    """A script that sets them for a model of its own has its statistics in fp32 all the same."""
    changes = {"self_calibration": 60, "optimizer": FEW} if method == "best" else {}
    results = []
    for dtype, device in ((torch.float32, None), (torch.bfloat16, "meta")):
        model = tiny_model("mixtral")
        if default == "dtype":
            torch.set_default_dtype(dtype)
        else:
            torch.set_default_device(device)
        try:
            report = api.prune(model, IDS, method, **changes)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        results.append((report.text_hash, matrices(model)))
    assert results[0][0] == results[1][0]
    for name, matrix in results[0][1].items():
        assert torch.equal(results[1][1][name], matrix), name


class _Watched(walk.BlockPruner):
    """Keeps every pruner of a run."""

    made: list[walk.BlockPruner]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made.append(self)


@pytest.fixture
def pruners(monkeypatch: pytest.MonkeyPatch) -> list[walk.BlockPruner]:
    monkeypatch.setattr(_Watched, "made", [], raising=False)
    monkeypatch.setattr(walk, "BlockPruner", _Watched)
    return _Watched.made


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "gemma3"])
def test_the_batch_size_changes_rounding_only(
    arch: str, pruners: list[walk.BlockPruner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample at a time, three, all at once, and all as for a model whose samples need arguments of their own."""
    results, statistics = [], []
    for tokens in (1, 3 * TOKENS, 10**6, None):
        monkeypatch.setattr(walk, "BATCH_TOKENS", tokens or 10**6)
        if tokens is None:
            monkeypatch.setattr(BlockCalls, "shared", lambda self: False)
        pruners.clear()
        model = tiny_model(arch)
        prune(model)
        results.append(matrices(model))
        statistics.append({name: s for pruner in pruners for name, s in pruner.statistics.items()})
        assert {pruner._batch for pruner in pruners} == {
            1 if tokens in (1, None) else 3 if tokens == 36 else 10**6 // 12
        }
    for found, seen in zip(results[1:], statistics[1:], strict=True):
        for name, matrix in results[0].items():
            assert torch.equal(found[name], matrix), name
        for name, expected in statistics[0].items():
            torch.testing.assert_close(seen[name].sum_squares, expected.sum_squares, rtol=1e-4, atol=1e-6)
            assert (seen[name].tokens, seen[name].sequences) == (expected.tokens, expected.sequences)


@pytest.mark.parametrize(
    ("ignore", "dense"),
    [
        (("down_proj",), "down_proj"),
        (("model.layers.1",), None),  # a block is no Linear, so the name of one chooses none
        (("re:^model\\.layers\\.1\\.",), "layers.1."),
        (("mlp.up_proj", "self_attn.o_proj"), "up_proj|o_proj"),
    ],
)
def test_ignored_layers_stay_dense_and_unlisted(ignore: tuple[str, ...], dense: str | None) -> None:
    model = tiny_model("llama")
    before = copies(model)
    report = prune(model, ignore=ignore)
    listed = {f"{layer.name}.weight" for block in report.blocks for layer in block.layers}
    for name, matrix in matrices(model).items():
        stays = dense is not None and any(part in name for part in dense.split("|"))
        assert (name in listed) is not stays
        assert torch.equal(matrix, before[name]) is stays
    assert len(report.blocks) == 3
    assert report.achieved_sparsity == 0.5


def test_progress_counts_the_blocks_and_the_gradients() -> None:
    seen: list[walk.Progress] = []
    settings = build_settings("gblm", "2:4")
    walk.prune_blocks(tiny_model("llama"), IDS, settings, progress=seen.append)
    assert [(p.stage, p.done, p.total) for p in seen] == [
        *(("gradients", i, SAMPLES) for i in range(1, SAMPLES + 1)),
        *(("block", i, 3) for i in range(1, 4)),
    ]
    assert all(p.loss is None for p in seen)
    seen.clear()
    settings = build_settings("wanda++ro", "2:4", optimizer=FEW)
    walk.prune_blocks(tiny_model("llama"), IDS, settings, progress=seen.append)
    assert all(p.loss is not None and 0 < p.loss < 1 for p in seen)


def test_the_report_describes_the_run() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[:, 5] = 0.0
    model.model.layers[0].input_layernorm.weight.data[5] = 0.0
    report = prune(model, "sparsegpt", "50%", seed=3)
    assert (report.method, report.sparsity, report.seed) == ("sparsegpt", "50%", 3)
    assert (report.samples, report.seqlen) == IDS.shape
    assert report.settings["criterion"] == "obs" and report.settings["pattern"] == "50%"
    assert report.device.endswith(("thread", "threads")) and report.versions["torch"] == torch.__version__
    assert report.text_hash == walk.token_hash(IDS)
    first = {layer.name: layer for layer in report.blocks[0].layers}
    assert first["model.layers.0.self_attn.q_proj"].dead_channels == 1
    assert first["model.layers.0.mlp.down_proj"].dead_channels == 0
    assert first["model.layers.0.mlp.down_proj"].shape == (32, 48)
    assert all(layer.tokens == IDS.numel() for layer in first.values())
    assert report.seconds >= sum(block.seconds for block in report.blocks) > 0
    assert report.peak_memory_bytes >= max(block.peak_memory_bytes for block in report.blocks) > 0
    assert report.achieved_sparsity == pytest.approx(0.5, abs=0.001)
    assert report.to_dict()["blocks"][0]["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"


def test_output_errors_are_those_of_the_pruned_model() -> None:
    model, dense = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1)
    report = prune(model)
    outputs = []
    for net in (dense, model):
        net.model.layers[0].register_forward_hook(lambda _m, _i, output: outputs.append(output))
        with torch.no_grad():
            net(IDS)
    expected = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert report.blocks[0].output_error == pytest.approx(float(expected), rel=1e-4)
    q_proj = report.blocks[0].layers[0]
    hidden = dense.model.layers[0].input_layernorm(dense.model.embed_tokens(IDS)).flatten(0, 1).detach()
    dense_out = hidden @ dense.model.layers[0].self_attn.q_proj.weight.T
    difference = hidden @ model.model.layers[0].self_attn.q_proj.weight.T - dense_out
    assert q_proj.output_error == pytest.approx((difference.norm() / dense_out.norm()).item(), rel=1e-4)


def test_a_smaller_last_batch_has_no_part_in_the_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids(5, TOKENS)
    monkeypatch.setattr(walk, "BATCH_TOKENS", 2 * TOKENS)
    model, dense = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1)
    report = walk.prune_blocks(model, ids, build_settings("wanda", "2:4"))
    outputs = []
    for net in (dense, model):
        net.model.layers[0].register_forward_hook(lambda _m, _i, output: outputs.append(output))
        with torch.no_grad():
            net(ids[:2])
    expected = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert report.blocks[0].output_error == pytest.approx(float(expected), rel=1e-4)
