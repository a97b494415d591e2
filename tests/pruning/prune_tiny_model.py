"""Prune a tiny model in several ways and save every weight; run with and without Triton's interpreter by a test."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from tiny_models import tiny_model, token_ids

from wandapp_kernels import api

RUNS = {
    "wanda++": ("wanda++", "2:4", {"optimizer": {"samples": 1, "rounds": 1}}),
    "rgs": ("wanda++ rgs", "60%", {}),
    "magnitude": ("magnitude", "4:8", {}),
}


def main(target: str) -> None:
    torch.set_num_threads(1)
    weights = {}
    for run, (method, sparsity, changes) in RUNS.items():
        model = tiny_model("llama", num_hidden_layers=1)
        api.prune(model, token_ids(2, 20), method, sparsity, **changes)
        weights |= {f"{run}/{name}": p.detach().clone() for name, p in model.named_parameters()}
    save_file(weights, target)


if __name__ == "__main__":
    main(sys.argv[1])
