"""Markdown tables and plots from the JSON of a run; README's table is one of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wandapp_kernels.report.charts import line_chart
from wandapp_kernels.report.tables import human_bytes, table

RESULTS = Path(__file__).parents[1] / "results" / "h100" / "results.json"
NOT_MEASURED = "not measured yet"
_STYLE = (
    "<style>text{font:12px sans-serif;fill:#333}.grid{stroke:#ddd}.axis{stroke:#333}.line{fill:none;stroke-width:2}"
    + "".join(
        f"path.s{i}{{stroke:{colour}}}circle.s{i}{{fill:{colour}}}"
        for i, colour in enumerate(
            ("#0b62a4", "#d1495b", "#2e7d32", "#8e5ea2", "#e08e0b", "#00838f", "#6d4c41", "#546e7a")
        )
    )
    + "</style>"
)


def micro_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a weight and number of tokens; a column for every backend, in microseconds and times dense."""
    if not rows:
        return NOT_MEASURED
    backends = list(dict.fromkeys(row["backend"] for row in rows if row["backend"] != "dense"))
    dense = {(tuple(row["shape"]), row["tokens"]): row for row in rows if row["backend"] == "dense"}
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["backend"] != "dense":
            key = (row["name"], tuple(row["shape"]), row["pattern"], row["density"], row["tokens"])
            cells.setdefault(key, {})[row["backend"]] = row
    lines = []
    for (name, shape, pattern, density, tokens), found in cells.items():
        base = dense[shape, tokens]
        lines.append(
            [
                f"{name}, {shape[0]} × {shape[1]}",
                pattern if pattern == "2:4" else f"{density} % kept",
                str(tokens),
                f"{base['us']:.1f}{_host(base)} ({base['share_of_bandwidth']:.0%})",
                *(_micro_cell(found.get(backend)) for backend in backends),
            ]
        )
    return table(["weight", "pattern", "M", "dense", *backends], lines, markdown=True)


def _micro_cell(row: dict[str, Any] | None) -> str | None:
    if row is None:
        return None
    return f"{row['us']:.1f}{_host(row)}, {row['times_dense']:.2f}× ({row['share_of_bandwidth']:.0%})"


def _host(row: dict[str, Any]) -> str:
    """A mark where no CUDA graph was captured: the host's time is part of the row's."""
    return "" if row["graph"] else "†"


def model_table(rows: Sequence[dict[str, Any]]) -> str:
    """Prefill and decode, a line a model, form, prompt and batch."""
    if not rows:
        return NOT_MEASURED
    headers = ["model", "form", "prompt", "batch", "prefill, ms", "decode step, ms", "issued by the host, ms"]
    headers += ["tokens/s", "weights", "peak"]
    lines = [
        [
            row["model"],
            row["form"],
            str(row["prompt"]),
            str(row["batch"]),
            f"{1e3 * row['prefill_seconds']:.1f}",
            f"{1e3 * row['decode_seconds']:.2f}{_host(row)}",
            f"{1e3 * row['eager_decode_seconds']:.1f}",
            f"{row['tokens_per_second']:.1f}",
            human_bytes(row["weight_bytes"]),
            human_bytes(row["peak_memory_bytes"]),
        ]
        for row in rows
    ]
    return table(headers, lines, markdown=True)


def pruning_table(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds of a block, the first apart (it compiles kernels), and what all blocks would take at the others' rate."""
    if not rows:
        return NOT_MEASURED
    found: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["model"], row["method"], row["pattern"], row["of_blocks"]), []).append(row)
    lines = []
    for (model, method, pattern, blocks), measured in found.items():
        later = statistics.median(row["seconds"] for row in measured[1:] or measured)
        lines.append(
            [
                model,
                method,
                pattern,
                " × ".join(str(size) for size in measured[0]["samples"]),
                f"{measured[0]['seconds']:.1f}",
                f"{later:.1f}",
                f"{(measured[0]['seconds'] + (blocks - 1) * later) / 60:.1f}",
                human_bytes(max(row["peak_memory_bytes"] for row in measured)),
            ]
        )
    headers = ["model's shapes", "method", "pattern", "tokens", "first block, s", "a block, s", "all blocks, min"]
    note = f"{len(rows) // len(found)} blocks of each were pruned; all blocks: calculated from these."
    return table([*headers, "peak"], lines, markdown=True) + "\n\n" + note


def plain_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as they are, a column a key."""
    if not rows:
        return NOT_MEASURED
    headers = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[_shown(row.get(key)) for key in headers] for row in rows]
    return table(headers, lines, markdown=True)


def _shown(value: Any) -> str | None:
    if value is None:
        return None
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def conditions(machine: dict[str, Any]) -> str:
    """The line that stands under every table."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['gpu']}, copy bandwidth measured {1e-12 * machine['bandwidth']:.2f} TB/s; linears and decode steps "
        "in CUDA graphs († could not be captured: the host's time is in it), prefill without; weights "
        f"rotated over copies of {machine['cache_multiple']} × the L2 cache, medians; in brackets the share of the "
        f"measured bandwidth; bfloat16, random weights; {versions}."
    )


