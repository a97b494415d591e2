"""Entry point and exit codes: 0 done, 1 failed with one sentence, 2 wrong usage, 130 interrupted, 141 broken pipe."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence

import torch

from wandapp_kernels.checkpoint.atomic import check_file
from wandapp_kernels.cli import bench_linear, bench_model, checks, commands, convert, finetune, generate, tune
from wandapp_kernels.cli.arguments import parser
from wandapp_kernels.errors import UsageError, WandappError

_BENCHES = {
    "linear": bench_linear.run,
    "model": bench_model.run,
}
_COMMANDS = {
    "prune": commands.prune,
    "eval": commands.evaluate,
    "compare": commands.compare_methods,
    "inspect": commands.inspect,
    "finetune": finetune.run,
    "convert": convert.run,
    "generate": generate.run,
    "tune": tune.run,
    "bench": lambda arguments: _BENCHES[arguments.bench](arguments),
}

# 128 + SIGPIPE, what a shell says of a program whose reader has gone.
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``wandapp`` with ``argv`` (default: the process's arguments) and return the exit code."""
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has gone, as head does. What is buffered still must not be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


def _run(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    arguments.command_line = shlex.join(["wandapp", *(sys.argv[1:] if argv is None else argv)])
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            if getattr(arguments, "json", None):
                check_file(arguments.json)
                checks.result_apart(arguments)
            _COMMANDS[arguments.command](arguments)
        return 0
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        print(f"wandapp: interrupted; {getattr(arguments, 'kept', 'no result was written')}", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"wandapp: {_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _sentence(error: Exception) -> str:
    if isinstance(error, WandappError):
        return str(error)
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"there is not enough memory ({text}); ask for less, or use a larger machine"
    return f"unexpected {type(error).__name__}: {text} (run again with --debug for the traceback)"
