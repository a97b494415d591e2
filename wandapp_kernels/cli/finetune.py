"""``wandapp finetune PRUNED --out DIR``: LoRA after pruning, as adapters or merged under the mask."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wandapp_kernels import api
from wandapp_kernels.checkpoint.atomic import check_target, write_text_atomic
from wandapp_kernels.checkpoint.save import check_room_for, save_pruned, to_json
from wandapp_kernels.cli import checks
from wandapp_kernels.cli.arguments import MODEL_HELP, TEXT_HELP, loading
from wandapp_kernels.cli.bars import ProgressDisplay
from wandapp_kernels.cli.commands import evaluation_texts, load, load_dense, window
from wandapp_kernels.data.calibration import calibration_tokens
from wandapp_kernels.errors import UsageError
from wandapp_kernels.evaluation.compare import score_texts
from wandapp_kernels.evaluation.perplexity import Perplexity
from wandapp_kernels.finetuning.adapters import require_peft, save_adapters
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.finetuning.targets import choose_layers
from wandapp_kernels.models.bundled import quiet_transformers
from wandapp_kernels.report.tables import human_bytes, human_seconds, number

if TYPE_CHECKING:
    from peft import PeftModel

_SAMPLES, _SEQLEN = 2048, 256


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    recipe = FinetuneSettings
    command.add_argument("model", metavar="PRUNED", help=f"pruned: {MODEL_HELP}")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    command.add_argument(
        "--merge",
        action="store_true",
        help="train under the mask and write a pruned model, its zeros where they were; without it DIR gets PEFT "
        "adapters, to be loaded on top of PRUNED",
    )
    command.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the record of the fine-tuning here")
    group = command.add_argument_group("recipe")
    group.add_argument(
        "--targets",
        default=",".join(recipe.targets),
        help="layers, comma-separated: names or last parts of names; all: every pruned one (default: %(default)s)",
    )
    group.add_argument("--rank", type=int, default=recipe.rank, help="of the adapters (default: %(default)s)")
    group.add_argument("--alpha", type=float, default=recipe.alpha, help="scale, times 1/rank (default: %(default)s)")
    group.add_argument("--dropout", type=float, default=recipe.dropout, help="of their input (default: %(default)s)")
    group.add_argument("--lr", type=float, default=recipe.lr, help="AdamW's peak rate (default: %(default)s)")
    group.add_argument(
        "--warmup", type=int, default=recipe.warmup, help="steps in which the rate rises (default: %(default)s)"
    )
    group.add_argument("--batch", type=int, default=recipe.batch, help="sequences of a step (default: %(default)s)")
    group.add_argument(
        "--micro-batch",
        type=int,
        default=recipe.micro_batch,
        help="sequences in memory at once (default: %(default)s)",
    )
    group.add_argument("--epochs", type=int, default=recipe.epochs, help="passes over the text (default: %(default)s)")
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for activations, a third more time"
    )
    group.add_argument("--seed", type=int, default=0, help="of text, adapters and dropout (default: %(default)s)")
    group = command.add_argument_group("text")
    group.add_argument("--train", default="wiki", metavar="TEXT", help=f"to train on: {TEXT_HELP} (default: wiki)")
    group.add_argument("--samples", type=int, default=_SAMPLES, help="training sequences (default: %(default)s)")
    group.add_argument("--seqlen", type=int, help=f"tokens of a sequence (default: the context, at most {_SEQLEN})")
    group.add_argument(
        "--text", default="wiki", help="held-out texts, comma-separated, scored before and after (default: wiki)"
    )
    group.add_argument("--eval-seqlen", type=int, help="evaluation window (default: the context, at most 2048)")
    group.add_argument("--eval-tokens", type=int, default=16384, help="tokens of each text (default: %(default)s)")
    loading(command)


def run(arguments: argparse.Namespace) -> None:
    """Load, score, train, score, write."""
    checks.seed(arguments.seed)
    targets = tuple(target.strip() for target in arguments.targets.split(",") if target.strip())
    recipe = {name: getattr(arguments, name) for name in asdict(FinetuneSettings()) if name != "targets"}
    if arguments.samples < 1:
        raise UsageError(f"--samples is {arguments.samples}, but must be at least 1")
    FinetuneSettings(**recipe).steps(arguments.samples)
    check_target(arguments.out, arguments.force)
    checks.spares(arguments.model, {"--out": arguments.out}, in_place=arguments.merge)
    if not arguments.merge:
        require_peft()
    device = checks.device(arguments.device)
    loaded = load_dense(arguments) if arguments.merge else load(arguments)
    assert loaded.tokenizer is not None, "load refuses a model without one"
    record = loaded.record if arguments.merge else {}  # OUT may replace the folder
    if arguments.merge:
        check_room_for(loaded.model, arguments.out)
    choose_layers(loaded.model, targets)
    seqlen = window(arguments.seqlen, loaded, most=_SEQLEN)
    tokens = calibration_tokens(
        loaded.tokenizer, arguments.train, samples=arguments.samples, seqlen=seqlen, seed=arguments.seed
    )
    texts = evaluation_texts(arguments.text, loaded, "evaluation", arguments.eval_tokens)
    eval_seqlen = window(arguments.eval_seqlen, loaded, "--eval-seqlen")

    display = ProgressDisplay(arguments.quiet)
    before = score_texts(loaded, texts, eval_seqlen, device)
    for score in before:
        display.line(f"before: perplexity {number(score.value)} on {score.source}")
    with quiet_transformers():
        tuned, report = api.finetune(
            loaded.model,
            tokens,
            merge=arguments.merge,
            targets=targets,
            progress=lambda where: display("finetune", where),
            **recipe,
        )
    display.close()
    after = score_texts(loaded, texts, eval_seqlen, device)
    entry = {
        **report.to_dict(),
        "model": arguments.model,
        "train": tokens.source,
        "perplexity": [_both(one, other) for one, other in zip(before, after, strict=True)],
        "command": arguments.command_line,
    }
    earlier = record.get("finetuning")
    record = {**record, "finetuning": [*(earlier if isinstance(earlier, list) else []), entry]}
    with quiet_transformers():
        if arguments.merge:
            save_pruned(loaded.model, loaded.tokenizer, arguments.out, record, force=arguments.force)
        else:
            save_adapters(cast("PeftModel", tuned), arguments.out, record, base=arguments.model, force=arguments.force)
    if arguments.json:
        write_text_atomic(arguments.json, to_json(entry))
    how = "merged under their masks" if arguments.merge else f"to be loaded on top of {arguments.model}"
    print(
        f"{arguments.out}: adapters of rank {arguments.rank} for {len(report.layers)} layers, {how}; "
        f"{len(report.losses)} steps, {human_seconds(report.seconds)}, peak memory "
        f"{human_bytes(report.peak_memory_bytes)}"
    )
    for one, other in zip(before, after, strict=True):
        print(
            f"{one.source} ({one.split}): perplexity {number(one.value)} before, {number(other.value)} after, over "
            f"{one.tokens} tokens in windows of {one.seqlen}, text {one.text_hash}"
        )


def _both(before: Perplexity, after: Perplexity) -> dict[str, Any]:
    return {
        "text": before.source,
        "split": before.split,
        "tokens": before.tokens,
        "seqlen": before.seqlen,
        "text_hash": before.text_hash,
        "before": before.value,
        "after": after.value,
    }
