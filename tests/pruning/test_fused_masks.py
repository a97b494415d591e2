"""The pruner with fused kernels (under Triton's interpreter, on a CPU) against the pruner without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wandapp_kernels.ops.score import scores
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.masking import choose_mask
from wandapp_kernels.pruning.statistics import MODEL_GRADIENT_L1, MODEL_GRADIENT_L2, LayerStatistics
from wandapp_kernels.sparsity import Pattern, mask_from_scores

HERE = Path(__file__).parent


def test_the_kernels_prune_to_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found = {}
    for interpret in ("0", "1"):
        target = tmp_path / f"{interpret}.safetensors"
        environment = {
            **os.environ,
            "TRITON_INTERPRET": interpret,
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(HERE.parent), str(HERE.parents[1]))),
        }
        command = [sys.executable, str(HERE / "prune_tiny_model.py"), str(target)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[interpret] = load_file(target)
    assert len(found["0"]) == len(found["1"]) > 20
    for name, expected in found["0"].items():
        assert torch.equal(found["1"][name], expected), name


def statistics() -> tuple[torch.Tensor, LayerStatistics]:
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = torch.randn(4, 9, 21, generator=generator)
    found = LayerStatistics(
        torch.rand(21, generator=generator),
        regional_gradient=gradients[0].abs(),
        model_gradient={MODEL_GRADIENT_L1: gradients[1].abs(), MODEL_GRADIENT_L2: gradients[2].abs()},
        sequences=3,
    )
    return weight, found


@pytest.mark.parametrize("name", [name for name, criterion in CRITERIA.items() if criterion.factors is not None])
def test_factors_give_the_criterions_own_scores(name: str) -> None:
    weight, found = statistics()
    criterion = CRITERIA[name]
    assert criterion.factors is not None
    norm, gradient = criterion.factors(found)
    expected = criterion.score(weight, found, 100.0)
    assert torch.equal(scores(weight, norm, gradient, alpha=100.0), expected)
    for pattern in map(Pattern.parse, ("2:4", "50%")):
        chosen = choose_mask(criterion, weight, found, pattern, alpha=100.0)
        assert torch.equal(chosen, mask_from_scores(expected, pattern))


def test_a_whole_layer_is_compared_by_the_reference() -> None:
    weight, found = statistics()
    pattern = Pattern.parse("50%")
    chosen = choose_mask(CRITERIA["wanda"], weight, found, pattern, group="layer")
    assert torch.equal(chosen, mask_from_scores(found.norm() * weight.abs(), pattern, "layer"))
