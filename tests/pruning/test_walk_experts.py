"""Mixtures of experts: each expert is pruned by what its own tokens say."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch import nn
from transformers import PreTrainedModel

from wandapp_kernels.pruning import block, walk
from wandapp_kernels.pruning.criteria import CRITERIA, Criterion
from wandapp_kernels.pruning.methods import METHODS, build_settings
from wandapp_kernels.pruning.reports import LayerReport, PruneReport
from wandapp_kernels.sparsity import Pattern, mask_from_scores, satisfies

TWO_OF_FOUR = Pattern.parse("2:4")
IDS = token_ids(4, 24)
EXPERTS = 6
STARVED = (4, 5)
CONFIGS = {"mixtral": {"num_local_experts": EXPERTS}, "qwen3_moe": {"mlp_only_layers": []}}


def moe(arch: str, starve: bool = False) -> PreTrainedModel:
    """A two-block model with six experts of which two are active; with ``starve`` the last two of block 0 never are.

    Routing rows a, -a, b, -b, 0, 0: two of the logits ±a·x, ±b·x are positive, so the zeros are never chosen.
    """
    model = tiny_model(arch, num_hidden_layers=2, **CONFIGS[arch])
    if starve:
        router = model.model.layers[0].mlp.gate.weight.data
        router[1], router[3], router[4:] = -router[0], -router[2], 0.0
    return model


def prune(model: PreTrainedModel, method: str = "wanda", **changes) -> PruneReport:
    if METHODS[method].optimizer is not None:
        changes["optimizer"] = {"rounds": 2, "samples": 2, **changes.get("optimizer", {})}
    if METHODS[method].self_calibration:
        changes.setdefault("self_calibration", 0)  # tested elsewhere; slow
    return walk.prune_blocks(model, IDS, build_settings(method, "2:4", **changes))


def layers_of(report: PruneReport) -> dict[str, LayerReport]:
    return {layer.name: layer for found in report.blocks for layer in found.layers}


def routed(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches the experts of block 0: tokens ``[T, H]`` and the experts chosen for each ``[T, k]``."""
    seen: list[tuple[torch.Tensor, ...]] = []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return seen[0][0].detach(), seen[0][1]


@pytest.mark.parametrize("arch", CONFIGS)
def test_an_expert_is_scored_by_the_tokens_routed_to_it(arch: str) -> None:
    model = moe(arch)
    report = prune(model)
    assert report.warnings == []
    reference = moe(arch)  # whose attention of block 0 is pruned: it runs before the experts
    for name, parameter in reference.model.layers[0].self_attn.named_parameters():
        parameter.data.copy_(model.model.layers[0].self_attn.get_parameter(name))
    # Statistics are taken from the whole dense block, attention included.
    hidden, chosen = routed(moe(arch))
    experts, dense = model.model.layers[0].mlp.experts, moe(arch).model.layers[0].mlp.experts
    for number in range(EXPERTS):
        mine = hidden[(chosen == number).any(-1)].double()
        assert 0 < len(mine) < len(hidden)
        up = dense.gate_up_proj[number].detach()
        gate, value = (mine @ up.double().T).chunk(2, dim=-1)
        down = dense.down_proj[number].detach()
        for stored, weight, x in (
            (experts.gate_up_proj[number], up, mine),
            (experts.down_proj[number], down, nn.functional.silu(gate) * value),
        ):
            mask = mask_from_scores(x.norm(dim=0) * weight.abs(), TWO_OF_FOUR)
            assert torch.equal(stored, weight * mask)
        name = f"model.layers.0.mlp.experts.{number}"
        assert layers_of(report)[f"{name}.gate_up_proj"].tokens == len(mine)
        assert layers_of(report)[f"{name}.down_proj"].tokens == len(mine)


