"""``python -m bench.h100.whole``: a whole model of LLaMA-7B's shapes pruned on one GPU, at the paper's calibration.

About four minutes on an H100; apart from ``bench.h100``, which prunes two blocks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench.h100 import make_importable

METHOD, PATTERN, SHAPE = "wanda++", "2:4", "LLaMA-7B"


def prune(device: str = "cuda", calibration: tuple[int, int] | None = None, **changes: Any) -> dict[str, Any]:
    """Prune a model with random weights on random tokens (what it takes does not depend on them)."""
    from bench.h100.models import SAMPLES, SEQLEN, SHAPES, random_model
    from wandapp_kernels.pruning.methods import build_settings
    from wandapp_kernels.pruning.walk import Progress, prune_blocks

    model = random_model(SHAPES[SHAPE], device, **changes)
    samples = calibration or (SAMPLES, SEQLEN)
    tokens = torch.randint(model.config.vocab_size, samples, generator=torch.Generator().manual_seed(0))

    def progress(at: Progress) -> None:
        print(f"block {at.done} of {at.total}", flush=True)

    report = prune_blocks(
        model, tokens, build_settings(METHOD, PATTERN), device=torch.device(device), progress=progress
    )
    return {
        "model": SHAPE,
        "method": METHOD,
        "pattern": PATTERN,
        "samples": list(samples),
        "blocks": len(report.blocks),
        "seconds": report.seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "block_seconds": [block.seconds for block in report.blocks],
        "block_peak_memory_bytes": [block.peak_memory_bytes for block in report.blocks],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.h100.whole", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/h100/whole.json"))
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.h100.whole needs a GPU, and this torch sees none.")
        return 2
    make_importable()
    from wandapp_kernels.checkpoint.atomic import write_text_atomic
    from wandapp_kernels.checkpoint.save import to_json

    result = {"gpu": torch.cuda.get_device_name(0), **prune()}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(chosen.out, to_json(result))
    print(f"{result['blocks']} blocks in {result['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
