"""Every setting of the walk changes the result, and in the way it says."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from tiny_models import tiny_model, token_ids
from transformers import PreTrainedModel

from wandapp_kernels.errors import UsageError
from wandapp_kernels.models.workspace import BlockWorkspace
from wandapp_kernels.pruning import walk
from wandapp_kernels.pruning.criteria import CRITERIA, Criterion
from wandapp_kernels.pruning.methods import METHODS, build_all, build_settings
from wandapp_kernels.pruning.reports import PruneReport
from wandapp_kernels.pruning.statistics import LayerStatistics
from wandapp_kernels.sparsity import Pattern, satisfies

SAMPLES = 4
IDS = token_ids(SAMPLES, 12)
ROUNDS = 2
O_PROJ = "model.layers.0.self_attn.o_proj.weight"
LINEARS = 7  # of a Llama block


def prune(method: str = "wanda", arch: str = "llama", **changes) -> tuple[PreTrainedModel, PruneReport]:
    """A two-block model after pruning; the regional optimiser gets few and large steps unless told otherwise."""
    model = tiny_model(arch, num_hidden_layers=2)
    row = METHODS[method].optimizer
    if changes.get("regional_optimizer", row is not None):
        small = {"rounds": ROUNDS, "samples": 3, "relative_lr": 1e-2}
        changes["optimizer"] = {**small, **changes.get("optimizer", {})}
    if METHODS[method].self_calibration:
        changes.setdefault("self_calibration", 0)  # tested elsewhere; slow
    report = walk.prune_blocks(model, IDS, build_settings(method, "2:4", **changes))
    return model, report


def different(one: PreTrainedModel, other: PreTrainedModel) -> set[str]:
    """Names of the parameters that differ."""
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return {name for (name, a), b in pairs if not torch.equal(a, b)}


def block(name: str) -> str:
    return ".".join(name.split(".")[:3])


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[LayerStatistics]:
    """The statistics that Wanda's and RGS's scores were given, call by call."""
    calls: list[LayerStatistics] = []
    for name in ("wanda", "rgs"):
        real = CRITERIA[name]

        def score(weight, statistics, alpha, real=real):
            calls.append(statistics)
            return real.score(weight, statistics, alpha)

        monkeypatch.setitem(CRITERIA, name, Criterion(score, real.needs))
    return calls


def input_squares(model: PreTrainedModel, name: str) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0].square().sum(0)


def test_sequential_takes_the_statistics_behind_the_linears_already_pruned(scored: list[LayerStatistics]) -> None:
    at_once, _ = prune()
    together = [call.sum_squares for call in scored[:LINEARS]]
    scored.clear()
    one_by_one, _ = prune(sequential=True)
    alone = [call.sum_squares for call in scored[:LINEARS]]

    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    model = tiny_model("llama", num_hidden_layers=2)
    for name, first, then in zip(names, together, alone, strict=True):
        full = f"model.layers.0.{name}.weight"
        torch.testing.assert_close(then, input_squares(model, full), rtol=1e-4, atol=1e-6)
        model.get_parameter(full).data.copy_(one_by_one.get_parameter(full))  # what the following ones see
        assert torch.allclose(then, first, rtol=1e-4) is (name[-6] in "qkv"), name
    assert O_PROJ in different(at_once, one_by_one)


def test_sequential_follows_the_order_in_which_the_linears_run(scored: list[LayerStatistics]) -> None:
    """Phi-3 names o_proj before the qkv_proj that it reads from."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model, dense = (
        tiny_model("phi3", vocab_size=128, num_hidden_layers=1, pad_token_id=0, initializer_range=0.2, **sizes)
        for _ in range(2)
    )
    walk.prune_blocks(model, IDS, build_settings("wanda", "2:4", sequential=True))
    qkv = "model.layers.0.self_attn.qkv_proj.weight"
    dense.get_parameter(qkv).data.copy_(model.get_parameter(qkv))
    torch.testing.assert_close(scored[1].sum_squares, input_squares(dense, O_PROJ), rtol=1e-4, atol=1e-6)


