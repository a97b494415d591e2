"""The committed figures of linears: ``python -m bench.bench_linear [M,…]`` writes bench/results/linear/DEVICE.json."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from wandapp_kernels.cli.main import main
from wandapp_kernels.tuning.device import fingerprint

RESULTS = Path(__file__).parent / "results" / "linear"


def measure(tokens: str = "1") -> int:
    """Measure with all threads torch uses; the exit code of ``wandapp bench linear``."""
    name = re.sub(r"[^a-z0-9]+", "_", fingerprint("cpu")["device"].lower()).strip("_")
    RESULTS.mkdir(parents=True, exist_ok=True)
    return main(["bench", "linear", "--m", tokens, "--seconds", "3", "--json", str(RESULTS / f"{name}.json")])


if __name__ == "__main__":
    sys.exit(measure(*sys.argv[1:]))
