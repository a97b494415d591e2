import pytest
import torch

from wandapp_kernels.pruning.regional_loss import regional_loss


def sample(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(2, 5, 7, generator=generator)
    target[:, 0] *= 1000  # a massive first token
    return target + 0.1 * torch.randn(2, 5, 7, generator=generator), target


def test_sum_is_the_squared_distance():
    output, target = sample()
    loss, of_zero = regional_loss("sum", output, target)
    assert loss.item() == pytest.approx(float((output.double() - target.double()).square().sum()), rel=1e-4)
    assert of_zero == pytest.approx(float(target.double().square().sum()), rel=1e-6)


def test_token_weighs_every_token_by_its_own_energy():
    output, target = sample()
    loss, of_zero = regional_loss("token", output, target)
    o, t = output.double(), target.double()
    expected = sum(((o[b, i] - t[b, i]).square().sum() / t[b, i].square().mean()) for b in range(2) for i in range(5))
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)
    assert of_zero == pytest.approx(2 * 5 * 7, rel=1e-6)


def test_token_ignores_the_size_of_a_token():
    output, target = sample()
    scale = torch.tensor([1.0, 3.0, 0.01, 50.0, 7.0]).view(1, 5, 1)
    plain, scaled = regional_loss("token", output, target)[0], regional_loss("token", output * scale, target * scale)[0]
    assert scaled.item() == pytest.approx(plain.item(), rel=1e-4)


def test_a_zero_token_gives_a_finite_loss():
    output, target = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    target[0, 1] = 1.0
    loss, _ = regional_loss("token", output, target)
    assert torch.isfinite(loss)
