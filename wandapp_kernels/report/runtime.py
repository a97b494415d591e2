"""Tables of what ``wandapp bench model`` found, and its section in the report of a comparison."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.files import read_json
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.report.tables import human_bytes, human_seconds, number, table

Table = tuple[list[str], list[list[object]]]


def memory_rows(result: dict[str, Any]) -> Table:
    """One row for each form of the model: disk, weights in memory, and what its process held."""
    headers = ["model", "weights on disk", "in memory", "resident", "peak loading", "peak generating"]
    rows: list[list[object]] = []
    for name, used in result["memory"].items():
        sizes = [used["weights"], used["resident"], used["load_peak"], used["generate_peak"]]
        rows.append([name, human_bytes(result["disk"][name.split()[0]]), *map(human_bytes, sizes)])
    if not rows:
        headers = headers[:2]
        rows = [[name, human_bytes(size)] for name, size in result["disk"].items()]
    return headers, rows


def speed_rows(result: dict[str, Any]) -> Table:
    """One row for each form, prompt length and batch size.

    Ratios of tokens/s are to the dense model of the same type, and to the fastest dense model of any type that was
    measured; the last column is that to the same type in CPU seconds.
    """
    headers = ["model", "prompt", "batch", "TTFT", "tokens/s", "tokens/CPU s"]
    headers += ["× dense, same type", "× fastest dense", "× same type, CPU s"]
    rates = {(row["name"], row["prompt"], row["batch"]): row["tokens_per_second"] for row in result["speed"]}
    cpu = {(row["name"], row["prompt"], row["batch"]): row["tokens_per_cpu_second"] for row in result["speed"]}
    rows: list[list[object]] = []
    for row in result["speed"]:
        kind, _, dtype = row["name"].partition(" ")
        place = row["prompt"], row["batch"]
        same = rates.get((f"dense {dtype}", *place))
        best = max((rate for (name, *at), rate in rates.items() if name.startswith("dense") and (*at,) == place))
        speed, cpu_speed = row["tokens_per_second"], row["tokens_per_cpu_second"]
        ratios = [_ratio(speed, same), _ratio(speed, best), _ratio(cpu_speed, cpu.get((f"dense {dtype}", *place)))]
        rows.append(
            [row["name"], *place, human_seconds(row["ttft"]), number(speed), number(cpu_speed)]
            + (ratios if kind == "sparse" else [None, ratios[1], None])
        )
    return headers, rows


def _ratio(value: float, base: float | None) -> str | None:
    return number(value / base) if base else None


def sentences(result: dict[str, Any]) -> list[str]:
    """What the tables do not show: layers, tokens, conditions."""
    layers = "; ".join(f"{name}: {what}" for name, what in result["layers"].items())
    tokens = ", ".join(
        f"{entry['same']} of {entry['of']} ({entry['dtype']}, prompt {entry['prompt']}, batch {entry['batch']})"
        for entry in result["same_tokens"]
    )
    memory = (
        "memory without that of Python and its libraries"
        if result.get("threads", 1)
        else "memory as torch allocated it"
    )
    return [
        f"Layers: {layers}.",
        f"Greedy tokens equal to those of the dense model of the same type, from the first on: {tokens}.",
        f"Medians of {result['rounds']} interleaved rounds of {result['new_tokens']} new tokens, dense is torch's own "
        f"product; CPU seconds are the process's, on all threads; {memory}; "
        f"{result['device']}, {result['date']}.",
    ]


def runtime_tables(result: dict[str, Any], markdown: bool = False) -> str:
    """Everything, for reading."""
    parts = [table(*memory_rows(result), markdown=markdown), table(*speed_rows(result), markdown=markdown)]
    return "\n\n".join([str(result["model"]), *parts, "\n".join(sentences(result))])


def runtime_section(result: dict[str, Any]) -> str:
    """HTML of the tables, with an ``h2``."""
    tables = "".join(_html_table(*rows) for rows in (memory_rows(result), speed_rows(result)))
    words = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>\n" for name, text in result.get("texts", {}).items()
    )
    texts = f'<table class="facts">\n<tbody>\n{words}</tbody>\n</table>\n' if words else ""
    notes = "".join(f'<p class="note">{escape(sentence)}</p>\n' for sentence in sentences(result))
    return f"<h2>Swapped: {escape(str(result['model']))} dense and sparse</h2>\n{tables}{texts}{notes}"


def add_to_report(folder: str | Path, result: dict[str, Any]) -> None:
    """Add the result to ``report.json`` and ``report.html`` of a comparison, as ``runtime``.

    Raises:
        CheckpointError: there is no readable report.json, or the files cannot be written.
    """
    from wandapp_kernels.report.page import render  # which shows the section above

    folder = Path(folder)
    report = {**read_json(folder / "report.json"), "runtime": result}
    html = render(json.loads(to_json(report)))
    write_text_atomic(folder / "report.json", to_json(report))
    write_text_atomic(folder / "report.html", html)


def _html_table(headers: list[str], rows: list[list[object]]) -> str:
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape('–' if cell is None else str(cell))}</td>" for cell in row)
        dense = ' class="dense"' if str(row[0]).startswith("dense") else ""
        lines.append(f"<tr{dense}>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>\n'
