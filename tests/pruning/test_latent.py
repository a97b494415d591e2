import torch
from torch import nn

from wandapp_kernels.pruning.latent import LatentWeights
from wandapp_kernels.sparsity import Pattern, mask_from_scores

PATTERN = Pattern.parse("2:4")


def make(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    dense = {"a": torch.randn(3, 10, generator=generator)}
    masks = {"a": mask_from_scores(dense["a"].abs(), PATTERN)}
    weights = {"a": nn.Parameter(2 * dense["a"] * masks["a"])}
    latent = LatentWeights(weights, dense, masks, lambda _, theta: mask_from_scores(theta.abs(), PATTERN))
    return dense["a"], masks, weights["a"], latent


def test_latents_start_from_repaired_kept_and_dense_pruned_weights():
    dense, masks, weight, latent = make()
    kept = masks["a"]
    assert torch.equal(latent.parameters["a"][kept], weight.detach()[kept])
    assert torch.equal(latent.parameters["a"][~kept], dense[~kept])


def test_gradients_reach_pruned_latents_and_add_up():
    _, _, weight, latent = make()
    for _ in range(2):
        weight.sum().backward()
        latent.take_gradients()
        assert weight.grad is None
    assert torch.equal(latent.parameters["a"].grad, torch.full((3, 10), 2.0))
    latent.take_gradients()  # nothing reached the weight since
    assert torch.equal(latent.parameters["a"].grad, torch.full((3, 10), 2.0))


def test_a_growing_latent_displaces_a_kept_weight():
    _, masks, weight, latent = make()
    row, column = (~masks["a"]).nonzero()[0].tolist()
    with torch.no_grad():
        latent.parameters["a"][row, column] = 100.0
    latent.project()
    assert weight[row, column] == 0, "projecting alone keeps the mask"
    latent.rechoose()
    assert masks["a"][row, column]
    assert weight[row, column] == 100.0
    assert torch.equal(weight != 0, masks["a"] & (latent.parameters["a"] != 0))
    assert (masks["a"][:, :8].reshape(3, 2, 4).sum(-1) == 2).all()
