"""Measure what pruning costs in perplexity: ``python -m bench.quality``.

Every cell is one pruning run of a bundled model, evaluated on text that no setting was chosen on: held-out Wikipedia
articles and State of the Union speeches since 2010. One JSON file per pattern and seed lands in
``bench/results/quality``; a method that is in its file already is not measured again, so the plan can be interrupted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.data.calibration import calibration_tokens, evaluation_tokens
from wandapp_kernels.evaluation.compare import EvaluationText, compare
from wandapp_kernels.models.load import load_model

RESULTS = Path(__file__).parent / "results" / "quality"
MODEL = "smollm2-135m"
SEEDS = (0, 1, 2)
CALIBRATION = {"source": "wiki", "samples": 32, "seqlen": 128}
EVALUATION = {"texts": ("wiki", "sotu"), "tokens": 4096, "seqlen": 512}
METHODS = {
    "2:4": (
        "magnitude",
        "wanda",
        "ria",
        "gblm",
        "pruner-zero",
        "sparsegpt",
        "admm",
        "wanda++rgs",
        "wanda++ro",
        "wanda++",
        "best",
    ),
    "4:8": ("wanda", "sparsegpt", "wanda++", "best"),
    "50%": ("wanda", "sparsegpt", "wanda++", "best"),
}


def measure(pattern: str, seed: int, methods: tuple[str, ...]) -> Path:
    """Run one comparison and write it; returns the file."""
    target = RESULTS / f"{MODEL}-{pattern.replace(':', 'of').replace('%', 'pct')}-seed{seed}.json"
    known = json.loads(target.read_text()) if target.exists() else None
    RESULTS.mkdir(parents=True, exist_ok=True)
    tokenizer = load_model(MODEL, dtype=torch.float32).tokenizer
    assert tokenizer is not None
    compare(
        lambda: load_model(MODEL, dtype=torch.float32),
        methods,
        pattern,
        calibration_tokens(tokenizer, seed=seed, **CALIBRATION),
        [
            EvaluationText(
                text, "evaluation", evaluation_tokens(tokenizer, text, "evaluation", EVALUATION["tokens"])[0]
            )
            for text in EVALUATION["texts"]
        ],
        eval_seqlen=EVALUATION["seqlen"],
        seed=seed,
        device=torch.device("cpu"),
        known=known,
        keep=lambda result: write_text_atomic(target, to_json(result)),
    )
    return target


def main() -> None:
    """Measure what is missing; ``--pattern``, ``--seed`` and ``--method`` narrow the plan, so that it can be split."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", choices=tuple(METHODS), action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seed or SEEDS:
        for pattern in arguments.pattern or METHODS:
            wanted = tuple(m for m in METHODS[pattern] if m in (arguments.method or METHODS[pattern]))
            print(measure(pattern, seed, wanted))


if __name__ == "__main__":
    main()