@pytest.mark.parametrize(
    ("arch", "method"),
    [
        *(("mixtral", method) for method in ("wanda", "gblm", "sparsegpt", "admm", "wanda++", "best")),
        ("qwen3_moe", "wanda++rgs"),
    ],
)
def test_a_starved_expert_falls_back_to_magnitude_with_a_warning(arch: str, method: str) -> None:
    model, dense = moe(arch, starve=True), moe(arch, starve=True)
    report = prune(model, method)
    found, before = model.model.layers[0].mlp.experts, dense.model.layers[0].mlp.experts
    noted = set()
    for number in STARVED:
        for matrix in ("gate_up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{number}.{matrix}"
            noted.add(name)
            weight = getattr(before, matrix)[number].detach()
            assert torch.equal(getattr(found, matrix)[number], weight * mask_from_scores(weight.abs(), TWO_OF_FOUR))
            layer = layers_of(report)[name]
            assert (layer.tokens, layer.sparsity) == (0, 0.5)
            assert layer.note == f"saw 0 of {IDS.numel()} tokens: pruned by magnitude"
            assert f"{name}: {layer.note}" in report.warnings
    starved = {name for name, layer in layers_of(report).items() if "by magnitude" in layer.note}
    assert {name for name in starved if ".layers.0." in name} == noted
    assert torch.equal(model.model.layers[0].mlp.gate.weight, dense.model.layers[0].mlp.gate.weight)
    for layer in model.model.layers:
        for parameter in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            assert all(satisfies(matrix != 0, TWO_OF_FOUR) for matrix in parameter)


def test_magnitude_needs_no_tokens_and_warns_of_nothing() -> None:
    """Nor has it two ways to prune: an expert without tokens is compared within its matrix as the others are."""
    model, dense = moe("mixtral", starve=True), moe("mixtral", starve=True)
    report = walk.prune_blocks(model, IDS, build_settings("magnitude", "0.5"))
    assert report.warnings == []
    for number in range(EXPERTS):
        weight = dense.model.layers[0].mlp.experts.down_proj[number].detach()
        found = model.model.layers[0].mlp.experts.down_proj[number]
        assert torch.equal(found, weight * (weight.abs() > weight.abs().median()))


def test_a_starved_expert_keeps_its_mask_when_masks_are_chosen_again() -> None:
    model, dense = moe("mixtral", starve=True), moe("mixtral", starve=True)
    prune(model, "best", optimizer={"mask": "rechoose", "rounds": 4, "relative_lr": 0.1})
    for number in STARVED:
        weight = dense.model.layers[0].mlp.experts.gate_up_proj[number].detach()
        found = model.model.layers[0].mlp.experts.gate_up_proj[number]
        assert torch.equal(found, weight * mask_from_scores(weight.abs(), TWO_OF_FOUR))


def test_a_round_compares_an_experts_tokens_with_those_of_its_own_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round draws M samples of N: an expert with its share of them is not starved because M is below N."""
    calls: list[int] = []
    wanda = CRITERIA["wanda"]

    def score(weight, statistics, alpha):
        calls.append(statistics.tokens)
        return wanda.score(weight, statistics, alpha)

    monkeypatch.setitem(CRITERIA, "wanda", Criterion(score, wanda.needs))
    monkeypatch.setattr(block, "STARVED_SHARE", 0.05)
    model = moe("mixtral")
    report = prune(model, "wanda++ro", optimizer={"samples": 1, "rounds": 1, "relative_lr": 1e-6})
    assert report.warnings == []
    per_sample = IDS.shape[1]
    in_the_round = [tokens for tokens in calls if tokens <= per_sample]
    assert min(in_the_round) < 0.05 * IDS.numel()  # few of all tokens
    assert len(calls) == 2 * 2 * (4 + 2 * EXPERTS)  # and yet all were scored, in the round and at the end


def test_the_note_of_an_earlier_round_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starved in the round's one sample but not over all of them: the final prune has the last word."""
    model = moe("mixtral")
    _, chosen = routed(model)
    shares = torch.stack([(chosen == number).any(-1).float().mean() for number in range(EXPERTS)])
    by_sample = torch.stack(
        [(chosen == number).any(-1).view(len(IDS), -1).float().mean(1) for number in range(EXPERTS)]
    )
    threshold = float(shares.min()) - 1e-3
    assert float(by_sample.min()) < threshold  # some expert is below it in some sample
    monkeypatch.setattr(block, "STARVED_SHARE", threshold)
    settings = {"samples": 1, "rounds": len(IDS) * 3, "relative_lr": 1e-6}
    report = prune(model, "wanda++ro", optimizer=settings)
    assert not any(".layers.0." in warning for warning in report.warnings)


def test_an_expert_that_the_first_sample_does_not_reach_has_an_output_error_too() -> None:
    """It is measured on the first tokens that the expert sees, whichever sample they are of."""
    model = tiny_model("qwen3_moe", mlp_only_layers=[], num_experts=16)
    report = walk.prune_blocks(model, token_ids(16, 12), build_settings("wanda++rgs", "2:4"))
    seen = [layer for layer in layers_of(report).values() if layer.tokens]
    assert len(seen) > 3 * (4 + 2 * 12)
    assert all(0.01 < layer.output_error < 2 for layer in seen)


@pytest.mark.parametrize("arch", CONFIGS)
def test_experts_are_ignored_as_one_module_or_one_by_one(arch: str) -> None:
    whole, one = moe(arch), moe(arch)
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    report = prune(whole, ignore=("mlp.experts",))
    assert not any("experts" in name for name in layers_of(report))
    prune(one, ignore=("re:experts\\.3\\.",))
    for name, parameter in whole.named_parameters():
        if "experts" in name:
            assert torch.equal(parameter, before[name])
    down = one.model.layers[1].mlp.experts.down_proj
    untouched = [torch.equal(down[e], before["model.layers.1.mlp.experts.down_proj"][e]) for e in range(EXPERTS)]
    assert untouched == [e == 3 for e in range(EXPERTS)]


@pytest.mark.parametrize("arch", CONFIGS)
def test_the_optimizer_moves_experts_and_leaves_the_router(arch: str) -> None:
    plain, model, dense = moe(arch), moe(arch), moe(arch)
    prune(plain)
    prune(model, "wanda++ro", optimizer={"mask": "keep", "norms": True})
    for index in range(2):
        mine, theirs = model.model.layers[index].mlp, plain.model.layers[index].mlp
        assert torch.equal(mine.gate.weight, dense.model.layers[index].mlp.gate.weight)
        assert all(not torch.equal(a, b) for a, b in zip(mine.experts.down_proj, theirs.experts.down_proj, strict=True))


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("method", ["wanda", "gblm"])
def test_experts_in_fp64(arch: str, method: str) -> None:
    """torch's grouped product, with which transformers runs experts, takes none."""
    expected, model = moe(arch), moe(arch).double()
    prune(expected, method)
    prune(model, method)
    assert model.dtype == torch.float64 and model(IDS).logits.isfinite().all()
    pairs = [(weight == 0, wide == 0) for weight, wide in zip(expected.parameters(), model.parameters(), strict=True)]
    assert sum(int(zeros.sum()) for zeros, _ in pairs) > 10_000
    assert sum(int((zeros != wide).sum()) for zeros, wide in pairs) < 10  # scores that are close
