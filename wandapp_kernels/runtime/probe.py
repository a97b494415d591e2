"""Memory of one model in a process of its own: ``python -m wandapp_kernels.runtime.probe``, JSON in and out.

Memory of a process cannot be told apart once two models have been in it, so every form of a model gets a new one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from wandapp_kernels import dispatch
from wandapp_kernels.errors import ModelError
from wandapp_kernels.models.load import load_model
from wandapp_kernels.runtime.generation import generate_timed
from wandapp_kernels.runtime.memory import CPU, peak_bytes, release_free_memory, reset_peak, resident_bytes
from wandapp_kernels.runtime.prepare import prepare, weight_bytes


@dataclass(frozen=True)
class MemoryUse:
    """Bytes, as the operating system counts them, or what torch allocated on a GPU.

    Attributes:
        before: resident with the libraries loaded and no model.
        load_peak: the most while loading and swapping, minus ``before``.
        resident: after loading and generating, minus ``before``.
        generate_peak: the most while generating, minus ``before``.
        weights: of all parameters and buffers.
    """

    before: int
    load_peak: int
    resident: int
    generate_peak: int
    weights: int


def measure_memory(
    folder: str | Path,
    backend: str,
    dtype: str,
    ids: list[int],
    new_tokens: int,
    device: torch.device = CPU,
    *,
    tune: bool = False,
) -> MemoryUse:
    """Load ``folder`` in a new process, generate on ``device``, and say what that took there.

    Args:
        folder, dtype: see `models.load.load_model`.
        backend: see `prepare`.
        ids: the prompt.
        tune: choose as ``prepare(tune=True)`` does from what was measured before; nothing is measured there, since
            that takes memory too.

    Raises:
        ModelError: the process failed; its last line says why.
    """
    request = json.dumps([str(folder), backend, dtype, ids, new_tokens, torch.get_num_threads(), str(device), tune])
    done = subprocess.run([sys.executable, "-m", __name__], input=request, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"the memory of {folder} could not be measured: {last}")
    return MemoryUse(**json.loads(done.stdout.strip().splitlines()[-1]))


def _main() -> str:
    folder, backend, dtype, ids, new_tokens, threads, place, tune = json.load(sys.stdin)
    torch.set_num_threads(threads)
    device = torch.device(place)
    release_free_memory()
    reset_peak(device)
    before = resident_bytes(device)
    loaded = load_model(folder, dtype=dtype, tokenizer=False)
    with dispatch.frozen():
        prepared = prepare(loaded.model, backend, tune=tune, device=device)
    load_peak = peak_bytes(device)
    release_free_memory()
    reset_peak(device)
    with prepared.running():
        generate_timed(loaded.model, torch.tensor([ids]), new_tokens, stop=False)
    found = MemoryUse(
        before=before,
        load_peak=load_peak - before,
        resident=resident_bytes(device) - before,
        generate_peak=peak_bytes(device) - before,
        weights=weight_bytes(loaded.model),
    )
    return json.dumps(asdict(found))


if __name__ == "__main__":
    sys.stdout.write(_main() + "\n")
