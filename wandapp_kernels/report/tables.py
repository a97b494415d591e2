"""Tables in plain text and Markdown, and how numbers are written in them."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

NOTHING = "–"

# Metrics of lm-eval that lie between 0 and 1.
_SHARES = ("acc", "acc_norm", "exact_match", "f1")

_NUMERIC = re.compile(r"[-+]?(∞|[\d.][^:×]*)")


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], markdown: bool = False) -> str:
    """An aligned table, without a final newline; columns of numbers after the first are set to the right.

    Args:
        headers: one per column.
        rows: as many cells each; None becomes "–", line breaks become spaces.
        markdown: GitHub's pipes instead of plain text with a rule under the headers.

    Raises:
        ValueError: a row has more or fewer cells than there are headers.
    """
    head = [_cell(header, markdown) for header in headers]
    body = [[_cell(value, markdown) for value in row] for row in rows]
    if any(len(row) != len(head) for row in body):
        raise ValueError(f"every row needs {len(head)} cells")
    widths = [max(3, *(width(row[i]) for row in (head, *body))) for i in range(len(head))]
    right = [i > 0 and _is_numeric([row[i] for row in body]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for cell, size, to_right in zip(cells, widths, right, strict=True):
            gap = " " * (size - width(cell))
            padded.append(gap + cell if to_right else cell + gap)
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    if markdown:
        rule = [
            "-" * (size - 1) + ":" if to_right else "-" * size for size, to_right in zip(widths, right, strict=True)
        ]
        return "\n".join([line(head), f"| {' | '.join(rule)} |", *map(line, body)])
    return "\n".join([line(head), "  ".join("─" * size for size in widths), *map(line, body)])


def width(text: str) -> int:
    """Columns ``text`` takes in a terminal: two for wide East Asian characters, none for marks and controls."""
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me", "Cf", "Cc")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def _cell(value: object, markdown: bool) -> str:
    text = NOTHING if value is None else " ".join(str(value).split())
    return re.sub(r"([\\|*`<])", r"\\\1", text) if markdown else text


def _is_numeric(cells: Sequence[str]) -> bool:
    filled = [cell for cell in cells if cell not in ("", NOTHING)]
    return bool(filled) and all(_NUMERIC.fullmatch(cell) for cell in filled)


# Numbers


def number(value: float | None) -> str:
    """Two decimals below 100, three significant digits elsewhere: 15.40, 123, 1,230, 1.23e+07, 0.00321."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size >= 999_500 or 0 < size < 0.0001:
        return f"{value:.2e}"
    if size >= 99.995:
        return f"{float(f'{value:.3g}'):,.0f}"
    if size >= 0.1 or size == 0:
        return f"{value:.2f}"
    return f"{value:.3g}"


def percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.2f} %"


def human_bytes(count: float | None) -> str:
    """Decimal units, as disks are sold: 1.23 GB."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if abs(count) < 999.5 else f"{count:,.0f} TB"


def human_seconds(seconds: float | None) -> str:
    """0.42 s, 12.3 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


# What `wandapp compare`, `wandapp eval` and `wandapp inspect` found


def perplexities(entry: dict[str, Any]) -> dict[str, float | None]:
    """Text -> perplexity of the dense model or of a method; a single number belongs to the text ``""``."""
    found = entry.get("perplexities") or entry.get("perplexity")
    return dict(found) if isinstance(found, dict) else {"": found}


