"""The regional optimiser on toy problems, against its update rules written out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from wandapp_kernels.errors import NonFiniteError
from wandapp_kernels.pruning.regional_optimizer import RegionalOptimizer
from wandapp_kernels.pruning.settings import OptimizerSettings
from wandapp_kernels.sparsity import Pattern, mask_from_scores

COUNT, TOKENS, WIDTH = 6, 5, 8
Masks = dict[str, torch.Tensor]


class Toy:
    """``f(X) = X Wᵀ`` whose dense W is pruned by magnitude to 2:4; remembers which samples each step was given."""

    def __init__(self, scale: float = 1.0, **settings: Any):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(COUNT, TOKENS, WIDTH, generator=generator)
        self.dense = scale * torch.randn(4, WIDTH, generator=generator)
        self.mask = mask_from_scores(self.dense.abs(), Pattern.parse("2:4"))
        self.start = self.dense * self.mask
        self.weight = nn.Parameter(self.start.clone(), requires_grad=False)
        self.extra: list[nn.Parameter] = []
        self.settings = OptimizerSettings(**{"mask": "keep", "samples": 0, **settings})
        self.steps: list[list[int]] = []
        self.seen: list[torch.Tensor] = []

    def target(self, chosen: Sequence[int]) -> torch.Tensor:
        return self.inputs[list(chosen)] @ self.dense.T

    def forward(self, chosen: Sequence[int]) -> torch.Tensor:
        self.steps.append(list(chosen))
        self.seen.append(self.weight.detach().clone())
        return self.inputs[list(chosen)] @ self.weight.T

    def run(self, seed: int = 0, reprune: Any = None) -> float:
        optimizer = RegionalOptimizer(
            self.settings,
            "model.layers.7",
            forward=self.forward,
            target=self.target,
            weights={"w": self.weight},
            extra=self.extra,
            count=COUNT,
            generator=torch.Generator().manual_seed(seed),
        )
        self.optimizer = optimizer
        return optimizer.run({"w": self.mask}, reprune or self.same_mask)

    def same_mask(self, drawn: list[int]) -> Masks:
        return {"w": self.mask}

    def rate(self) -> float:
        return self.settings.relative_lr * float(self.start[self.mask].square().mean().sqrt())

    def gradient(self, weight: torch.Tensor, chosen: Sequence[int], token: bool = False) -> torch.Tensor:
        """``2 Σ_t s_t (x_t Wᵀ - y_t)ᵀ x_t`` with s_t = 1, or one over the mean square of y_t."""
        x, y = self.inputs[list(chosen)].flatten(0, 1), self.target(chosen).flatten(0, 1)
        scale = 1 / y.square().mean(-1, keepdim=True) if token else torch.ones(len(y), 1)
        return 2 * (scale * (x @ weight.T - y)).T @ x


def rmsprop(toy: Toy, rates: list[float], *, token: bool = False, by_round: int = 0) -> torch.Tensor:
    """``v = 0.99 v + 0.01 g²; W -= lr · g / (√v + 1e-8); W *= mask``; gradients are summed over a round on demand."""
    weight, average, summed = toy.start.clone(), torch.zeros_like(toy.start), torch.zeros_like(toy.start)
    for step, (chosen, rate) in enumerate(zip(toy.steps, rates, strict=True)):
        if not by_round or step % by_round == 0:
            summed = torch.zeros_like(summed)
        summed = summed + toy.gradient(weight, chosen, token)
        average = 0.99 * average + 0.01 * summed.square()
        weight = (weight - rate * summed / (average.sqrt() + 1e-8)) * toy.mask
    return weight


def adam(toy: Toy, rates: list[float]) -> torch.Tensor:
    weight, mean, average = toy.start.clone(), torch.zeros_like(toy.start), torch.zeros_like(toy.start)
    for step, (chosen, rate) in enumerate(zip(toy.steps, rates, strict=True), 1):
        gradient = toy.gradient(weight, chosen)
        mean, average = 0.9 * mean + 0.1 * gradient, 0.99 * average + 0.01 * gradient.square()
        unbiased = (average / (1 - 0.99**step)).sqrt() + 1e-8
        weight = (weight - rate * mean / (1 - 0.9**step) / unbiased) * toy.mask
    return weight


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-6)


def test_rmsprop_by_hand_and_by_torch() -> None:
    toy = Toy(rounds=3)
    toy.run()
    assert len(toy.steps) == 3 * COUNT
    close(toy.weight, rmsprop(toy, [toy.rate()] * 18))

    weight = nn.Parameter(toy.start.clone())
    reference = torch.optim.RMSprop([weight], lr=toy.rate())
    for chosen in toy.steps:
        reference.zero_grad()
        (toy.inputs[chosen] @ weight.T - toy.target(chosen)).square().sum().backward()
        reference.step()
        weight.data *= toy.mask
    close(toy.weight, weight.detach())


def test_adam_by_hand() -> None:
    toy = Toy(rounds=3, algorithm="adam", batch=2)
    toy.run()
    close(toy.weight, adam(toy, [toy.rate()] * 9))


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda p: 1.0),
        ("linear", lambda p: 1.0 - p),
        ("cosine", lambda p: 0.5 * (1.0 + math.cos(math.pi * p))),
    ],
)
def test_schedules_decay_over_all_steps(schedule: str, factor) -> None:
    toy = Toy(rounds=2, batch=4, schedule=schedule)  # two steps a round: four samples, then two
    toy.run()
    rates = [toy.rate() * factor(step / 4) for step in range(4)]
    assert [len(chosen) for chosen in toy.steps] == [4, 2, 4, 2]
    close(toy.weight, rmsprop(toy, rates))
    assert toy.optimizer._optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])


def test_gradients_accumulate_over_a_round_when_asked() -> None:
    toy = Toy(rounds=2, zero_grad="round")
    toy.run()
    close(toy.weight, rmsprop(toy, [toy.rate()] * 12, by_round=COUNT))


def test_token_loss_divides_each_token_by_its_targets_energy() -> None:
    toy = Toy(rounds=2, loss="token")
    toy.inputs[2, 3] *= 1000.0  # a massive activation
    loss = toy.run()
    close(toy.weight, rmsprop(toy, [toy.rate()] * 12, token=True))
    errors = []
    for chosen, weight in zip(toy.steps[COUNT:], toy.seen[COUNT:], strict=True):
        target = toy.target(chosen)
        difference = (toy.inputs[chosen] @ weight.T - target).square()
        errors.append(float((difference / target.square().mean(-1, keepdim=True)).sum()))
    assert loss == pytest.approx(sum(errors) / (COUNT * TOKENS * 4), rel=1e-4)


def test_the_loss_returned_is_the_last_rounds_over_the_targets_energy() -> None:
    toy = Toy(rounds=3)
    loss = toy.run()
    difference = energy = 0.0
    for chosen, weight in zip(toy.steps[-COUNT:], toy.seen[-COUNT:], strict=True):
        difference += float((toy.inputs[chosen] @ weight.T - toy.target(chosen)).square().sum())
        energy += float(toy.target(chosen).square().sum())
    assert loss == pytest.approx(difference / energy, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["rmsprop", "adam"])
def test_the_loss_falls(algorithm: str) -> None:
    def error(toy: Toy) -> float:
        everything = range(COUNT)
        return float((toy.inputs @ toy.weight.detach().T - toy.target(everything)).square().sum())

    toy = Toy(rounds=150, batch=3, algorithm=algorithm, relative_lr=1e-2, schedule="linear")
    before = error(toy)
    toy.run()
    x, y = toy.inputs.flatten(0, 1), toy.target(range(COUNT)).flatten(0, 1)
    least = 0.0  # the least squares that this mask allows
    for row in range(4):
        kept = toy.mask[row]
        solution = torch.linalg.lstsq(x[:, kept], y[:, row : row + 1]).solution
        least += float((x[:, kept] @ solution - y[:, row : row + 1]).square().sum())
    assert least < 0.9 * before
    assert error(toy) < least + 0.02 * (before - least)


@pytest.mark.parametrize("algorithm", ["rmsprop", "adam"])
def test_a_relative_rate_moves_all_scales_by_the_same_fraction(algorithm: str) -> None:
    small, large = Toy(1.0, rounds=2, algorithm=algorithm), Toy(8.0, rounds=2, algorithm=algorithm)
    small.run()
    large.run()
    close(large.weight / 8, small.weight.detach())
    assert (small.weight - small.start).abs().max() > 5 * small.rate()


def test_an_absolute_rate_is_in_weight_units() -> None:
    moves = []
    for scale in (1.0, 8.0):
        toy = Toy(scale, rounds=1, samples=1, absolute_lr=1e-3, relative_lr=5.0)
        toy.run()
        moves.append((toy.weight - toy.start)[toy.mask].abs())
    # One step of RMSprop: lr · g / √(0.01 g²) = 10 lr, whatever the scale
    close(moves[0], torch.full_like(moves[0], 1e-2))
    close(moves[1], moves[0])


def test_the_rate_is_relative_to_the_kept_weights() -> None:
    toy = Toy(rounds=1, samples=1, mask="regrow")
    half = toy.start[toy.mask].square().mean().sqrt()
    toy.run()
    assert toy.optimizer._optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * float(half))


def test_samples_are_drawn_without_repeats_and_by_the_generator() -> None:
    def drawn(seed: int, **settings: Any) -> list[list[int]]:
        toy = Toy(**settings)
        toy.run(seed)
        return toy.steps

    steps = drawn(0, rounds=3, samples=4, batch=3)
    assert [len(step) for step in steps] == [3, 1] * 3
    rounds = [steps[2 * i] + steps[2 * i + 1] for i in range(3)]
    assert all(len(set(chosen)) == 4 and set(chosen) <= set(range(COUNT)) for chosen in rounds)
    assert rounds[0] != rounds[1]
    assert drawn(0, rounds=3, samples=4, batch=3) == steps
    assert drawn(1, rounds=3, samples=4, batch=3) != steps
    for samples in (0, COUNT, 100):
        assert sorted(i for step in drawn(2, rounds=1, samples=samples) for i in step) == list(range(COUNT))


@pytest.mark.parametrize("algorithm", ["rmsprop", "adam"])
def test_kept_masks_hold_at_every_step(algorithm: str) -> None:
    toy = Toy(rounds=4, algorithm=algorithm, relative_lr=0.1)
    toy.run()
    for weight in [*toy.seen, toy.weight.detach()]:
        assert (weight[~toy.mask] == 0).all()
    assert (toy.weight[toy.mask] != toy.start[toy.mask]).all()


def test_regrow_prunes_before_each_round_and_frees_the_weights_in_between() -> None:
    toy, rounds = Toy(rounds=3, samples=2, mask="regrow", relative_lr=0.05), []

    def reprune(drawn: list[int]) -> Masks:
        rounds.append(drawn)
        mask = mask_from_scores(toy.weight.detach().abs(), Pattern.parse("2:4"))
        toy.weight.data = toy.weight.data * mask
        return {"w": mask}

    toy.run(reprune=reprune)
    assert rounds == [toy.steps[i] + toy.steps[i + 1] for i in (0, 2, 4)]
    assert [bool((weight == 0).sum() == 16) for weight in toy.seen] == [True, False] * 3
    assert (toy.weight != 0).all()


def test_a_diverging_rate_is_an_error_that_names_the_block() -> None:
    toy = Toy(rounds=3, relative_lr=1e25)
    with pytest.raises(NonFiniteError, match=r"loss in model\.layers\.7 became NaN or infinite; lower the learning"):
        toy.run()
    assert toy.weight.grad is None and not toy.weight.requires_grad


def test_extra_parameters_are_trained_at_their_own_rate() -> None:
    toy = Toy(rounds=1, samples=1)
    gain, zero = nn.Parameter(torch.full((4,), 2.0)), nn.Parameter(torch.zeros(4))
    toy.extra = [gain, zero]
    inner = toy.forward
    toy.forward = lambda chosen: inner(chosen) * gain + zero
    toy.run()
    close((gain - 2.0).abs(), torch.full((4,), 10 * 1e-3 * 2.0))
    assert torch.equal(zero, torch.zeros(4))  # a fraction of nothing
    assert not gain.requires_grad and gain.grad is None


@pytest.mark.parametrize("algorithm", ["rmsprop", "adam"])
def test_a_weight_without_gradient_stays(algorithm: str) -> None:
    """An expert that no token of a round reached."""
    toy = Toy(rounds=2, algorithm=algorithm)
    idle = nn.Parameter(torch.randn(2, 4), requires_grad=False)
    before = idle.detach().clone()
    optimizer = RegionalOptimizer(
        toy.settings,
        "x",
        forward=toy.forward,
        target=toy.target,
        weights={"w": toy.weight, "idle": idle},
        extra=[],
        count=COUNT,
        generator=torch.Generator(),
    )
    masks = {"w": toy.mask, "idle": torch.ones(2, 4, dtype=torch.bool)}
    optimizer.run(masks, lambda drawn: masks)
    assert torch.equal(idle, before)


def test_a_fully_pruned_weight_has_no_rate() -> None:
    toy = Toy(rounds=1)
    toy.mask = torch.zeros_like(toy.mask)
    toy.weight.data.zero_()
    assert math.isfinite(toy.run())
    assert torch.equal(toy.weight, torch.zeros(4, WIDTH))
