"""``wandapp tune MODEL``: measures which backend runs each of a model's linears fastest, and says why."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from wandapp_kernels import dispatch
from wandapp_kernels.backends import DENSE, UNSTRUCTURED, Problem, density_bucket
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.format import NM_PATTERNS, compressed_bytes
from wandapp_kernels.checkpoint.inspect import inspect_folder
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.cli import checks
from wandapp_kernels.cli.checks import DTYPES
from wandapp_kernels.errors import ModelError, UsageError
from wandapp_kernels.models.bundled import BUNDLED, bundled_folder
from wandapp_kernels.report.tables import table
from wandapp_kernels.runtime.swap import MIN_SPARSITY
from wandapp_kernels.sparsity import Pattern
from wandapp_kernels.tuning.device import fingerprint

_STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class LayerKind:
    """What layers of one kind share: ``(out, in)``, pattern (``"dense"`` too), ``density_bucket`` and type."""

    out_features: int
    in_features: int
    pattern: str
    density: int
    dtype: str


def add(command: argparse.ArgumentParser) -> None:
    """The arguments."""
    command.add_argument("model", help=f"a folder, dense or compressed, or a bundled model: {', '.join(BUNDLED)}")
    command.add_argument("--explain", action="store_true", help="every candidate's time, and why others were left out")
    command.add_argument(
        "--no-tune", action="store_true", help="measure nothing: show what is chosen from earlier measurements"
    )
    command.add_argument("--again", action="store_true", help="measure also what was measured before")
    command.add_argument(
        "--m", default="1,4,16,128,512", help="tokens at once, each counted as the next power of two (%(default)s)"
    )
    command.add_argument(
        "--sparsity", help="take dense layers as if they were pruned to n:m or a fraction (2:4 if all layers are dense)"
    )
    command.add_argument(
        "--dtype", type=checks.dtype, default="auto", choices=("auto", *DTYPES), help="default: as stored"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda when there is one)")
    command.add_argument("--seconds", type=float, default=1.0, help="for each shape and m (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    command.add_argument("--quiet", action="store_true", help="no progress, only the result")


def run(arguments: argparse.Namespace) -> None:
    """Read the shapes, measure, print what is chosen."""
    if arguments.again and arguments.no_tune:
        raise UsageError("--again measures anew and --no-tune measures nothing; leave one of them out")
    tokens = _tokens(arguments.m)
    checks.seconds(arguments.seconds)
    device = str(checks.device(arguments.device))
    kinds = layer_kinds(_folder(arguments.model), arguments.sparsity, arguments.dtype)
    problems = {kind: [_problem(kind, m, device) for m in tokens] for kind in kinds}
    flat = [problem for group in problems.values() for problem in group]
    silent = arguments.quiet or arguments.no_tune
    with (
        dispatch.frozen() if arguments.no_tune else nullcontext(),
        tqdm(total=len(flat), unit="problem", file=sys.stderr, disable=silent) as bar,
    ):
        show = lambda done, _: bar.update(done - bar.n)  # noqa: E731
        dispatch.tune(flat, seconds=arguments.seconds, again=arguments.again, progress=show)
    explained = {
        kind: [dispatch.explain(problem, dispatch.choose_layout(group[0])) for problem in group]
        for kind, group in problems.items()
    }
    print(f"{arguments.model}: {_setting(flat[0])}")
    if arguments.explain:
        print(f"\n{_explanation(kinds, explained)}")
    else:
        print(_choices(kinds, explained))
    if arguments.json:
        write_text_atomic(arguments.json, to_json(_content(arguments.model, flat[0], kinds, explained)))


def layer_kinds(folder: Path, sparsity: str | None = None, dtype: str = "auto") -> Counter[LayerKind]:
    """The linears of a folder's decoder blocks: every kind once, with how many layers are of it. Loads no model.

    Args:
        folder: dense (:func:`inspect_folder`) or compressed (``docs/format.md``).
        sparsity: what layers that are dense are taken for; None leaves them dense, unless all are: then 2:4.
        dtype: a name of ``DTYPES``, or ``"auto"`` for the stored type.

    Raises:
        ModelError: there are no such layers.
        UsageError: ``sparsity`` is given and no layer is dense.
    """
    kinds = _kinds(folder)
    if not kinds:
        raise ModelError(f"{folder} has no linear layers in decoder blocks of a floating type; give another model")
    if sparsity is None and all(kind.pattern == DENSE for kind in kinds):
        sparsity = "2:4"
    assumed = None if sparsity is None else Pattern.parse(sparsity)
    if assumed is not None and not any(kind.pattern == DENSE for kind in kinds):
        raise UsageError(f"sparsity {sparsity!r} is for dense layers, but all of {folder} are sparse; leave it out")
    found: Counter[LayerKind] = Counter()
    for kind, count in kinds.items():
        changes: dict[str, Any] = {} if dtype == "auto" else {"dtype": dtype}
        if assumed is not None and kind.pattern == DENSE:
            pattern = str(assumed) if assumed.is_nm else UNSTRUCTURED
            changes |= {"pattern": pattern, "density": density_bucket(1 - assumed.ratio)}
        found[LayerKind(**{**asdict(kind), **changes})] += count
    return found


def _kinds(folder: Path) -> Counter[LayerKind]:
    kinds: Counter[LayerKind] = Counter()
    for layer in inspect_folder(folder)["layers"]:
        if len(layer["shape"]) != 2 or layer["dtype"] not in _STORED:
            continue
        rows, columns = layer["shape"] if layer["input_dim"] == 1 else layer["shape"][::-1]
        dtype, density = _STORED[layer["dtype"]], 1 - layer["sparsity"]
        forms = [name for name in NM_PATTERNS if name in layer["patterns"]]
        if layer["sparsity"] >= MIN_SPARSITY:
            forms.append(UNSTRUCTURED)
        kept = round(density * rows * columns)
        sizes = {form: compressed_bytes(form, rows, columns, kept, DTYPES[dtype].itemsize) for form in forms}
        pattern = layer.get("stored") or min(sizes, key=sizes.__getitem__, default=DENSE)
        if pattern != UNSTRUCTURED:
            density = 1.0 if pattern == DENSE else 1 - Pattern.parse(pattern).ratio
        kinds[LayerKind(rows, columns, pattern, density_bucket(density), dtype)] += 1
    return kinds


def _folder(model: str) -> Path:
    if model in BUNDLED:
        return bundled_folder(model)
    folder = Path(model).expanduser()
    if not model.strip() or not folder.is_dir():
        raise ModelError(f"there is no folder {model!r}; give one, or a bundled model ({', '.join(BUNDLED)})")
    return folder


def _tokens(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--m {text!r} is not a list of token counts: give numbers from 1, such as 1,16,512")
    return sorted({int(part) for part in parts})


def _problem(kind: LayerKind, tokens: int, device: str) -> Problem:
    return dispatch.problem_for(
        kind.out_features, kind.in_features, kind.pattern, tokens, DTYPES[kind.dtype], device, kind.density / 100
    )


def _setting(problem: Problem) -> str:
    found = fingerprint(problem.device)
    threads = f", {problem.threads} thread{'s' * (problem.threads > 1)}" if problem.threads else ""
    return f"{found['device']}{threads}, torch {found['torch']}"


def _title(kind: LayerKind, count: int, group: list[dispatch.Explanation]) -> str:
    density = f" {kind.density} %" if kind.pattern == UNSTRUCTURED else ""
    held = "left dense" if group[0].layout == DENSE else f"held as {group[0].layout}"
    return (
        f"{kind.out_features}x{kind.in_features} {kind.pattern}{density} {kind.dtype}, "
        f"{count} layer{'s' * (count > 1)}, {held}"
    )


def _candidates(group: list[dispatch.Explanation]) -> str:
    """Microseconds by candidate and token count; ``*`` marks what runs."""
    names = list(dict.fromkeys(name for explained in group for name in explained.times_us))
    names += [explained.chosen for explained in group if explained.chosen not in names]
    rows = []
    for name in dict.fromkeys(names):
        cells = [name]
        for explained in group:
            time = explained.times_us.get(name)
            cells.append(("-" if time is None else f"{time:.1f}") + (" *" if name == explained.chosen else ""))
        rows.append(cells)
    return table(["µs", *(f"m {_as_measured(explained)}" for explained in group)], rows)


def _left_out(group: list[dispatch.Explanation]) -> list[str]:
    """One line for each candidate and reason, sorted, with the token counts it is for unless it is for all."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for explained in group:
        for name, reason in explained.left_out.items():
            reasons.setdefault((name, reason), []).append(explained.problem.tokens)
    lines = []
    for (name, reason), tokens in sorted(reasons.items()):
        where = "" if len(tokens) == len(group) else f" at m {', '.join(map(str, tokens))}"
        lines.append(f"  {name}{where}: {reason}")
    return lines


