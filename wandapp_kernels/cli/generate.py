"""``wandapp generate MODEL``: text from a model, with its speed and memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from wandapp_kernels.backends import DENSE
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.cli import checks
from wandapp_kernels.cli.arguments import ADAPTER_HELP, MODEL_HELP
from wandapp_kernels.errors import ModelError, UsageError
from wandapp_kernels.evaluation.perplexity import context_length
from wandapp_kernels.finetuning.adapters import add_adapters, check_adapters
from wandapp_kernels.models.bundled import quiet_transformers
from wandapp_kernels.models.load import LoadedModel, load_model
from wandapp_kernels.pruning.walk import device_name
from wandapp_kernels.report.tables import human_bytes, human_seconds, number
from wandapp_kernels.runtime.generation import compile_decode, generate_timed
from wandapp_kernels.runtime.memory import peak_bytes, resident_bytes
from wandapp_kernels.runtime.prepare import prepare, weight_bytes

_NEW_TOKENS = 64


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument("model", help=MODEL_HELP)
    command.add_argument("--adapter", type=Path, metavar="DIR", help=ADAPTER_HELP)
    command.add_argument("--prompt", required=True, help="the text to continue")
    command.add_argument(
        "--max-new-tokens", type=int, help=f"at most (default: {_NEW_TOKENS}, or what the context leaves)"
    )
    command.add_argument(
        "--backend",
        default="auto",
        help="auto: sparse layers, the fastest kernel for each (default); dense: zeros multiplied; a family of kernels "
        "that run on the device (cpu, cuda, triton, …, reference): only that one",
    )
    command.add_argument(
        "--cache", choices=("dynamic", "static"), help="key/value cache (default: dynamic; static with --compile)"
    )
    command.add_argument(
        "--compile", action="store_true", help="compile the decode step first, which takes a minute or more"
    )
    command.add_argument("--tune", action="store_true", help="measure the kernels for this model's shapes first")
    command.add_argument(
        "--dtype", type=checks.dtype, default="auto", help="load weights as float32, bfloat16, … (default: as stored)"
    )
    command.add_argument(
        "--device", help="cpu, cuda, cuda:1 (default: cuda when there is one; with --backend cpu: cpu)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")


def run(arguments: argparse.Namespace) -> None:
    """Load, swap, generate."""
    if arguments.compile and arguments.cache == "dynamic":
        raise UsageError("--compile needs a cache of fixed size; leave --cache dynamic out")
    if arguments.tune and arguments.backend == DENSE:
        raise UsageError("--tune chooses among kernels, but --backend dense is torch's product; leave one of them out")
    device = checks.device("cpu" if arguments.device is None and arguments.backend == "cpu" else arguments.device)
    checks.backend(arguments.backend, device)
    if arguments.adapter:
        check_adapters(arguments.adapter)
    loaded = load_model(arguments.model, dtype=arguments.dtype)
    ids, new_tokens = _prompt(arguments, loaded)
    prepared = prepare(loaded.model, arguments.backend, tune=arguments.tune, device=device)
    if arguments.adapter:
        add_adapters(loaded.model, arguments.adapter)
    printer = _Printer(loaded.tokenizer)
    with quiet_transformers(), prepared.running():
        if arguments.compile:
            print("compiling the decode step", file=sys.stderr)
            compile_decode(loaded.model, ids, new_tokens)
        done = generate_timed(
            loaded.model,
            ids,
            new_tokens,
            cache=arguments.cache,
            compiled=arguments.compile,
            on_token=lambda token: printer(token),
        )
    printer.close()
    found = {
        "model": arguments.model,
        "adapter": arguments.adapter,
        "backend": arguments.backend,
        "compiled": arguments.compile,
        "layers": prepared.layers,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "prompt_tokens": ids.shape[1],
        "tokens": done.tokens[0].tolist(),
        "ttft_s": done.ttft,
        "tokens_per_second": done.tokens_per_second,
        "tokens_per_cpu_second": done.tokens_per_cpu_second,
        "weight_bytes": weight_bytes(loaded.model),
        "resident_bytes": resident_bytes(device),
        "peak_bytes": peak_bytes(device),
    }
    threads = found["threads"]
    memory, held = ("memory", "resident") if threads else ("GPU memory", "allocated")
    where = f"{threads} thread{'s' * (threads > 1)}" if threads else found["device"]
    how = f"{arguments.backend} backend{', compiled' * arguments.compile}{', adapters' * bool(arguments.adapter)}"
    print(
        f"\n{found['dtype']}, {prepared.layers}, {how}, {where}\n"
        f"{ids.shape[1]} prompt tokens, first token after {human_seconds(done.ttft)}; "
        f"{done.tokens.shape[1]} new tokens, {number(done.tokens_per_second)} tokens/s\n"
        f"{memory}: weights {human_bytes(found['weight_bytes'])}, {held} {human_bytes(found['resident_bytes'])}, "
        f"peak {human_bytes(found['peak_bytes'])}"
    )
    if arguments.json:
        write_text_atomic(arguments.json, to_json(found))


def _prompt(arguments: argparse.Namespace, loaded: LoadedModel) -> tuple[torch.Tensor, int]:
    """The prompt's token ids ``[1, tokens]``, and how many new ones to write."""
    if loaded.tokenizer is None:
        raise ModelError(f"{arguments.model} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    with quiet_transformers():  # it warns of a long prompt, which is refused here
        ids = loaded.tokenizer(arguments.prompt, return_tensors="pt")["input_ids"]
    assert isinstance(ids, torch.Tensor)
    if not ids.numel():
        raise UsageError("--prompt is empty; give some text to continue")
    context = context_length(loaded.model)
    left = None if context is None else context - ids.shape[1]
    if left is not None and left < 1:
        raise UsageError(f"--prompt has {ids.shape[1]} tokens, which fill the context of {context}; give a shorter one")
    asked = arguments.max_new_tokens
    if asked is None:
        return ids, _NEW_TOKENS if left is None else min(_NEW_TOKENS, left)
    if asked < 1 or (left is not None and asked > left):
        most = " or more" if left is None else f" to {left}, which the prompt leaves of the context"
        raise UsageError(f"--max-new-tokens is {asked}, but must be 1{most}")
    return ids, asked


class _Printer:
    """Prints text as far as it is certain: a character may take several tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def __call__(self, token: torch.Tensor) -> None:
        self._ids.append(int(token[0]))
        text = self._text()
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[self._shown :], end="", flush=True)
            self._shown = len(text)

    def close(self) -> None:
        print(self._text()[self._shown :])

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)
