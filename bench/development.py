"""Choose the composition of ``best``: ``python -m bench.development``.

Every variant prunes the first ten of SmolLM2-135M's thirty blocks to 2:4, in a third of the whole model's time, and is
scored on the development split of the Wikipedia text, which is used for nothing else. Results land in
``bench/results/development.json``; a variant that is there is not measured again.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from functools import cache
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
from wandapp_kernels.pruning.self_calibration import self_calibration
from wandapp_kernels.pruning.walk import Progress, prune_blocks

RESULTS = Path(__file__).parent / "results" / "development.json"
BLOCKS, TOKENS, WINDOW = 10, 6000, 512
CPU = torch.device("cpu")

# Each row changes one thing of ``best``; "best" is as it ships.
VARIANTS: dict[str, dict[str, Any]] = {
    "sparsegpt": {"method": "sparsegpt"},
    "wanda++": {"method": "wanda++"},
    "best": {},
    "best, the first mask kept": {"optimizer": {"mask": "keep"}},
    "best, squared error summed over tokens": {"optimizer": {"loss": "sum"}},
    "best, target on the pruned stream": {"optimizer": {"target": "pruned"}},
    "best, only the given 4,096 tokens": {"self_calibration": 0},
    "best, 6 rounds and 16,384 tokens": {"self_calibration": 16384, "optimizer": {"rounds": 6}},
    "best, norm weights left alone": {"optimizer": {"norms": False}},
    "best from ADMM + PCG": {"score": "wanda", "update": "admm-pcg"},
}


class _Enough(Exception):
    """The blocks that are measured have been pruned."""


@cache
def calibration(count: int) -> torch.Tensor:
    """The given samples, and what the dense model writes until there are ``count`` tokens: once for all variants."""
    loaded = load_model(MODEL, dtype=torch.float32)
    assert loaded.tokenizer is not None
    ids = calibration_tokens(loaded.tokenizer, "wiki", samples=SAMPLES, seqlen=SEQLEN).ids
    missing = max(math.ceil((count - ids.numel()) / SEQLEN), 0)
    return torch.cat([ids, self_calibration(loaded.model, ids, missing, seed=0, device=CPU)]) if missing else ids


def measure(name: str) -> dict[str, Any]:
    """One row: what was changed, the perplexity on the development split, and the last block's loss."""
    changes = {"method": "best", **VARIANTS[name]}
    settings = build_settings(str(changes.pop("method")), "2:4", **changes)
    loaded = load_model(MODEL, dtype=torch.float32)
    assert loaded.tokenizer is not None
    losses: list[float | None] = []

    def stop_in_time(progress: Progress) -> None:
        if progress.stage == "block":
            losses.append(progress.loss)
        if len(losses) == BLOCKS:
            raise _Enough

    with suppress(_Enough):
        prune_blocks(loaded.model, calibration(settings.self_calibration), settings, device=CPU, progress=stop_in_time)
    text = evaluation_tokens(loaded.tokenizer, "wiki", "development", TOKENS)[0]
    score = perplexity(loaded.model, text, seqlen=WINDOW, bos_token_id=loaded.tokenizer.bos_token_id)
    return {"variant": name, "perplexity": score.value, "loss": losses[-1]}


def main() -> None:
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for name in VARIANTS:
        if name not in {row["variant"] for row in rows}:
            rows.append(measure(name))
            print(rows[-1])
            write_text_atomic(RESULTS, to_json(rows))


if __name__ == "__main__":
    main()
