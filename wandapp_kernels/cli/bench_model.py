"""``wandapp bench model DIR``: a pruned model with its zeros multiplied, and with its layers sparse."""

from __future__ import annotations

import argparse
import datetime
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.files import read_json
from wandapp_kernels.checkpoint.save import save_pruned, to_json
from wandapp_kernels.cli import checks
from wandapp_kernels.cli.arguments import MODEL_HELP
from wandapp_kernels.cli.bars import ProgressDisplay
from wandapp_kernels.errors import CheckpointError, ModelError, UsageError
from wandapp_kernels.models.bundled import quiet_transformers
from wandapp_kernels.models.load import LoadedModel, load_model
from wandapp_kernels.pruning.walk import Progress, device_name, versions
from wandapp_kernels.report.runtime import add_to_report, runtime_tables
from wandapp_kernels.runtime.folder import save_compressed
from wandapp_kernels.runtime.memory import release_free_memory
from wandapp_kernels.runtime.prepare import prepare
from wandapp_kernels.runtime.probe import measure_memory
from wandapp_kernels.runtime.random_model import SHAPES, random_model
from wandapp_kernels.runtime.speed import Contender, common_prefix, measure_speed
from wandapp_kernels.runtime.swap import desparsify, sparsify

_TEXT = (
    "The history of a language is the history of the people who speak it. Words are borrowed from neighbours, carried "
    "home by traders and soldiers, worn down by daily use, and given new meanings by every generation. "
)


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument("model", nargs="?", help=f"pruned: {MODEL_HELP}; or --random")
    command.add_argument("--random", choices=tuple(SHAPES), help="a random model of this shape instead")
    command.add_argument("--sparsity", help="of the random model (default: 2:4)")
    command.add_argument(
        "--dtype", default="auto", help="comma-separated: bfloat16,float32; each dense and sparse (default: as stored)"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda when there is one)")
    command.add_argument("--prompts", default="16,128", help="prompt lengths, comma-separated (default: %(default)s)")
    command.add_argument("--batch", default="1,4", help="batch sizes at the first prompt length (default: %(default)s)")
    command.add_argument("--new-tokens", type=int, default=16, help="decoded in every run (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=3, help="rounds, of which the median (default: %(default)s)")
    command.add_argument("--tune", action="store_true", help="measure the kernels for this model's shapes first")
    command.add_argument(
        "--compile",
        action="store_true",
        help="each form also with its decode step compiled, at the first prompt length; takes minutes more",
    )
    command.add_argument("--no-memory", action="store_true", help="leave memory out: it needs a process for every form")
    command.add_argument("--report", type=Path, metavar="DIR", help="add the result to the report compare wrote there")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    command.add_argument("--quiet", action="store_true", help="no progress, only the result")


def run(arguments: argparse.Namespace) -> None:
    """Measure sizes, memory and speed, print tables, write JSON."""
    prompts, batches = _numbers(arguments.prompts, "--prompts"), _numbers(arguments.batch, "--batch")
    if arguments.new_tokens < 2 or arguments.rounds < 1:
        raise UsageError("--new-tokens must be at least 2 and --rounds at least 1")
    if (arguments.model is None) == (arguments.random is None):
        raise UsageError("give either a model or --random SHAPE")
    if arguments.sparsity is not None and arguments.random is None:
        raise UsageError("--sparsity is for --random; a model has the sparsity it was pruned to")
    sparsity = arguments.sparsity or "2:4"
    device = checks.device(arguments.device)
    if arguments.dtype != "auto":
        checks.dtypes(arguments.dtype)
    if arguments.report:  # what is missing shows before anything is measured
        if not (arguments.report / "report.json").is_file():
            raise CheckpointError(f"{arguments.report} has no report.json; give what wandapp compare --out wrote")
        read_json(arguments.report / "report.json")
    display = ProgressDisplay(arguments.quiet)
    with tempfile.TemporaryDirectory(prefix="wandapp-bench-") as work, quiet_transformers():
        dense, compressed, tokenizer = _folders(arguments, sparsity, Path(work), display)
        dtypes = _dtypes(arguments.dtype, dense)
        ids = {length: _prompt(tokenizer, dense, length, arguments.new_tokens) for length in prompts}
        result: dict[str, Any] = {
            "model": arguments.model or f"random {arguments.random}, {sparsity}",
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            "disk": {"dense": _size(dense), "sparse": _size(compressed)},
            "memory": {},
        }
        forms = [(kind, dtype) for dtype in dtypes for kind in ("dense", "sparse")]
        if arguments.tune and not arguments.no_memory:
            display.line("measuring the kernels")  # they decide what is held
            for dtype in dtypes:
                _contender("sparse", dtype, dense, compressed, True, device)
        for kind, dtype in () if arguments.no_memory else forms:
            display.line(f"memory of {kind} {dtype}")
            folder = dense if kind == "dense" else compressed
            backend = "dense" if kind == "dense" else "auto"
            prompt = ids[prompts[0]][0].tolist()
            used = measure_memory(folder, backend, dtype, prompt, arguments.new_tokens, device, tune=arguments.tune)
            result["memory"][f"{kind} {dtype}"] = asdict(used)
        contenders = [_contender(kind, dtype, dense, compressed, arguments.tune, device) for kind, dtype in forms]
        result["layers"] = {contender.name: contender.prepared.layers for contender in contenders}
        if arguments.compile:
            display.line(f"decode steps to be compiled: {len(contenders) * len(batches)}, a minute or more each")
            contenders += [replace(one, name=f"{one.name} compiled", compiled=True) for one in contenders]
        settings = [(prompts[0], batch) for batch in batches] + [(length, batches[0]) for length in prompts[1:]]
        speeds = measure_speed(
            contenders,
            ids,
            settings,
            arguments.new_tokens,
            arguments.rounds,
            lambda done, total: display("bench", Progress("round", done, total)),
        )
        display.close()
        result["speed"] = [asdict(speed) for speed in speeds]
        result["same_tokens"] = _same_tokens(result["speed"])
        result["texts"] = _texts(tokenizer, ids[prompts[0]], result["speed"])
    result["command"] = arguments.command_line
    print(runtime_tables(result))
    if arguments.json:
        write_text_atomic(arguments.json, to_json(result))
    if arguments.report:
        add_to_report(arguments.report, result)
        print(f"\nreport: {arguments.report / 'report.html'}")


def _folders(
    arguments: argparse.Namespace, sparsity: str, work: Path, display: ProgressDisplay
) -> tuple[Path, Path, Any]:
    """The model as a dense and as a compressed folder, both on disk, and its tokenizer."""
    if arguments.random is not None:
        display.line(f"making a random {arguments.random}")
        dtype = "float32" if arguments.dtype == "auto" else checks.dtypes(arguments.dtype)[0]
        model = random_model(arguments.random, sparsity, checks.DTYPES[dtype])
        loaded = LoadedModel(model, None, arguments.random, None)
    else:
        loaded = load_model(arguments.model)
    given = loaded.folder
    folders = {"dense": work / "dense", "compressed": work / "compressed"}
    was_sparse = bool(desparsify(loaded.model))
    if given is not None:
        folders["compressed" if was_sparse else "dense"] = given
    display.line("writing the model in the other form")
    if not folders["dense"].exists():
        save_pruned(loaded.model, loaded.tokenizer, folders["dense"], {})
    report = sparsify(loaded.model, layouts="canonical")
    if not report.swapped:
        raise ModelError(f"no layer of {loaded.name} is sparse; prune it first (wandapp prune)")
    if not folders["compressed"].exists():
        save_compressed(loaded.model, loaded.tokenizer, folders["compressed"], {})
    return folders["dense"], folders["compressed"], loaded.tokenizer


def _contender(kind: str, dtype: str, dense: Path, compressed: Path, tune: bool, device: torch.device) -> Contender:
    model = load_model(str(dense if kind == "dense" else compressed), dtype=dtype, tokenizer=False).model
    prepared = prepare(model, "dense" if kind == "dense" else "auto", tune=tune, device=device)
    release_free_memory()
    return Contender(f"{kind} {dtype}", model, prepared)


def _dtypes(asked: str, dense: Path) -> list[str]:
    if asked != "auto":
        return checks.dtypes(asked)
    return [str(AutoConfig.from_pretrained(dense).dtype).removeprefix("torch.")]


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} is {text!r}, but must be whole numbers, such as 16,128") from error
    if min(numbers) < 1:
        raise UsageError(f"{option} is {text!r}, but every number must be at least 1")
    return list(dict.fromkeys(numbers))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _prompt(tokenizer: Any, folder: Path, length: int, new_tokens: int) -> torch.Tensor:
    """``[1, length]``: English text where there is a tokenizer, else random tokens."""
    config = AutoConfig.from_pretrained(folder)
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and length + new_tokens > context:
        raise UsageError(
            f"a prompt of {length} and {new_tokens} new tokens exceed the context of {context}; ask for less"
        )
    if tokenizer is None:
        return torch.randint(3, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids = tokenizer(_TEXT * (length // 20 + 1), return_tensors="pt")["input_ids"]
    return ids[:, :length]


def _texts(tokenizer: Any, prompt: torch.Tensor, speeds: list[dict[str, Any]]) -> dict[str, str]:
    """What each form wrote after the first prompt, as text; empty without a tokenizer."""
    if tokenizer is None:
        return {}
    first = {row["name"]: row["tokens"][0] for row in reversed(speeds) if row["prompt"] == prompt.shape[1]}
    texts = {name: tokenizer.decode(tokens) for name, tokens in reversed(first.items())}
    return {"prompt": tokenizer.decode(prompt[0].tolist()), **texts}


def _same_tokens(speeds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far the output of the sparse model equals that of the dense model that runs the same way."""
    pairs: dict[tuple[str, int, int], dict[str, list[list[int]]]] = {}
    for speed in speeds:
        kind, _, way = speed["name"].partition(" ")
        pairs.setdefault((way, speed["prompt"], speed["batch"]), {})[kind] = speed["tokens"]
    found = []
    for (way, prompt, batch), tokens in pairs.items():
        same = common_prefix(tokens["dense"][0], tokens["sparse"][0])
        found.append({"dtype": way, "prompt": prompt, "batch": batch, "same": same, "of": len(tokens["dense"][0])})
    return found
