"""Measure what pruning costs in perplexity: ``python -m bench.quality``.

Every cell is one pruning run of a bundled model, evaluated on text that no setting was chosen on: held-out Wikipedia
articles and State of the Union speeches since 2010. One JSON file per pattern and seed lands in
``bench/results/quality``; a method that is in its file already is not measured again, so the plan can be interrupted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.data.calibration import calibration_tokens, evaluation_tokens
from wandapp_kernels.evaluation.compare import EvaluationText, compare
from wandapp_kernels.models.load import load_model

RESULTS = Path(__file__).parent / "results" / "quality"
MODEL = "smollm2-135m"
TEXTS = ("wiki", "sotu")
SAMPLES, SEQLEN = 32, 128
EVAL_TOKENS, EVAL_SEQLEN = 4096, 512
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Plan:
    """What is measured at one pattern: ``methods`` with every seed, ``once`` with the first seed only."""

    methods: tuple[str, ...] = ("wanda", "sparsegpt", "wanda++", "best")
    once: tuple[str, ...] = ()

    def of_seed(self, seed: int) -> tuple[str, ...]:
        return (*self.once, *self.methods) if seed == SEEDS[0] else self.methods


PLANS = {
    "2:4": Plan(
        once=("magnitude", "ria", "gblm", "pruner-zero", "admm", "wanda++rgs", "wanda++ro"),
    ),
    "4:8": Plan(),
    "50%": Plan(),
}


def measure(pattern: str, seed: int, methods: tuple[str, ...]) -> Path:
    """Run one comparison and write it; returns the file."""
    target = RESULTS / f"{MODEL}-{pattern.replace(':', 'of').replace('%', 'pct')}-seed{seed}.json"
    known = json.loads(target.read_text()) if target.exists() else None
    RESULTS.mkdir(parents=True, exist_ok=True)
    tokenizer = load_model(MODEL, dtype=torch.float32).tokenizer
    assert tokenizer is not None
    corpus = calibration_tokens(tokenizer, "wiki", samples=SAMPLES, seqlen=SEQLEN, seed=seed)
    texts = [
        EvaluationText(text, "evaluation", evaluation_tokens(tokenizer, text, "evaluation", EVAL_TOKENS)[0])
        for text in TEXTS
    ]
    for method in methods:
        known = compare(
            lambda: load_model(MODEL, dtype=torch.float32),
            [method],
            pattern,
            corpus,
            texts,
            eval_seqlen=EVAL_SEQLEN,
            seed=seed,
            device=torch.device("cpu"),
            known=known,
        )
        write_text_atomic(target, to_json(known))
    return target


def main() -> None:
    """Measure what is missing; the options narrow the plan, so that it can be split over processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", choices=tuple(PLANS), action="append")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append")
    parser.add_argument("--method", action="append")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seed or SEEDS:
        for pattern in arguments.pattern or PLANS:
            planned = PLANS[pattern].of_seed(seed)
            print(measure(pattern, seed, tuple(m for m in planned if m in (arguments.method or planned))))


if __name__ == "__main__":
    main()
