"""The loop: accumulation, the learning rate, what stops it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pruned_models import pruned_model
from tiny_models import token_ids

from wandapp_kernels.errors import NonFiniteError, UsageError
from wandapp_kernels.finetuning.masked_lora import masked_lora
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.finetuning.training import checkpointing, train

LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
SETTINGS = FinetuneSettings(rank=2, dropout=0, lr=1e-2, warmup=1, batch=5, epochs=2)


def trained(settings: FinetuneSettings, samples: int = 8) -> tuple[list[float], list[torch.Tensor], list[float]]:
    """Losses, A and B of every layer, and the losses that were shown."""
    model = pruned_model("llama")
    model.requires_grad_(False)
    shown: list[float] = []
    torch.manual_seed(0)
    with masked_lora(model, LAYERS, settings) as adapters, checkpointing(model, settings.gradient_checkpointing):
        model.train()
        losses = train(model, adapters, token_ids(samples, 7), settings, lambda at: shown.append(at.loss))
        assert all(parameter.grad is None for parameter in model.parameters())
        return losses, [adapter.detach().clone() for adapter in adapters], shown


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_accumulated_gradients_are_those_of_one_batch(micro_batch: int) -> None:
    losses, adapters, shown = trained(replace(SETTINGS, micro_batch=5))  # steps of 5 and 3 sequences
    split_losses, split_adapters, _ = trained(replace(SETTINGS, micro_batch=micro_batch))
    assert losses == shown and len(losses) == 4
    torch.testing.assert_close(split_losses, losses, rtol=1e-6, atol=1e-6)
    for one, other in zip(split_adapters, adapters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_mean_over_all_sequences() -> None:
    losses, _, _ = trained(replace(SETTINGS, batch=8, micro_batch=3))
    model, ids = pruned_model("llama"), token_ids(8, 7)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert losses[0] == pytest.approx(expected.item(), rel=1e-6)


def test_recomputed_activations_change_nothing() -> None:
    model = pruned_model("llama")
    kept, recomputed = trained(SETTINGS), trained(replace(SETTINGS, gradient_checkpointing=True))
    assert kept[0] == recomputed[0]
    assert all(torch.equal(one, other) for one, other in zip(kept[1], recomputed[1], strict=True))
    inner = model.model.layers[0]
    with checkpointing(model, True):
        assert inner.gradient_checkpointing
    assert not inner.gradient_checkpointing
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(UsageError, match="does not support gradient checkpointing"), checkpointing(model, True):
            pass
    finally:
        type(model).supports_gradient_checkpointing = before


def test_the_rate_rises_and_falls() -> None:
    settings = FinetuneSettings(warmup=4)
    assert [settings.rate(step, 8) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert [FinetuneSettings(warmup=0).rate(step, 2) for step in range(2)] == [1, 0.5]
    assert replace(settings, batch=3, epochs=2).steps(7) == 6
    with pytest.raises(UsageError, match="4 steps, no more than the 4 of the warm-up"):
        replace(settings, batch=2, epochs=1).steps(7)


def test_every_step_has_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    step, rates = torch.optim.AdamW.step, []

    def recorded(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    settings = replace(SETTINGS, batch=8, epochs=4, warmup=2, lr=1e-3)
    model = pruned_model("llama")
    with masked_lora(model, LAYERS, settings) as adapters:
        seen: list[torch.Tensor] = []
        train(model.train(), adapters, token_ids(8, 7), settings, lambda _: seen.append(adapters[1].detach().clone()))
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])
    # Adam's first step is the rate itself wherever there is a gradient; B starts from zero.
    moved = seen[0].abs()
    torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 0.5e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("what", ["the loss", "a gradient"])
def test_what_is_not_finite_stops(what: str) -> None:
    model = pruned_model("llama")
    if what == "the loss":
        model.model.norm.weight.data.fill_(torch.nan)
    with (
        pytest.raises(NonFiniteError, match=rf"^{what} of step 1 of 4"),
        masked_lora(model, LAYERS, SETTINGS) as adapters,
    ):
        if what == "a gradient":
            adapters[1].register_hook(lambda gradient: gradient / 0)
        train(model, adapters, token_ids(8, 7), SETTINGS, lambda _: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"micro_batch": 0}, "micro batch is 0"),
        ({"micro_batch": 6, "batch": 5}, "micro batch of 6 sequences is larger"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"warmup": -1}, "warmup is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
    ids=str,
)
def test_impossible_settings(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneSettings(**change)