def test_sequential_works_with_repairs_gradients_and_the_optimizer() -> None:
    for method in ("sparsegpt", "wanda++rgs", "wanda++"):
        model, report = prune(method, sequential=True)
        assert report.achieved_sparsity == 0.5
        assert different(model, prune(method)[0])


def test_the_regional_gradient_is_taken_again_only_when_asked(scored: list[LayerStatistics]) -> None:
    """The page takes it once from the dense block; recomputed, the last prune sees that of the optimised one."""
    prune("wanda++")
    once = [call.regional_gradient for call in scored]
    scored.clear()
    prune("wanda++", recompute_gradient=True)
    again = [call.regional_gradient for call in scored]

    calls = (ROUNDS + 1) * LINEARS
    assert len(once) == len(again) == 2 * calls
    for layer in range(LINEARS):
        mine = range(layer, calls, LINEARS)
        assert all(torch.equal(once[i], once[layer]) for i in mine)
        assert all(torch.equal(again[i], once[layer]) for i in mine[:-1])
        assert not torch.allclose(again[mine[-1]], once[layer], rtol=1e-3)


def test_x_norm_mean_divides_by_the_square_root_of_the_samples(scored: list[LayerStatistics]) -> None:
    """(α·G + ‖X‖/√N)·|W| orders weights as (α·√N·G + ‖X‖)·|W| does: exactly so for N = 4."""
    by_sum, _ = prune("wanda++rgs", alpha=30.0)
    by_mean, _ = prune("wanda++rgs", alpha=30.0, x_norm="mean")
    stronger, _ = prune("wanda++rgs", alpha=60.0)
    norms = [call.norm() for call in scored[: 2 * 2 * LINEARS]]
    assert torch.equal(norms[0], 2 * norms[2 * LINEARS])
    assert not different(by_mean, stronger)
    assert different(by_mean, by_sum)


def test_zero_grad_round_accumulates_over_the_round() -> None:
    one, other = prune("wanda++ro"), prune("wanda++ro", optimizer={"zero_grad": "round"})
    assert different(one[0], other[0])
    single = [prune("wanda++ro", optimizer={"zero_grad": z, "samples": 1})[0] for z in ("sample", "round")]
    assert not different(*single)  # with one step a round there is nothing to accumulate


def test_target_dense_differs_from_the_second_block_on() -> None:
    """Both streams are the embeddings in front of the first block."""
    keep = {"mask": "keep"}
    (pruned, _), (dense, report) = (
        prune("wanda++ro", optimizer=keep),
        prune("wanda++ro", optimizer={**keep, "target": "dense"}),
    )
    assert {block(name) for name in different(pruned, dense)} == {"model.layers.1"}
    assert report.blocks[1].loss > 0


