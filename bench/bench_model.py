"""Measure whole models, dense and sparse: ``python -m bench.bench_model [NAME …]``.

One JSON file for each plan lands in ``bench/results/model`` (what ``wandapp bench model --json`` writes). The small
real model is pruned with Wanda on little text, which costs quality but no speed; the large one is random and does not
fit the last-level cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from wandapp_kernels.cli import main as wandapp

RESULTS = Path(__file__).parent / "results" / "model"

_PRUNE = ["prune", "smollm2-135m", "--method", "wanda", "--samples", "8", "--seqlen", "64", "--quiet"]
_SMALL = ["--dtype", "float32,bfloat16", "--prompts", "16,64", "--new-tokens", "12"]
PLANS: dict[str, tuple[str | None, list[str]]] = {
    "smollm2-135m-2of4": ("2:4", ["--compile", *_SMALL]),
    "smollm2-135m-60pct": ("0.6", ["--compile", *_SMALL]),
    "llama-1b-2of4": (
        None,
        ["--compile", "--random", "llama-1b", "--dtype", "bfloat16", "--prompts", "16", "--new-tokens", "8"],
    ),
    "llama-1b-2of4-float32": (
        None,
        ["--random", "llama-1b", "--dtype", "float32,bfloat16", "--prompts", "16", "--new-tokens", "8"],
    ),
}


def measure(name: str) -> None:
    """Run one plan and write its file. Stops with the exit code of a command that fails."""
    sparsity, options = PLANS[name]
    RESULTS.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="wandapp-bench-") as work:
        os.chdir(work)  # so that the result names no path of this machine
        try:
            folder = f"./{name}"
            if sparsity is not None and (code := wandapp([*_PRUNE, "--sparsity", sparsity, "--out", folder])):
                sys.exit(code)
            model = [] if sparsity is None else [folder]
            if code := wandapp(["bench", "model", *model, *options, "--json", "result.json"]):
                sys.exit(code)
            shutil.copyfile("result.json", RESULTS / f"{name}.json")
        finally:
            os.chdir(before)


def main() -> None:
    """Every plan, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PLANS))
    names = parser.parse_args().names or list(PLANS)
    if unknown := [name for name in names if name not in PLANS]:
        parser.error(f"{unknown[0]} is no plan; choose from {', '.join(PLANS)}")
    for name in names:
        measure(name)


if __name__ == "__main__":
    main()
