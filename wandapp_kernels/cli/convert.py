"""``wandapp convert MODEL OUT``: a pruned model from dense zeros to the compressed format, and back."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from wandapp_kernels.checkpoint.atomic import check_target, write_text_atomic
from wandapp_kernels.checkpoint.save import save_pruned, to_json
from wandapp_kernels.cli import checks
from wandapp_kernels.cli.arguments import MODEL_HELP
from wandapp_kernels.errors import ModelError, NonFiniteError, UsageError
from wandapp_kernels.models.bundled import quiet_transformers
from wandapp_kernels.models.layers import check_ignored
from wandapp_kernels.models.load import LoadedModel, load_model
from wandapp_kernels.report.tables import human_bytes, percent
from wandapp_kernels.runtime.folder import save_compressed
from wandapp_kernels.runtime.swap import MIN_SPARSITY, SwapReport, desparsify, sparse_layers, sparsify

# Of the reasons why layers stay dense, so many are told.
_REASONS = 3


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
        "--pattern", help="n:m or unstructured for every layer that has it; auto: the smallest form (auto)"
    )
    command.add_argument("--min-sparsity", type=float, help=f"of unstructured layers ({MIN_SPARSITY})")
    command.add_argument(
        "--ignore", action="append", default=[], metavar="NAME", help="keep dense: name, suffix or 're:…'; repeatable"
    )
    command.add_argument(
        "--dtype",
        type=checks.dtype,
        default="auto",
        help="convert weights to float32, bfloat16, … (default: as stored)",
    )
    command.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    command.add_argument("--json", type=Path, metavar="FILE", help="write what was done to every layer here")


def run(arguments: argparse.Namespace) -> None:
    """Load, swap or unswap, write."""
    asked = _asked(arguments)
    check_target(arguments.out, arguments.force)
    checks.spares(arguments.model, {"OUT": arguments.out}, in_place=True)
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    check_ignored(loaded.model, arguments.ignore)
    _check_finite(loaded, arguments.dtype)
    record, before = loaded.record, _weight_bytes(loaded.folder)  # OUT may replace the folder
    found: dict[str, Any] = {"model": arguments.model, "format": arguments.format}
    if arguments.format == "compressed":
        report = _compress(loaded, asked)
        kinds = Counter(layer.pattern for _, layer in sparse_layers(loaded.model))
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


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of the compressed form that were given, as keywords of ``sparsify``."""
    if arguments.min_sparsity is not None:
        checks.fraction(arguments.min_sparsity, "--min-sparsity")
    names = ("pattern", "min_sparsity", "ignore")
    asked = {name: value for name in names if (value := getattr(arguments, name)) not in (None, [])}
    if asked and arguments.format == "dense":
        typed = ", ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise UsageError(f"{typed} cannot be used with --format dense, which decompresses every layer; leave it out")
    return asked


def _compress(loaded: LoadedModel, asked: dict[str, Any]) -> SwapReport:
    if asked:
        desparsify(loaded.model)  # layers that are compressed already would stay as they are
    report = sparsify(loaded.model, **asked, layouts="canonical")
    if not any(sparse_layers(loaded.model)):
        reasons = Counter(report.left_dense.values()).most_common(_REASONS)
        why = "; ".join(f"{count} layer{'s' * (count > 1)}: {reason}" for reason, count in reasons)
        raise ModelError(
            f"no layer of {loaded.name} can be compressed ({why or 'it has none'}); prune it first (wandapp prune), or "
            "choose another form"
        )
    return report


def _check_finite(loaded: LoadedModel, dtype: str) -> None:
    for name, tensor in loaded.model.state_dict().items():
        # No temporaries: an embedding is large. NaN passes through aminmax.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            what = "get the checkpoint again" if dtype == "auto" else f"get it again, or a wider --dtype than {dtype}"
            raise NonFiniteError(f"the tensor {name} of {loaded.name} holds NaN or infinity and is not written; {what}")


def _weight_bytes(folder: Path | None) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder is not None else 0
