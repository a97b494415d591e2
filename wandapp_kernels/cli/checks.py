"""Options that several commands share, checked before anything is done."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch

from wandapp_kernels import dispatch
from wandapp_kernels.backends import BACKENDS, DENSE, UNSTRUCTURED, load_backends
from wandapp_kernels.checkpoint.atomic import check_file
from wandapp_kernels.errors import UsageError
from wandapp_kernels.models.bundled import BUNDLED

DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_SHORT = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_PLOTS = (".png", ".svg", ".pdf")


def device(asked: str | None) -> torch.device:
    """The device named by ``--device``, which is there; None: CUDA when there is one, else the CPU."""
    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(asked)
    except RuntimeError as error:
        raise UsageError(f"device {asked!r} is unknown; use cpu, cuda or cuda:N") from error
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise UsageError(f"device {asked!r} has no kernels here; use cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise UsageError(f"device {asked!r} cannot be used: torch finds no GPU; use --device cpu")
    if (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {asked!r} cannot be used: torch finds {torch.cuda.device_count()} GPUs, from cuda:0")
    return found


def backend(asked: str, place: torch.device) -> None:
    """Refuse what is neither ``auto`` nor ``dense`` nor a family of backends of which one runs on the device."""
    if asked in ("auto", DENSE):
        return
    load_backends()
    problems = [
        dispatch.problem_for(4096, 4096, pattern, tokens, dtype, place, 0.5)
        for pattern in ("2:4", UNSTRUCTURED)
        for tokens in (1, 512)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    here = {one.name.partition("-")[0] for one in BACKENDS.values() if any(one.supports(p) is None for p in problems)}
    choices = ["auto", DENSE, *sorted(here - {DENSE}), "reference"]
    if asked not in choices:
        raise UsageError(f"--backend is {asked!r}, but what runs on {place} is {', '.join(choices)}")


def dtype(asked: str) -> str:
    """The name in ``DTYPES`` that a short one, such as ``bf16``, stands for; any other text as it is."""
    return _SHORT.get(asked, asked)


def dtypes(asked: str) -> list[str]:
    """The names of ``--dtype``, comma-separated, each once."""
    names = list(dict.fromkeys(dtype(part.strip()) for part in asked.split(",")))
    for name in names:
        if name not in DTYPES:
            raise UsageError(f"--dtype is {asked!r}, but {name!r} is none of {', '.join(DTYPES)}")
    return names


def fraction(value: float, option: str) -> None:
    """Refuse what is not between 0 and 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"{option} is {value:g}, but must be between 0 and 1")


def seed(value: int) -> None:
    """Refuse what torch's generators do not take."""
    if not -(2**63) <= value < 2**64:
        raise UsageError(f"--seed is {value}, but must be a number of at most 64 bits")


def seconds(value: float) -> None:
    """Refuse a time that has passed or has no end."""
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"--seconds is {value:g}, but must be 0 or more")


def apart(folders: dict[str, Path]) -> None:
    """Refuse two folders, by option, of which writing one would replace the other or what is in it."""
    (first, one), (second, other) = folders.items()
    here, there = one.resolve(), other.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        how = "the same folder" if here == there else "inside one another"
        raise UsageError(
            f"{first} {one} and {second} {other} are {how}, and each is replaced or deleted whole; name two folders"
        )


def result_apart(arguments: argparse.Namespace) -> None:
    """Refuse a ``--json`` that is the folder to be written, or lies in the one that is deleted at the end."""
    for option in ("out", "save"):
        folder = getattr(arguments, option, None)
        if folder is not None and folder.resolve() == arguments.json.resolve():
            raise UsageError(f"--json {arguments.json} is the folder that is written; name a file")
    work = getattr(arguments, "work", None)
    if work is not None and arguments.json.resolve().is_relative_to(work.resolve()):
        raise UsageError(f"--json {arguments.json} lies in --work {work}, which is deleted at the end; name another")


def spares(model: str, folders: dict[str, Path | None], *, in_place: bool = False) -> None:
    """Refuse folders to write, by option, that hold the model's own, which would be gone.

    Args:
        in_place: the model's own folder may be written, which is done when it has been read for the last time.
    """
    home = Path(os.path.realpath(os.path.expanduser(model)))
    if model in BUNDLED or not os.path.isdir(home):
        return
    for option, folder in folders.items():
        target = folder.resolve() if folder is not None else None
        if target is not None and home.is_relative_to(target) and not (in_place and home == target):
            raise UsageError(f"{option} {folder} holds the model {model}, and is replaced whole; name another folder")


def plot(path: Path) -> None:
    """Refuse a file that no plot can be written to."""
    if path.suffix.lower() not in _PLOTS:
        raise UsageError(f"--plot is {path}, but must end in {', '.join(_PLOTS)}")
    check_file(path)