def test_target_dense_is_the_dense_models_own_output(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = walk.BlockPruner.prune

    def watch(self, target):
        seen.append(target.batch(range(SAMPLES)).clone())
        real(self, target)

    monkeypatch.setattr(walk.BlockPruner, "prune", watch)
    prune("best")
    model, outputs = tiny_model("llama", num_hidden_layers=2), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    with torch.no_grad():
        model(IDS)
    for found, expected in zip(seen, outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def trained_vectors(model: PreTrainedModel, ignore: tuple[str, ...] = ()) -> set[str]:
    dense = tiny_model("qwen2", num_hidden_layers=2)
    return {name for name in different(model, dense) if dense.get_parameter(name).dim() == 1}


def test_norms_trains_norm_weights_and_biases() -> None:
    without, _ = prune("wanda++ro", "qwen2")
    assert trained_vectors(without) == set()
    trained, _ = prune("wanda++ro", "qwen2", optimizer={"norms": True})
    vectors = (
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{x}_proj.bias" for x in "qkv"),
    )
    assert trained_vectors(trained) == {f"model.layers.{i}.{vector}" for i in range(2) for vector in vectors}
    ignoring, _ = prune("wanda++ro", "qwen2", optimizer={"norms": True}, ignore=("q_proj",))
    assert {name for name in different(ignoring, tiny_model("qwen2", num_hidden_layers=2)) if "q_proj" in name} == set()
    assert trained_vectors(ignoring) == {name for name in trained_vectors(trained) if "q_proj" not in name}


def test_norms_leave_other_vectors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: set[str] = set()
    write_back = BlockWorkspace.write_back

    def see(workspace: BlockWorkspace, extra: Iterable[str] = ()) -> None:
        trained.update(extra)
        write_back(workspace, extra)

    monkeypatch.setattr(BlockWorkspace, "write_back", see)
    model = tiny_model("llama", num_hidden_layers=1)
    model.model.layers[0].self_attn.sinks = torch.nn.Parameter(torch.ones(4))
    few = {"rounds": 1, "samples": 2, "norms": True}
    walk.prune_blocks(model, IDS, build_settings("wanda++ro", "2:4", optimizer=few))
    assert trained == {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_norms_reach_the_biases_of_gpt2() -> None:
    trained, _ = prune("wanda++ro", "gpt2", optimizer={"norms": True})
    changed = {name for name in different(trained, tiny_model("gpt2", num_hidden_layers=2)) if name.endswith(".bias")}
    assert {name.removeprefix("transformer.h.0.") for name in changed if ".h.0." in name} == {
        *("ln_1.bias", "ln_2.bias", "attn.c_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias")
    }


def test_preset_paper_moves_weights_by_its_absolute_rate() -> None:
    """RMSprop's first step is 10 times the rate, later ones are shorter; the page's relative rate moves them more."""
    dense = tiny_model("llama", num_hidden_layers=2)
    paper, report = prune("wanda++ro", preset="paper")
    page, _ = prune("wanda++ro")
    assert report.settings["optimizer"]["absolute_lr"] == 3e-7
    found = paper.get_parameter(O_PROJ)
    moved = (found - dense.get_parameter(O_PROJ))[found != 0].abs().max()
    assert 0 < moved <= 10 * 3e-7 * 3 * ROUNDS + 1e-7
    free = page.get_parameter(O_PROJ)
    assert (free - dense.get_parameter(O_PROJ))[free != 0].abs().max() > 100 * moved


def test_keep_holds_the_first_mask_and_regrow_changes_it(scored: list[LayerStatistics]) -> None:
    first, _ = prune()
    assert len(scored) == 2 * LINEARS
    scored.clear()
    kept, _ = prune("wanda++ro", optimizer={"mask": "keep"})
    assert len(scored) == 2 * LINEARS
    scored.clear()
    regrown, _ = prune("wanda++ro", optimizer={"relative_lr": 0.1})
    assert len(scored) == 2 * LINEARS * (ROUNDS + 1)
    of_first_block = [name for name in different(first, kept) if block(name) == "model.layers.0"]
    assert len(of_first_block) == LINEARS
    changed = 0
    for name in of_first_block:
        mask = first.get_parameter(name) != 0
        assert torch.equal(kept.get_parameter(name) != 0, mask), name
        assert not torch.equal(kept.get_parameter(name), first.get_parameter(name))
        assert satisfies(regrown.get_parameter(name) != 0, Pattern.parse("2:4"))
        changed += int(((regrown.get_parameter(name) != 0) != mask).sum())
    assert changed > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": "token"},
        {"schedule": "linear"},
        {"schedule": "cosine"},
        {"algorithm": "adam"},
        {"batch": 3},
        {"rounds": 3},
        {"samples": 0},
    ],
    ids=str,
)
def test_settings_of_the_optimizer_change_the_weights_and_not_the_first_mask(changed: dict[str, object]) -> None:
    keep = {"mask": "keep"}
    plain, _ = prune("wanda++ro", optimizer=keep)
    model, report = prune("wanda++ro", optimizer=keep | changed)
    names = {name for name in different(plain, model) if block(name) == "model.layers.0"}
    assert len(names) == LINEARS
    assert all(torch.equal(plain.get_parameter(name) != 0, model.get_parameter(name) != 0) for name in names)
    assert all(0 < found.loss < 1 for found in report.blocks)


def test_the_optimizer_brings_the_block_nearer_to_the_dense_one() -> None:
    _, plain = prune("wanda")
    _, page = prune("wanda++ro", optimizer={"rounds": 5, "samples": 0, "relative_lr": 1e-3})
    adam = {"mask": "keep", "algorithm": "adam", "schedule": "linear", "batch": 4, "rounds": 40, "samples": 0}
    _, repaired = prune("sparsegpt")
    _, best = prune("sparsegpt", regional_optimizer=True, optimizer=adam)
    assert page.blocks[0].output_error < 0.95 * plain.blocks[0].output_error
    assert best.blocks[0].output_error < 0.8 * repaired.blocks[0].output_error


def test_layer_group_compares_the_whole_matrix() -> None:
    model = tiny_model("llama", num_hidden_layers=2)
    weight = model.get_parameter(O_PROJ).detach().clone()
    walk.prune_blocks(model, IDS, build_settings("magnitude", "0.5"))
    assert torch.equal(model.get_parameter(O_PROJ) != 0, weight.abs() > weight.abs().median())
    rows = tiny_model("llama", num_hidden_layers=2)
    walk.prune_blocks(rows, IDS, build_settings("magnitude", "0.5", group="row"))
    assert set((rows.get_parameter(O_PROJ) != 0).sum(1).tolist()) == {16}


def test_any_score_goes_with_any_update_and_the_optimizer() -> None:
    """A given score's mask is kept by the update; the update's own score leaves the mask to it."""
    for score in ("wanda", "rgs", "ria"):
        plain, _ = prune("wanda", score=score)
        repaired, _ = prune("wanda", score=score, update="sparsegpt")
        for name in different(plain, repaired):
            if block(name) == "model.layers.0":
                assert torch.equal(repaired.get_parameter(name) != 0, plain.get_parameter(name) != 0), name
    jointly, _ = prune("sparsegpt")
    static, _ = prune("sparsegpt", update="none")
    same = [
        torch.equal(jointly.get_parameter(n) != 0, static.get_parameter(n) != 0) for n in different(jointly, static)
    ]
    assert not all(same)
    for update in ("sparsegpt", "admm", "admm-pcg"):
        model, report = prune("wanda++", update=update)
        assert report.achieved_sparsity == 0.5 and different(model, prune("wanda++")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "wandda"}, "method 'wandda'"),
        ({"score": "hessian"}, "score 'hessian'"),
        ({"update": "obc"}, "update 'obc'"),
        ({"preset": "community"}, "preset 'community'"),
        ({"preset": "paper"}, "preset belong to the regional optimiser"),
        ({"regional_optimizer": True, "optimizer": {"speed": 1}}, "speed"),
        ({"regional_optimizer": True, "optimizer": {"algorithm": "sgd"}}, "algorithm 'sgd'"),
        ({"regional_optimizer": True, "optimizer": {"rounds": 0}}, "at least one round"),
        ({"regional_optimizer": True, "optimizer": {"relative_lr": 0.0}}, "above 0"),
        ({"x_norm": "median"}, "x_norm 'median'"),
        ({"group": "column"}, "group 'column'"),
        ({"alpha": -1.0}, "alpha is -1"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_settings(**{"method": "wanda", "sparsity": "2:4", **arguments})


def test_changes_to_the_optimizer_go_to_the_methods_that_have_one() -> None:
    plain, full = build_all(["wanda", "wanda++"], "2:4", optimizer={"samples": 7}, preset="paper", seed=5)
    assert plain.optimizer is None and plain.seed == full.seed == 5
    assert (full.optimizer.samples, full.optimizer.absolute_lr) == (7, 3e-7)
    both = build_all(["wanda", "wanda++"], "2:4", optimizer={"samples": 7}, regional_optimizer=True)
    assert [settings.optimizer.samples for settings in both] == [7, 7]
    with pytest.raises(UsageError, match="samples belongs to the regional optimiser"):
        build_all(["wanda", "ria"], "2:4", optimizer={"samples": 7})
    with pytest.raises(UsageError, match="'wandda'"):
        build_all(["wanda", "wandda"], "2:4")
