"""``wandapp bench linear``: one linear, dense and sparse, every backend side by side.

Backends take turns on weights that are colder than the last-level cache; each time is a median (``tuning.measure``).
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wandapp_kernels import dispatch
from wandapp_kernels.backends import DENSE, UNSTRUCTURED, Problem
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.cli import checks
from wandapp_kernels.cli.checks import DTYPES
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.layouts import CANONICAL, get_layout
from wandapp_kernels.report.tables import table
from wandapp_kernels.sparsity import Pattern
from wandapp_kernels.tuning.device import fingerprint, last_level_cache
from wandapp_kernels.tuning.measure import sample_weight

_TYPES = ("bfloat16", "float16", "float32")
_BEST_DENSE = (DENSE, "cpu-dense", "cpu-dense-amx")
_COPY_ROUNDS = 9
_PACKED_ROWS = 256


@dataclass(frozen=True)
class Shape:
    """A weight ``[n, k]``, written ``NxK``."""

    n: int
    k: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        n, _, k = text.strip().partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise UsageError(f"--shapes {text!r} is not NxK (output × input features), such as 4096x11008")
        return cls(int(n), int(k))


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument(
        "--shapes", default="4096x4096,11008x4096,4096x11008", help="output x input features (default: %(default)s)"
    )
    command.add_argument(
        "--m", default="1,2,4,8,16,32,128,512", help="tokens at once, powers of two (default: %(default)s)"
    )
    command.add_argument("--sparsity", default="2:4,0.5,0.6,0.7", help="n:m or a fraction (default: %(default)s)")
    command.add_argument(
        "--dtype", default="bfloat16", type=checks.dtype, choices=_TYPES, help="(default: %(default)s)"
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: %(default)s)")
    command.add_argument("--seconds", type=float, default=1.0, help="of each row (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a plot here: .png, .svg, .pdf")
    command.add_argument("--quiet", action="store_true", help="no progress, only the result")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table, write JSON and plot."""
    if arguments.plot:
        checks.plot(arguments.plot)
        _matplotlib()
    checks.seconds(arguments.seconds)
    device = str(checks.device(arguments.device))
    shapes = [Shape.parse(text) for text in arguments.shapes.split(",")]
    tokens = _numbers(arguments.m)
    patterns = [Pattern.parse(text.strip()) for text in arguments.sparsity.split(",")]
    dtype = DTYPES[arguments.dtype]
    result: dict[str, Any] = bench(shapes, tokens, patterns, dtype, device, arguments.seconds, quiet=arguments.quiet)
    print(_title(result))
    print(_rows_table(result["rows"]))
    if arguments.json:
        write_text_atomic(arguments.json, to_json(result))
    if arguments.plot:
        plot(result, arguments.plot)


def bench(
    shapes: list[Shape],
    tokens: list[int],
    patterns: list[Pattern],
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 1.0,
    *,
    quiet: bool = True,
) -> dict[str, Any]:
    """One row per shape, sparsity and token count, for the backend that dispatch chooses from these measurements.

    The layout of a weight is chosen once all its token counts are measured, as `dispatch.choose_layout` does for the
    smallest of them: a swapped layer keeps one layout for all. Counts measured earlier help to tell close ones apart.

    Returns:
        ``{"device", "threads", "cpu_kernels", "versions", "date", "copy_gb_per_s", "rows": [{"n", "k", "m", "sparsity",
        "dtype", "backend", "us", "gb_per_s", "share_of_copy", "ceiling", "speedup_torch", "speedup_best_dense",
        "candidates": {backend: µs}}]}``. ``gb_per_s`` counts weight, activation and output once; ``ceiling`` is dense
        bytes by those of the weight in its layout (in the canonical one where dense is chosen).
    """
    copy = copy_bandwidth(device)
    rows = []
    problems = {
        (shape, pattern): [_problem(shape, pattern, m, dtype, device) for m in tokens]
        for shape in shapes
        for pattern in patterns
    }
    with tqdm(total=len(problems) * len(tokens), unit="row", file=sys.stderr, disable=quiet) as bar:
        for (shape, pattern), group in problems.items():
            measured = dispatch.tune(group, seconds=seconds, again=True, progress=lambda *_: bar.update())
            layout = dispatch.choose_layout(group[0])
            for problem in group:
                chosen = dispatch.explain(problem, layout).chosen
                rows.append(_row(shape, pattern, problem, layout, chosen, measured[problem].times_us, copy))
    versions = fingerprint(device)
    return {
        "device": versions.pop("device"),
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "cpu_kernels": versions.pop("cpu_kernels", None),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "copy_gb_per_s": round(copy, 2),
        "rows": rows,
    }


