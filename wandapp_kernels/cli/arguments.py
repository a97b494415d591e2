"""The arguments of ``wandapp``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from wandapp_kernels import __version__
from wandapp_kernels.cli import checks, task_options
from wandapp_kernels.models.bundled import BUNDLED
from wandapp_kernels.pruning.criteria import CRITERIA
from wandapp_kernels.pruning.methods import METHODS
from wandapp_kernels.pruning.updates import UPDATES

MODEL_HELP = "a folder, a hub id, or a bundled model: smollm2-135m, glass-0.9m"
TEXT_HELP = "wiki, sotu, c4, wikitext2, FILE.txt, FILE.jsonl or a folder of them"
ADAPTER_HELP = "LoRA adapters on top: a folder that wandapp finetune, or PEFT, wrote"


def parser() -> argparse.ArgumentParser:
    """The parser; each subcommand's name is in ``command``."""
    top = argparse.ArgumentParser(prog="wandapp", description="Prune language models and measure what it cost.")
    top.add_argument("--version", action="version", version=f"wandapp {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _prune(_command(commands, "prune", "prune a model and write it to a folder"))
    _eval(_command(commands, "eval", "perplexity of a model on held-out text, and accuracy on zero-shot tasks"))
    _compare(_command(commands, "compare", "prune with several methods and compare perplexity, tasks, time and memory"))
    _inspect(_command(commands, "inspect", "sparsity and pattern of every layer in a folder"))
    # They need this module's names.
    from wandapp_kernels.cli import bench_linear, bench_model, convert, finetune, generate, tune

    finetune.add(
        _command(commands, "finetune", "train low-rank adapters (LoRA) of a pruned model, or merge them into it")
    )
    convert.add(_command(commands, "convert", "write a pruned model compressed, or dense again"))
    generate.add(_command(commands, "generate", "continue a text, with speed and memory"))
    tune.add(_command(commands, "tune", "measure which kernel is fastest for each of a model's layers"))
    bench = commands.add_parser("bench", help="measure speed").add_subparsers(
        dest="bench", required=True, metavar="WHAT"
    )
    bench_linear.add(_command(bench, "linear", "one linear dense and sparse, every backend side by side"))
    bench_model.add(_command(bench, "model", "a pruned model dense and sparse: size, memory, speed, tokens"))
    return top


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _prune(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=MODEL_HELP)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    command.add_argument("--method", default="wanda++", help=f"one of {', '.join(METHODS)} (default: %(default)s)")
    command.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the report here")
    command.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep finished blocks here until the model is written: the same command goes on after them",
    )
    _calibration(command)
    _composition(command)


def _eval(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=MODEL_HELP)
    command.add_argument("--adapter", type=Path, metavar="DIR", help=ADAPTER_HELP)
    command.add_argument("--text", help=f"comma-separated: {TEXT_HELP} (default: wiki; with --tasks none)")
    command.add_argument("--seqlen", type=int, help="window length (default: the context, at most 2048)")
    command.add_argument("--tokens", type=int, help="tokens of each text (default: 16384)")
    command.add_argument("--split", choices=("evaluation", "development"), help="of the text (default: evaluation)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    task_options.add(command, "; alone they run without a text")
    loading(command)


def _compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=MODEL_HELP)
    command.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="keep finished methods and blocks here until the end: the same command goes on after them",
    )
    command.add_argument(
        "--methods", default="magnitude,wanda,sparsegpt,wanda++,best", help="comma-separated (default: %(default)s)"
    )
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for report.html and report.json")
    command.add_argument("--save", type=Path, metavar="DIR", help="write the model with the lowest perplexity here")
    command.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write report.json here")
    command.add_argument("--text", default="wiki", help="evaluation texts, comma-separated; the first is ranked by")
    command.add_argument("--eval-seqlen", type=int, help="evaluation window (default: the context, at most 2048)")
    command.add_argument("--eval-tokens", type=int, default=16384, help="tokens of each text (default: %(default)s)")
    task_options.add(command, ", on the dense model and after every method")
    _calibration(command)
    _composition(command)


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help=f"a folder, or a bundled model: {', '.join(BUNDLED)}")
    command.add_argument("--layers", action="store_true", help="one row per layer instead of one per kind")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the result here")


def loading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", type=checks.dtype, default="auto", help="load weights as float32, bfloat16, … (default: as stored)"
    )
    command.add_argument("--device", help="where to compute: cpu, cuda, cuda:1 (default: cuda when there is one)")
    command.add_argument("--revision", help="revision of a hub model")
    command.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _calibration(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("calibration")
    group.add_argument("--sparsity", default="2:4", help="n:m (n of m kept) or the fraction to remove (default: 2:4)")
    group.add_argument("--calibration", default="wiki", metavar="TEXT", help=f"{TEXT_HELP} (default: wiki)")
    group.add_argument("--samples", type=int, default=128, help="calibration samples (default: %(default)s)")
    group.add_argument("--seqlen", type=int, help="tokens of a sample (default: the context, at most 2048)")
    group.add_argument("--seed", type=int, default=0, help="of calibration and optimiser (default: %(default)s)")
    group.add_argument(
        "--ignore", action="append", default=[], metavar="NAME", help="keep dense: name, suffix or 're:…'; repeatable"
    )
    loading(command)


def _composition(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("changing the method")
    group.add_argument("--score", help=f"criterion: {', '.join(CRITERIA)}")
    group.add_argument("--update", help=f"weight repair: {', '.join(UPDATES)}, none")
    group.add_argument("--regional-optimizer", action=argparse.BooleanOptionalAction, help="on or off")
    group.add_argument("--preset", choices=("paper",), help="the regional optimiser with the paper's rate, 3e-7")
    group.add_argument("--alpha", type=float, help="weight of the gradient in rgs and gblm (100)")
    group.add_argument("--x-norm", choices=("sum", "mean"), help="‖X‖ over all tokens, or divided by the samples")
    group.add_argument("--recompute-gradient", action="store_true", help="regional gradient anew before the last prune")
    group.add_argument("--sequential", action="store_true", help="prune the Linears of a block one after the other")
    group.add_argument(
        "--self-calibration",
        type=int,
        metavar="TOKENS",
        help="let the dense model write more samples, up to this many tokens",
    )
    group = command.add_argument_group("regional optimiser")
    group.add_argument("--rounds", type=int, help="K, rounds")
    group.add_argument("--ro-samples", type=int, help="M, samples of a round; 0 for all")
    group.add_argument("--ro-batch", type=int, help="samples of a step")
    group.add_argument("--algorithm", choices=("rmsprop", "adam"))
    group.add_argument("--relative-lr", type=float, help="step relative to each matrix's rms")
    group.add_argument("--lr", type=float, help="absolute step, instead of --relative-lr")
    group.add_argument("--schedule", choices=("constant", "linear", "cosine"))
    group.add_argument(
        "--ro-mask",
        choices=("regrow", "keep", "rechoose"),
        help="prune anew every round, hold the first mask, or choose anew from latent weights",
    )
    group.add_argument("--zero-grad", choices=("sample", "round"), help="clear gradients every step or every round")
    group.add_argument("--ro-target", choices=("pruned", "dense"), help="which stream the dense output is taken on")
    group.add_argument("--ro-loss", choices=("sum", "token"), help="squared error, or relative to each token's energy")
    group.add_argument("--ro-norms", action=argparse.BooleanOptionalAction, help="also train norm weights and biases")
