"""``wandapp convert MODEL OUT``: a pruned model from dense zeros to the compressed format, and back."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from wandapp_kernels.checkpoint.atomic import check_target, write_text_atomic
from wandapp_kernels.checkpoint.files import read_json
from wandapp_kernels.checkpoint.save import RECORD, save_pruned, to_json
from wandapp_kernels.cli import checks
from wandapp_kernels.cli.arguments import MODEL_HELP
from wandapp_kernels.errors import ModelError
from wandapp_kernels.models.bundled import quiet_transformers
from wandapp_kernels.models.load import LoadedModel, load_model
from wandapp_kernels.report.tables import human_bytes, percent
from wandapp_kernels.runtime.folder import save_compressed
from wandapp_kernels.runtime.swap import MIN_SPARSITY, desparsify, sparse_layers, sparsify


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument("model", help=MODEL_HELP)
    command.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    command.add_argument(
        "--format",
        default="compressed",
        choices=("compressed", "dense"),
        help="compressed: read by wandapp_kernels only; dense: zeros in place, read by all (default: %(default)s)",
    )
    command.add_argument(
        "--pattern", default="auto", help="n:m or unstructured for every layer that has it; auto: the smallest form"
    )
    command.add_argument(
        "--min-sparsity", type=float, default=MIN_SPARSITY, help="of unstructured layers (%(default)s)"
    )
    command.add_argument(
        "--ignore", action="append", default=[], metavar="NAME", help="keep dense: name, suffix or 're:…'; repeatable"
    )
    command.add_argument("--dtype", default="auto", help="convert weights to float32, bfloat16, … (default: as stored)")
    command.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    command.add_argument("--json", type=Path, metavar="FILE", help="write what was done to every layer here")


def run(arguments: argparse.Namespace) -> None:
    """Load, swap or unswap, write."""
    checks.fraction(arguments.min_sparsity, "--min-sparsity")
    check_target(arguments.out, arguments.force)
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    record, before = _record(loaded), _weight_bytes(loaded.folder)  # OUT may replace the folder
    found: dict[str, Any] = {"model": arguments.model, "format": arguments.format}
    if arguments.format == "compressed":
        report = sparsify(
            loaded.model,
            arguments.pattern,
            ignore=arguments.ignore,
            min_sparsity=arguments.min_sparsity,
            layouts="canonical",
        )
        layers = {name: layer for name, layer in sparse_layers(loaded.model)}
        if not layers:
            raise ModelError(f"no layer of {arguments.model} can be compressed; prune it first (wandapp prune)")
        kinds = Counter(layer.pattern for layer in layers.values())
        what = ", ".join(f"{count} × {pattern}" for pattern, count in kinds.items())
        with quiet_transformers():
            save_compressed(loaded.model, loaded.tokenizer, arguments.out, record, force=arguments.force)
        found |= report.to_dict()
    else:
        names = desparsify(loaded.model)
        what = f"{len(names)} layers decompressed"
        with quiet_transformers():
            save_pruned(loaded.model, loaded.tokenizer, arguments.out, record, force=arguments.force)
        found |= {"decompressed": names}
    after = _weight_bytes(arguments.out)
    found |= {"bytes_before": before, "bytes_after": after}
    share = f" ({percent(after / before)} of {human_bytes(before)})" if before else ""
    print(f"{arguments.out}: {what}; weights {human_bytes(after)}{share}")
    if arguments.json:
        write_text_atomic(arguments.json, to_json(found))


def _record(loaded: LoadedModel) -> dict[str, Any]:
    """What pruned the model; it travels with the weights."""
    path = loaded.folder / RECORD if loaded.folder is not None else None
    return read_json(path) if path is not None and path.exists() else {}


def _weight_bytes(folder: Path | None) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder is not None else 0
