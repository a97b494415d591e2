"""Choose the composition of ``best``: ``python -m bench.development``.

Every variant prunes the first ten of SmolLM2-135M's thirty blocks to 2:4, in a third of the whole model's time, and is
scored on the development split of the Wikipedia text, which is used for nothing else. Results land in
``bench/results/development.json``; a variant that is there is not measured again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bench.quality import MODEL, SAMPLES, SEQLEN
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.data.calibration import calibration_tokens, evaluation_tokens
from wandapp_kernels.evaluation.perplexity import perplexity
from wandapp_kernels.models.load import load_model
from wandapp_kernels.pruning.methods import build_settings
from wandapp_kernels.pruning.walk import prune_blocks

RESULTS = Path(__file__).parent / "results" / "development.json"
BLOCKS, TOKENS, WINDOW = 10, 6000, 512

_START: dict[str, Any] = {
    "rounds": 8,
    "samples": 0,
    "mask": "keep",
    "loss": "sum",
    "norms": False,
}


def _variant(self_calibration: int = 0, **optimizer: Any) -> dict[str, Any]:
    return {"method": "best", "self_calibration": self_calibration, "optimizer": {**_START, **optimizer}}


VARIANTS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "wanda++, 16 samples a round": {"method": "wanda++", "optimizer": {"samples": 16}},
    "SparseGPT, then Adam at 1e-2 with linear decay, dense target, mask kept": _variant(),
    "the same with the token loss": _variant(loss="token"),
    "the same with norms trained": _variant(norms=True),
    "the same with masks re-chosen": _variant(mask="rechoose"),
    "token loss, masks re-chosen": _variant(loss="token", mask="rechoose"),
    "token loss, 2 samples a step (twice the steps)": _variant(loss="token", batch=2),
    "ADMM + PCG start, token loss, norms trained": {
        **_variant(loss="token", norms=True),
        "score": "wanda",
        "update": "admm-pcg",
    },
    "best, but 6 rounds and 16,384 tokens": {
        "method": "best",
        "self_calibration": 16384,
        "optimizer": {"rounds": 6},
    },
}


def measure(name: str) -> dict[str, Any]:
    """One row: what was changed, the perplexity on the development split, and the pruning seconds."""
    loaded = load_model(MODEL, dtype=torch.float32)
    assert loaded.tokenizer is not None
    changes = dict(VARIANTS[name])
    left_dense = tuple(f"re:^model\\.layers\\.{block}\\." for block in range(BLOCKS, 30))
    settings = build_settings(changes.pop("method"), "2:4", ignore=left_dense, **changes)
    tokens = calibration_tokens(loaded.tokenizer, "wiki", samples=SAMPLES, seqlen=SEQLEN)
    report = prune_blocks(loaded.model, tokens.ids, settings, device=torch.device("cpu"))
    text = evaluation_tokens(loaded.tokenizer, "wiki", "development", TOKENS)[0]
    score = perplexity(loaded.model, text, seqlen=WINDOW, bos_token_id=loaded.tokenizer.bos_token_id)
    return {"variant": name, "perplexity": score.value, "seconds": report.seconds}


def main() -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for name in VARIANTS:
        if name not in {row["variant"] for row in rows}:
            rows.append(measure(name))
            print(rows[-1])
            write_text_atomic(RESULTS, to_json(rows))


if __name__ == "__main__":
    main()