def page(report: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    sections = report["sections"]
    parts = [f"# Measured on {report['machine']['gpu']}", conditions(report["machine"])]
    shown = {
        "micro": ("Linears, µs and × dense", micro_table),
        "pruning": ("Pruning", pruning_table),
        "generation": ("Models", model_table),
    }
    for name, section in sections.items():
        title, make = shown.get(name, (name.capitalize(), plain_table))
        parts += [f"## {title}", make(section["rows"])]
        if section["left_out"]:
            parts += ["Left out:", "\n".join(f"- {item['what']}: {item['why']}" for item in section["left_out"])]
    return "\n\n".join(parts) + "\n"


def plots(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """File name -> SVG: times dense over the number of tokens, one plot a weight and pattern."""
    found: dict[str, dict[str, list[tuple[str, float | None]]]] = {}
    for row in rows:
        if row["times_dense"] is not None:
            kind = row["pattern"].replace(":", "of") + f"-{row['density']}pct"
            plot = found.setdefault(f"{row['shape'][0]}x{row['shape'][1]}-{kind}.svg", {"dense": []})
            plot.setdefault(row["backend"], []).append((str(row["tokens"]), row["times_dense"]))
            if (str(row["tokens"]), 1.0) not in plot["dense"]:
                plot["dense"].append((str(row["tokens"]), 1.0))
    drawn = {}
    for name, series in found.items():
        svg = line_chart(f"{name.removesuffix('.svg')}: × dense", series, "tokens")
        drawn[name] = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
            "</title>", f"</title>{_STYLE}", 1
        )
    return drawn


SHOWN_TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048, 4096)


def best_table(rows: Sequence[dict[str, Any]], shown_tokens: Sequence[int] = SHOWN_TOKENS) -> str:
    """One line a weight: for each number of tokens the fastest sparse backend, times dense."""
    if not rows:
        return NOT_MEASURED
    best: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["backend"] == "dense":
            continue
        line = best.setdefault((row["name"], tuple(row["shape"]), row["pattern"], row["density"]), {})
        known = line.get(row["tokens"])
        if known is None or row["us"] < known["us"]:
            line[row["tokens"]] = row
    lines = []
    for (name, shape, pattern, density), line in best.items():
        kind = pattern if pattern == "2:4" else f"{density} % kept"
        cells = [_best_cell(line.get(tokens)) for tokens in shown_tokens]
        lines.append([f"{name}, {shape[0]} × {shape[1]}", kind, *cells])
    return table(["weight", "pattern", *(f"M = {tokens}" for tokens in shown_tokens)], lines, markdown=True)


def _best_cell(row: dict[str, Any] | None) -> str | None:
    return None if row is None else f"{row['times_dense']:.2f}× {row['backend']}{_host(row)}"


README_WEIGHTS = ("LLaMA-3-8B gate/up", "LLaMA q/k/v/o")
README_TOKENS = (1, 8, 16, 64, 512, 4096)
README_DENSITIES = (50, 30)
README_MODEL, README_PROMPT = "LLaMA-3-8B", 128


def whole_sentence() -> str:
    """What ``bench.h100.whole`` measured, if it did."""
    path = RESULTS.parent / "whole.json"
    if not path.exists():
        return NOT_MEASURED
    found = json.loads(path.read_text(encoding="utf-8"))
    samples, tokens = found["samples"]
    return (
        f"A whole model of {found['model']}'s shapes ({found['blocks']} blocks, random weights) pruned to "
        f"{found['pattern']} with {found['method']} on {samples} × {tokens} tokens: {found['seconds']:.0f} s on one "
        f"{found['gpu']}."
    )


def _sections() -> dict[str, Any] | None:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else None


def readme_table() -> str:
    """The most important linears, one model and the pruning of the committed run, or that there is none."""
    if (report := _sections()) is None:
        return NOT_MEASURED
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    micro = [
        row for row in rows.get("micro", []) if row["name"] in README_WEIGHTS and row["density"] in README_DENSITIES
    ]
    models = [
        row for row in rows.get("generation", []) if row["model"] == README_MODEL and row["prompt"] == README_PROMPT
    ]
    linears = best_table(micro, README_TOKENS)
    return "\n\n".join([linears, model_table(models), whole_sentence(), conditions(report["machine"])])


def docs_table() -> str:
    """Everything of the committed run but the single backends' times, which its table.md has."""
    if (report := _sections()) is None:
        return NOT_MEASURED
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    parts = [
        *(best_table(rows.get("micro", [])), "Gate and up with SiLU and product:"),
        *(plain_table(rows.get("swiglu", [])), "Scoring, masking, compressing:"),
        *(plain_table(rows.get("scoring", [])), "Models:", model_table(rows.get("generation", []))),
        *("Pruning:", pruning_table(rows.get("pruning", [])), whole_sentence(), conditions(report["machine"])),
    ]
    return "\n\n".join(parts)