def _explanation(kinds: Counter[LayerKind], explained: dict[LayerKind, list[dispatch.Explanation]]) -> str:
    """A table for every kind of layer, and below it what was left out; last, once, what was left out everywhere."""
    lines = {kind: _left_out(group) for kind, group in explained.items()}
    everywhere = set.intersection(*map(set, lines.values()))
    parts = []
    for kind, group in explained.items():
        own = [line for line in lines[kind] if line not in everywhere]
        parts.append(
            "\n".join([_title(kind, kinds[kind], group), _candidates(group), *(["left out:", *own] if own else [])])
        )
    if everywhere:
        which = "for every layer" if len(kinds) > 1 else ""
        parts.append("\n".join([f"left out {which}".rstrip() + ":", *sorted(everywhere)]))
    return "\n\n".join(parts)


def _as_measured(explained: dispatch.Explanation) -> str:
    """The token count, and that of the measurement which stands for it where that is another."""
    wanted, found = explained.problem.tokens, explained.measured_tokens
    return f"{wanted}" + (f" (as m {found})" if found not in (None, wanted) else "")


def _choices(kinds: Counter[LayerKind], explained: dict[LayerKind, list[dispatch.Explanation]]) -> str:
    rows = []
    for kind, group in explained.items():
        for one in group:
            chosen, dense = one.times_us.get(one.chosen), one.times_us.get(DENSE)
            rows.append(
                [
                    f"{kind.out_features}x{kind.in_features}",
                    kind.pattern if kind.pattern != UNSTRUCTURED else f"{kind.density} % kept",
                    kind.dtype,
                    kinds[kind],
                    _as_measured(one),
                    one.layout,
                    one.chosen,
                    "-" if chosen is None else f"{chosen:.1f}",
                    "-" if dense is None else f"{dense:.1f}",
                    "-" if chosen is None or dense is None else f"{dense / chosen:.2f}",
                ]
            )
    headers = ["shape", "pattern", "type", "layers", "m", "held as", "runs", "µs", "dense µs", "× dense"]
    return table(headers, rows)


def _content(
    model: str,
    first: Problem,
    kinds: Counter[LayerKind],
    explained: dict[LayerKind, list[dispatch.Explanation]],
) -> dict[str, Any]:
    versions = fingerprint(first.device)
    rows = [
        {
            "n": kind.out_features,
            "k": kind.in_features,
            "m": one.problem.tokens,
            "pattern": kind.pattern,
            "density": kind.density / 100,
            "dtype": kind.dtype,
            "layers": kinds[kind],
            "layout": one.layout,
            "chosen": one.chosen,
            "measured_m": one.measured_tokens,
            "times_us": dict(one.times_us),
            "left_out": dict(one.left_out),
        }
        for kind, group in explained.items()
        for one in group
    ]
    device = versions.pop("device")
    return {"model": model, "device": device, "threads": first.threads, "versions": versions, "problems": rows}
