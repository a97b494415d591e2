"""Tables of the committed speed figures: linears, whole models, and llm-compressor beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wandapp_kernels.report.runtime import memory_rows, sentences, speed_rows
from wandapp_kernels.report.tables import number, table

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured yet"


def linear_table(folder: Path = RESULTS / "linear") -> str:
    """What dispatch chose on every device, against torch and the best dense kernel. Losing rows stay."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        parts += [table(*_linear_rows(result["rows"]), markdown=True), _linear_conditions(result)]
    return "\n\n".join(parts) or NOT_MEASURED


def linear_summary(folder: Path = RESULTS / "linear") -> str:
    """The same in few rows: every device and sparsity on the first shape measured, one column for each token count."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not results:
        return NOT_MEASURED
    tokens = sorted({row["m"] for result in results for row in result["rows"]})
    rows: list[list[object]] = []
    for result in results:
        shape = (result["rows"][0]["n"], result["rows"][0]["k"])
        mine = [row for row in result["rows"] if (row["n"], row["k"]) == shape]
        for sparsity in dict.fromkeys(row["sparsity"] for row in mine):
            found = {row["m"]: row for row in mine if row["sparsity"] == sparsity}
            cells = [f"{found[m]['speedup_best_dense']:.2f}" if m in found else None for m in tokens]
            torch_1 = f"{found[1]['speedup_torch']:.2f}" if 1 in found else None
            rows.append([f"{_kernels(result)}, {shape[0]} × {shape[1]}", _sparsity(sparsity), *cells, torch_1])
    headers = ["CPU, N × K", "sparsity", *(f"M = {m}" for m in tokens), "× torch, M = 1"]
    conditions = "; ".join(
        f"{result['device']}, {result['threads']} threads, torch {result['versions']['torch']}, {result['date']}"
        for result in results
    )
    return f"{table(headers, rows, markdown=True)}\n\n{conditions}."


def _kernels(result: dict[str, Any]) -> str:
    """``AMD EPYC (avx2)``: a device name without its trade marks, and the kernels used."""
    name = str(result["device"]).replace("(R)", "").replace("(TM)", "").removesuffix(" Processor")
    return f"{name} ({result['cpu_kernels']})" if result.get("cpu_kernels") else name


def _sparsity(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.0%}"


def _linear_rows(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    headers = ["N × K", "sparsity", "M", "backend", "µs", "GB/s", "× torch", "× best dense", "ceiling"]
    return headers, [
        [
            f"{row['n']} × {row['k']}",
            _sparsity(row["sparsity"]),
            str(row["m"]),
            row["backend"],
            f"{row['us']:,.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['speedup_torch']:.2f}",
            f"{row['speedup_best_dense']:.2f}",
            f"{row['ceiling']:.2f}" if row["m"] == 1 else None,
        ]
        for row in rows
    ]


def _linear_conditions(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = f", {result['threads']} threads" if result["threads"] else ""
    kernels = f", kernels {result['cpu_kernels']}" if result.get("cpu_kernels") else ""
    return (
        f"{result['device']}{threads}{kernels}, {result['rows'][0]['dtype']}; medians, all candidates in turn, "
        f"random weights (seed 0) colder than the last-level cache; a copy reaches {result['copy_gb_per_s']:g} GB/s; "
        f"{versions}; {result['date']}. The ceiling is dense by compressed bytes; above it, dense does not saturate "
        "memory."
    )


def model_table(name: str, folder: Path = RESULTS / "model") -> str:
    """Memory and speed of one model, dense and sparse."""
    path = folder / f"{name}.json"
    if not path.exists():
        return NOT_MEASURED
    result = json.loads(path.read_text(encoding="utf-8"))
    shown = [table(*rows, markdown=True) for rows in (memory_rows(result), speed_rows(result))]
    return "\n\n".join([*shown, " ".join(sentences(result))])


def peer_table(path: Path = RESULTS / "llm_compressor.json") -> str:
    """llm-compressor's figures beside ours on the same tokens, of the same seed."""
    from bench.quality import MODEL
    from bench.tables import load_runs

    if not path.exists():
        return NOT_MEASURED
    peer = json.loads(path.read_text(encoding="utf-8"))
    run = next((run for run in load_runs("2:4") if run["text_hash"] == peer["text_hash"]), None)
    if run is None:
        return NOT_MEASURED
    ours = {entry["method"]: entry for entry in run["methods"]}
    texts = list(peer["methods"][0]["perplexities"])
    headers = [
        "method",
        *(f"{text}, {whose}" for text in texts for whose in ("ours", "theirs")),
        "s, ours",
        "s, theirs",
    ]
    rows: list[list[object]] = []
    for entry in peer["methods"]:
        mine = ours[entry["method"]]
        values = [number(each["perplexities"][text]) for text in texts for each in (mine, entry)]
        spent = [f"{each['cpu_seconds']:.0f}" if "cpu_seconds" in each else None for each in (mine, entry)]
        rows.append([entry["method"], *values, *spent])
    versions = ", ".join(f"{name} {version}" for name, version in peer["methods"][0]["versions"].items())
    shown = table(headers, rows, markdown=True)
    return (
        f"{shown}\n\n{MODEL} to {peer['sparsity']}, calibration text "
        f"{peer['text_hash']}; CPU seconds of one thread; theirs: {versions}; {peer['device']}."
    )