def task_scores(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> ``{"metric", "value", "standard_error", …}`` of the dense model or of a method; empty without tasks."""
    return dict(entry.get("tasks") or {})


def mean_score(scores: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The unweighted mean of several tasks, as in the literature's tables; None where their metrics differ."""
    metrics = {score["metric"] for score in scores.values()}
    if len(scores) < 2 or len(metrics) > 1 or any(score["value"] is None for score in scores.values()):
        return None
    value = sum(score["value"] for score in scores.values()) / len(scores)
    return {"metric": metrics.pop(), "value": value, "standard_error": None}


def is_share(metric: str) -> bool:
    """Whether a metric of lm-eval lies between 0 and 1 and is read in per cent."""
    return metric.partition(",")[0] in _SHARES


def score_text(score: dict[str, Any] | None) -> str:
    """A score and its standard error, in per cent where it is a share: 65.20 ± 0.98."""
    if score is None or score["value"] is None:
        return NOTHING
    scale = 100 if is_share(score["metric"]) else 1
    error = score.get("standard_error")
    return number(scale * score["value"]) + ("" if error is None else f" ± {number(scale * error)}")


def scored_columns(report: dict[str, Any]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """A heading for every task, and for their mean, with the scores of the dense model and of each method."""
    entries = [report["dense"], *report["methods"]]
    found = [task_scores(entry) for entry in entries]
    columns: list[tuple[str, list[dict[str, Any] | None]]] = [
        (_score_heading(task, score["metric"]), [scores.get(task) for scores in found])
        for task, score in found[0].items()
    ]
    mean = mean_score(found[0])
    if mean is not None:
        same = [mean_score(scores) if scores.keys() == found[0].keys() else None for scores in found]
        columns.append((_score_heading("mean", mean["metric"]), same))
    return columns


def _score_heading(task: str, metric: str) -> str:
    return f"{task} {metric}" + (", %" if is_share(metric) else "")


def method_labels(report: dict[str, Any]) -> list[str]:
    """A different name for every method of a comparison, with its pattern where not all have the same."""
    methods = report["methods"]
    several = len({entry.get("sparsity") for entry in methods}) > 1
    labels: list[str] = []
    for entry in methods:
        name = f"{entry['method']} {entry.get('sparsity')}" if several else str(entry["method"])
        label, count = name, 1
        while label in labels:
            count += 1
            label = f"{name} ({count})"
        labels.append(label)
    return labels


def comparison_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of a comparison: the dense model first, the methods in the order they were run.

    "× dense" is the perplexity on the first text over the dense model's on the same text.
    """
    dense = perplexities(report["dense"])
    texts = list(dense)
    headers = ["method", "pattern", "zeros", *(f"perplexity {text}".strip() for text in texts)]
    scored = scored_columns(report)
    headers += ["× dense", *(heading for heading, _ in scored), "time", "peak memory"]
    rows = [_comparison_row("dense", report["dense"], dense, dense, [scores[0] for _, scores in scored])]
    for position, entry in enumerate(report["methods"], start=1):
        found = perplexities(entry)
        if set(found) == {""}:
            found = {texts[0]: found[""]}
        here = [scores[position] for _, scores in scored]
        rows.append(_comparison_row(str(entry["method"]), entry, found, dense, here))
    return headers, rows


def comparison_table(report: dict[str, Any], markdown: bool = False) -> str:
    """The table of a comparison as `wandapp compare` prints it."""
    return table(*comparison_rows(report), markdown=markdown)


def _comparison_row(
    name: str,
    entry: dict[str, Any],
    found: dict[str, float | None],
    dense: dict[str, float | None],
    scores: Sequence[dict[str, Any] | None],
) -> list[str]:
    first = next(iter(dense))
    here, there = found.get(first), dense[first]
    ratio = here / there if here is not None and there and math.isfinite(there) else None
    sparsity = entry.get("sparsity")
    return [
        name,
        NOTHING if sparsity is None else str(sparsity),
        percent(entry.get("achieved_sparsity")),
        *(number(found.get(text)) for text in dense),
        number(ratio),
        *map(score_text, scores),
        human_seconds(entry.get("seconds")),
        human_bytes(entry.get("peak_memory_bytes")),
    ]


def format_inspection(result: dict[str, Any], every_layer: bool = False, markdown: bool = False) -> str:
    """What :func:`~wandapp_kernels.checkpoint.inspect.inspect_folder` found, for reading.

    Layers that differ only in their block number share a row, unless ``every_layer``.
    """
    totals = result["totals"]
    written = result["written_by"]
    if written is None:
        origin = "no wandapp.json"
    else:
        versions = written["versions"] if isinstance(written["versions"], dict) else {}
        parts = [
            written["method"],
            written["pattern"],
            None if written["seed"] is None else f"seed {written['seed']}",
            "fine-tuned" if written["finetuned"] else None,
            *(f"{name} {version}" for name, version in versions.items()),
        ]
        origin = ", ".join(str(part) for part in parts if part is not None) or "a wandapp.json that does not say"
    facts = [
        ("folder", result["folder"]),
        ("model type", result["model_type"]),
        ("written by", origin),
        ("parameters", f"{totals['parameters']:,}"),
        ("in block linears", f"{totals['layer_parameters']:,}, {percent(totals['layer_sparsity'])} zeros"),
        ("on disk", f"{human_bytes(totals['bytes_on_disk'])} in {len(result['files'])} file(s)"),
        ("dense", human_bytes(totals["dense_bytes"])),
        ("would take compressed", human_bytes(totals["would_take_bytes"])),
    ]
    headers = ["layer", "count", "shape", "type", "zeros", "patterns", "rows equal", "bytes", "would take"]
    parts = [table(["", ""], facts, markdown) if markdown else _facts(facts)]
    groups = _groups(result["layers"], every_layer)
    if groups:
        parts.append(table(headers, [_inspection_row(name, layers) for name, layers in groups], markdown))
    if result["problems"]:
        parts.append("\n".join(["Problems:", *(f"- {problem}" for problem in result["problems"])]))
    if result["unchecked"]:
        names = result["unchecked"]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        parts.append(f"Not checked, because stored under another name: {', '.join(names[:3])}{more}")
    return "\n\n".join(parts)


def _facts(facts: Sequence[tuple[str, object]]) -> str:
    size = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{size}}  {_cell(value, False)}" for name, value in facts)


def _groups(layers: Sequence[dict[str, Any]], every_layer: bool) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for layer in layers:
        name = layer["name"].removesuffix(".weight")
        if not every_layer:
            name = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
        key = (name, str(layer["shape"]), layer["dtype"], str(layer["patterns"]))
        groups.setdefault(key, []).append(layer)
    return [(key[0], members) for key, members in groups.items()]


def _inspection_row(name: str, layers: Sequence[dict[str, Any]]) -> list[object]:
    low, high = min(layer["sparsity"] for layer in layers), max(layer["sparsity"] for layer in layers)
    return [
        name,
        len(layers),
        "×".join(map(str, layers[0]["shape"])),
        layers[0]["dtype"],
        percent(low) if percent(low) == percent(high) else f"{100 * low:.2f}–{percent(high)}",
        " ".join(layers[0]["patterns"]) or None,
        "yes" if all(layer["row_uniform"] for layer in layers) else "no",
        human_bytes(sum(layer["bytes"] for layer in layers)),
        human_bytes(sum(layer["would_take"]["smallest"] for layer in layers)),
    ]