def copy_bandwidth(device: str = "cpu") -> float:
    """GB/s of ``copy_`` between buffers four times the last-level cache, bytes read plus bytes written; median."""
    size = 4 * last_level_cache(device)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(_COPY_ROUNDS):
        start = time.perf_counter()
        target.copy_(source)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times) / 1e9


@lru_cache
def weight_bytes(problem: Problem, layout: str) -> int:
    """Bytes of a random weight of the problem (of one token) in a layout; of many rows, some are packed."""
    rows = min(problem.out_features, _PACKED_ROWS)
    sample = sample_weight(replace(problem, out_features=rows))
    if layout == DENSE or sample.compressed is None:
        return problem.out_features * problem.in_features * problem.dtype.itemsize
    size = sum(tensor.nbytes for tensor in get_layout(layout).pack(sample.compressed))
    return round(size * problem.out_features / rows)


def _problem(shape: Shape, pattern: Pattern, m: int, dtype: torch.dtype, device: str) -> Problem:
    name = str(pattern) if pattern.is_nm else UNSTRUCTURED
    density = None if pattern.is_nm else 1 - pattern.ratio
    return dispatch.problem_for(shape.n, shape.k, name, m, dtype, device, density)


def _row(
    shape: Shape,
    pattern: Pattern,
    problem: Problem,
    layout: str,
    chosen: str,
    times: dict[str, float],
    copy: float,
) -> dict[str, Any]:
    m = problem.tokens
    us = times[chosen]
    one = replace(problem, tokens=1)
    dense = weight_bytes(one, DENSE)
    compressed = weight_bytes(one, CANONICAL[problem.operator] if layout == DENSE else layout)
    weight = dense if layout == DENSE else compressed
    rate = (weight + m * (shape.n + shape.k) * problem.dtype.itemsize) / us / 1e3
    return {
        "n": shape.n,
        "k": shape.k,
        "m": m,
        "sparsity": str(pattern) if pattern.is_nm else pattern.ratio,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "backend": chosen,
        "us": round(us, 1),
        "gb_per_s": round(rate, 2),
        "share_of_copy": round(rate / copy, 3),
        "ceiling": round(dense / compressed, 3),
        "speedup_torch": round(times[DENSE] / us, 3),
        "speedup_best_dense": round(min(times[name] for name in _BEST_DENSE if name in times) / us, 3),
        "candidates": {name: round(value, 1) for name, value in sorted(times.items(), key=lambda entry: entry[1])},
    }


def _title(result: dict[str, Any]) -> str:
    threads = f", {result['threads']} thread{'s' * (result['threads'] > 1)}" if result["threads"] else ""
    kernels = f", kernels {result['cpu_kernels']}" if result["cpu_kernels"] else ""
    return (
        f"{result['device']}{threads}{kernels}, torch {result['versions']['torch']}; "
        f"copy {result['copy_gb_per_s']:.1f} GB/s; medians, weights colder than the last-level cache"
    )


def _rows_table(rows: list[dict[str, Any]]) -> str:
    headers = ["n x k", "sparsity", "m", "backend", "µs", "GB/s", "% copy", "× torch", "× best dense", "% ceiling"]
    cells = [
        [
            f"{row['n']}x{row['k']}",
            row["sparsity"] if isinstance(row["sparsity"], str) else f"{row['sparsity']:.0%}",
            row["m"],
            row["backend"],
            f"{row['us']:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['speedup_torch']:.2f}",
            f"{row['speedup_best_dense']:.2f}",
            # Bytes bound the speed-up only while the weight is what is waited for.
            f"{row['speedup_best_dense'] / row['ceiling']:.0%}" if row["m"] == 1 else None,
        ]
        for row in rows
    ]
    return table(headers, cells)


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed-up over the best dense backend against m, one line for each sparsity, one panel for each shape."""
    pyplot = _matplotlib()
    rows = result["rows"]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.5), sharey=True, squeeze=False)
    for axis, (n, k) in zip(axes[0], shapes, strict=True):
        mine = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        for sparsity in dict.fromkeys(row["sparsity"] for row in mine):
            line = [row for row in mine if row["sparsity"] == sparsity]
            label = sparsity if isinstance(sparsity, str) else f"{sparsity:.0%}"
            axis.plot([row["m"] for row in line], [row["speedup_best_dense"] for row in line], marker="o", label=label)
        axis.axhline(1, color="grey", linewidth=1)
        axis.set(xlabel="tokens at once, m", title=f"{n} x {k}")
        axis.set_xscale("log", base=2)
    axes[0][0].set_ylabel("× best dense")
    axes[0][-1].legend()
    figure.suptitle(f"{result['device']}, {result['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError('--plot needs matplotlib: pip install "wandapp_kernels[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part).bit_count() == 1 for part in parts):
        raise UsageError(f"--m {text!r} is not a list of powers of two, which dispatch tells apart: such as 1,16,512")
    return sorted({int(part) for part in parts})
