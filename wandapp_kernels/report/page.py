"""The report of a comparison: one HTML page that needs nothing but itself, and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from wandapp_kernels.checkpoint.atomic import new_folder
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.report.charts import bar_chart, line_chart
from wandapp_kernels.report.runtime import runtime_section
from wandapp_kernels.report.tables import (
    NOTHING,
    comparison_rows,
    is_share,
    method_labels,
    number,
    perplexities,
    scored_columns,
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5c6670; --rule: #d9dee3; --paper: #ffffff; --band: #f4f6f8;
  --warn: #8a5300; --c0: #0068b5; --c1: #d1600a; --c2: #17805c; --c3: #a8458f; --c4: #6a57c9; --c5: #9a6b00;
  --c6: #c22f43; --c7: #50606e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9aa5af; --rule: #363d44; --paper: #15181c;
  --band: #1d2126; --warn: #f0b45a; --c0: #5eb0f2; --c1: #f39650; --c2: #4fc59b; --c3: #e08cca; --c4: #a99bf5;
  --c5: #d9b14a; --c6: #f27f8d; --c7: #9fb0be; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 52rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
.conditions, .note { color: var(--soft); margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .facts td { text-align: left; }
.facts td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.facts td:first-child { color: var(--soft); white-space: nowrap; }
tbody tr.dense { background: var(--band); }
.warnings li { color: var(--warn); }
code { font: .88em ui-monospace, "DejaVu Sans Mono", Menlo, monospace; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; margin: .5rem 0 1rem;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
svg .label { fill: var(--soft); } svg .value { fill: var(--ink); font-weight: 600; }
svg .axis { stroke: var(--soft); } svg .grid { stroke: var(--rule); }
svg .reference { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
"""
_SERIES = "".join(
    f"svg .s{i} {{ fill: var(--c{i}); }} svg .line.s{i} {{ fill: none; stroke: var(--c{i}); }}\n" for i in range(8)
)


def write_report(report: dict[str, Any], folder: str | Path, *, force: bool = False) -> None:
    """Write ``report.html`` and ``report.json`` into ``folder``, complete or not at all.

    Args:
        report: what a comparison found: ``model``, ``dense`` (``perplexity``: a number, or text -> number), ``methods``
            (``method``, ``sparsity``, ``perplexity``, ``perplexities``, ``seconds``, ``peak_memory_bytes``, ``blocks``
            with ``name`` and ``output_error``, ``warnings``), ``seed``, ``device``, ``versions``, ``calibration``,
            ``evaluation``, ``text_hash``, ``command`` and ``runtime`` (what ``wandapp bench model`` found); ``dense``
            and each method may have ``tasks`` (task -> ``metric``, ``value``, ``standard_error``). All but ``model``,
            ``dense`` and ``methods`` may be absent.
        folder: absent, empty, or (with ``force``) to be replaced.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with new_folder(folder, force=force) as partial:
        (partial / "report.html").write_text(render(report), encoding="utf-8")
        (partial / "report.json").write_text(to_json(report), encoding="utf-8")


def render(report: dict[str, Any]) -> str:
    """The page as one HTML document: no script, nothing loaded from elsewhere, every text escaped."""
    title = f"{report['model']}: pruning compared"
    sections = [
        f'<h1>{escape(title)}</h1>\n<p class="conditions">{escape(_conditions(report))}</p>',
        *_perplexity_charts(report),
        *_task_charts(report),
        _table(report),
        runtime_section(report["runtime"]) if report.get("runtime") else "",
        _error_chart(report),
        _warnings(report),
        _facts(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{_SERIES}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _conditions(report: dict[str, Any]) -> str:
    calibration = report.get("calibration") or {}
    patterns = list(dict.fromkeys(str(entry["sparsity"]) for entry in report["methods"] if entry.get("sparsity")))
    parts = [", ".join(patterns)]
    if calibration.get("samples") and calibration.get("seqlen"):
        source = f" of {calibration['source']}" if calibration.get("source") else ""
        parts.append(f"calibrated on {calibration['samples']} × {calibration['seqlen']} tokens{source}")
    if report.get("seed") is not None:
        parts.append(f"seed {report['seed']}")
    if report.get("device"):
        parts.append(str(report["device"]))
    return " · ".join(part for part in parts if part)


def _perplexity_charts(report: dict[str, Any]) -> Iterator[str]:
    dense = perplexities(report["dense"])
    for position, (text, base) in enumerate(dense.items()):
        values = {}
        for label, entry in zip(method_labels(report), report["methods"], strict=True):
            found = perplexities(entry)
            values[label] = found.get("") if set(found) == {""} and position == 0 else found.get(text)
        heading = f"Perplexity on {text}" if text else "Perplexity"
        chart = bar_chart(f"{heading}; dense {number(base)}", values, ("dense", base))
        yield f'<h2>{escape(heading)}</h2>\n<p class="note">Lower is better.</p>\n{chart}'


def _task_charts(report: dict[str, Any]) -> Iterator[str]:
    for heading, scores in scored_columns(report):
        dense, *others = [
            None
            if score is None or score["value"] is None
            else score["value"] * (100 if is_share(score["metric"]) else 1)
            for score in scores
        ]
        values = dict(zip(method_labels(report), others, strict=True))
        chart = bar_chart(f"{heading}; dense {number(dense)}", values, ("dense", dense))
        yield f"<h2>{escape(heading)}</h2>\n{chart}"


def _table(report: dict[str, Any]) -> str:
    headers, rows = comparison_rows(report)
    head = "".join(f'<th scope="col">{escape(header)}</th>' for header in headers)
    lines = []
    for position, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="dense">{cells}</tr>' if position == 0 else f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<h2>All numbers</h2>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def _error_chart(report: dict[str, Any]) -> str:
    series = {}
    for label, entry in zip(method_labels(report), report["methods"], strict=True):
        points = [(str(block.get("name")), block.get("output_error")) for block in entry.get("blocks") or ()]
        if any(error is not None for _, error in points):
            series[label] = points
    if not series:
        return ""
    return (
        "<h2>Error of every block's output</h2>\n"
        '<p class="note">Relative to the dense block, on the input the pruned blocks before it give.</p>\n'
        + line_chart("Relative output error of every decoder block, one line per method", series, "decoder block")
    )


def _warnings(report: dict[str, Any]) -> str:
    items = [
        f"<li><strong>{escape(label)}</strong>: {escape(str(warning))}</li>"
        for label, entry in zip(method_labels(report), report["methods"], strict=True)
        for warning in entry.get("warnings") or ()
    ]
    return '<h2>Warnings</h2>\n<ul class="warnings">\n' + "\n".join(items) + "\n</ul>" if items else ""


def _facts(report: dict[str, Any]) -> str:
    rows = []
    for name in ("model", "command", "seed", "device", "text_hash", "calibration", "evaluation", "versions"):
        for key, value in _flat(name, report.get(name)):
            shown = f"<code>{escape(value)}</code>" if key == "command" else escape(value)
            rows.append(f"<tr><td>{escape(key)}</td><td>{shown}</td></tr>")
    return '<h2>How this was measured</h2>\n<table class="facts">\n<tbody>\n' + "\n".join(rows) + "\n</tbody>\n</table>"


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name.replace('_', ' ')}: {key}" if name != "versions" else str(key), inner)
    elif isinstance(value, list | tuple):
        yield name.replace("_", " "), " ".join(map(str, value)) or NOTHING
    elif value is not None:
        yield name.replace("_", " "), str(value)
