"""Write the tables of README.md and docs/ from the committed results: ``python -m bench.tables``.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->`` and is never typed by hand.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import budget, development, finetuning, speed_tables
from bench.h100 import tables as h100
from bench.quality import MODEL, PLANS, RESULTS, SAMPLES, SEEDS, SEQLEN
from wandapp_kernels.report.tables import human_bytes, number, table

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/methods.md", "docs/kernels.md", "docs/cpu.md", "docs/runtime.md")
MARKERS = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load_runs(pattern: str) -> list[dict[str, Any]]:
    """The comparisons of one pattern, one per seed."""
    stem = pattern.replace(":", "of").replace("%", "pct")
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{MODEL}-{stem}-seed*.json"))]


def quality_table(pattern: str) -> str:
    """Mean and spread over seeds of every method at one pattern, and what one run took."""
    runs = load_runs(pattern)
    if not runs:
        return "not measured yet"
    texts = list(runs[0]["dense"]["perplexities"])
    headers = ["method", *(f"perplexity, {text}" for text in texts), "× SparseGPT", "seeds", "seconds", "peak memory"]
    dense = [number(runs[0]["dense"]["perplexities"][text]) for text in texts]
    rows = [["dense", *dense, None, None, None, None]]
    rows += [_row(method, runs, texts) for method in PLANS[pattern].of_seed(SEEDS[0]) if _entries(runs, method)]
    return f"{table(headers, rows, markdown=True)}\n\n{_conditions(runs)}"


def _entries(runs: Sequence[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    return [entry for run in runs for entry in run["methods"] if entry["method"] == method]


def _row(method: str, runs: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[str | None]:
    entries = _entries(runs, method)
    cells: list[str | None] = [method]
    for text in texts:
        values = [entry["perplexities"][text] for entry in entries]
        spread = f" ± {number((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
        cells.append(f"{number(statistics.mean(values))}{spread}")
    pairs = [(_entries([run], method), _entries([run], "sparsegpt")) for run in runs]
    ratios = [ours[0]["perplexity"] / theirs[0]["perplexity"] for ours, theirs in pairs if ours and theirs]
    clock = _clock(runs)
    seconds = sorted({f"{entry[clock]:.0f}" for entry in entries if clock in entry}, key=int)
    peak = max(entry["peak_memory_bytes"] for entry in entries)
    ratio = f"{statistics.mean(ratios):.2f}" if ratios else None
    return [*cells, ratio, str(len(entries)), "–".join(dict.fromkeys((seconds[0], seconds[-1]))), human_bytes(peak)]


def _clock(runs: Sequence[dict[str, Any]]) -> str:
    """CPU seconds, which other work on the machine hardly moves, where a run of every method recorded them."""
    entries = [entry for run in runs for entry in run["methods"]]
    recorded = {entry["method"] for entry in entries if "cpu_seconds" in entry}
    return "cpu_seconds" if recorded == {entry["method"] for entry in entries} else "seconds"


def _conditions(runs: Sequence[dict[str, Any]]) -> str:
    run = runs[0]
    calibration, evaluation = run["calibration"], run["evaluation"]
    hashes = ", ".join(f"{t['text']} {t['text_hash']} ({t['tokens']} tokens)" for t in evaluation["texts"])
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    clock = "CPU seconds" if _clock(runs) == "cpu_seconds" else "seconds on the clock of a busy machine"
    if any(_clock(runs) not in entry for other in runs for entry in other["methods"]):
        clock += " where they were recorded"
    return (
        f"{run['model']}, fp32, {run['device']}; calibration {calibration['source']}, "
        f"{calibration['samples']} × {calibration['seqlen']} tokens, seeds 0, 1, … (mean ± half the range; "
        f"× SparseGPT on the first text, seed by seed; {clock}, fastest and slowest seed); evaluation windows of "
        f"{evaluation['seqlen']} tokens, text hashes {hashes}; {versions}."
    )


def development_table() -> str:
    """The variants ``best`` was chosen from."""
    rows = json.loads(development.RESULTS.read_text())
    conditions = (
        f"{MODEL}, first {development.BLOCKS} blocks to 2:4, calibration wiki, {SAMPLES} × {SEQLEN} tokens, seed 0; "
        f"{development.TOKENS} tokens of the development split in windows of {development.WINDOW}."
    )
    shown = [[row["variant"], number(row["perplexity"])] for row in rows]
    return f"{table(['variant', 'perplexity'], shown, markdown=True)}\n\n{conditions}"


def any_table(name: str) -> str:
    """The table a marker names: one of those below, ``model:NAME``, or a pattern."""
    named = {
        "development": development_table,
        "budget": budget.saved_table,
        "finetuning": finetuning.finetuning_table,
        "h100": h100.readme_table,
        "h100:all": h100.docs_table,
        "linear": speed_tables.linear_table,
        "linear:summary": speed_tables.linear_summary,
        "llm-compressor": speed_tables.peer_table,
    }
    if name.startswith("model:"):
        return speed_tables.model_table(name.removeprefix("model:"))
    return named[name]() if name in named else quality_table(name)


def fill(text: str, tables: Callable[[str], str]) -> str:
    """Replace what stands between every pair of markers in ``text``."""
    return MARKERS.sub(lambda found: f"{found[1]}{tables(found[2])}\n{found[3]}", text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text(encoding="utf-8"), any_table), encoding="utf-8")


if __name__ == "__main__":
    main()
