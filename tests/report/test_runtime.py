"""The tables of ``wandapp bench model`` and their section in a report."""

from __future__ import annotations

import copy
from html.parser import HTMLParser

import pytest

from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.report.page import render
from wandapp_kernels.report.runtime import add_to_report, memory_rows, runtime_section, runtime_tables, speed_rows


def row(name: str, rate: float, prompt: int = 16, batch: int = 1) -> dict:
    cpu = {"cpu_ttft": 0.25, "tokens_per_cpu_second": 2 * rate}
    return {
        "name": name,
        "prompt": prompt,
        "batch": batch,
        "ttft": 0.5,
        "tokens_per_second": rate,
        "tokens": [[1]],
        **cpu,
    }


def example() -> dict:
    used = {
        "before": 1,
        "load_peak": 3_000_000,
        "resident": 2_000_000,
        "generate_peak": 4_000_000,
        "weights": 1_000_000,
    }
    forms = {"dense float32": 10.0, "sparse float32": 15.0, "dense bfloat16": 20.0, "sparse bfloat16": 50.0}
    return {
        "model": "small <model>",
        "device": "cpu (Some Processor)",
        "date": "2026-01-01",
        "rounds": 3,
        "new_tokens": 8,
        "disk": {"dense": 9_000_000, "sparse": 5_000_000},
        "memory": {"dense float32": used, "sparse float32": {**used, "weights": 500_000}},
        "layers": {"sparse float32": "7 × 2:4"},
        "speed": [row(name, rate) for name, rate in forms.items()],
        "same_tokens": [{"dtype": "float32", "prompt": 16, "batch": 1, "same": 7, "of": 8}],
        "texts": {"prompt": "Once <upon>", "dense float32": "a & time"},
    }


def test_ratios_are_to_the_same_type_and_to_the_fastest_dense() -> None:
    headers, rows = speed_rows(example())
    ratios = {cells[0]: cells[headers.index("× dense, same type") :] for cells in rows}
    assert ratios == {
        "dense float32": [None, "0.50", None],
        "sparse float32": ["1.50", "0.75", "1.50"],
        "dense bfloat16": [None, "1.00", None],
        "sparse bfloat16": ["2.50", "2.50", "2.50"],
    }


def test_ratios_stay_within_one_setting() -> None:
    result = example()
    result["speed"] += [row("dense float32", 100.0, batch=4), row("sparse float32", 50.0, batch=4)]
    assert [cells[-3:] for cells in speed_rows(result)[1][-2:]] == [[None, "1.00", None], ["0.50", "0.50", "0.50"]]


def test_memory_may_be_left_out() -> None:
    headers, rows = memory_rows(example())
    assert rows[1] == ["sparse float32", "5 MB", "500 kB", "2 MB", "3 MB", "4 MB"] and len(headers) == 6
    result = {**example(), "memory": {}}
    assert memory_rows(result) == (["model", "weights on disk"], [["dense", "9 MB"], ["sparse", "5 MB"]])


def test_the_page_shows_it_and_escapes_it(tmp_path) -> None:
    result, report = example(), {"model": "m", "dense": {"perplexity": 2.0}, "methods": []}
    page = render({**copy.deepcopy(report), "runtime": result})
    assert runtime_section(result) in page and runtime_section(result) not in render(report)
    assert "small &lt;model&gt;" in page and "Once &lt;upon&gt;" in page and "a &amp; time" in page
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(runtime_section(result))
    assert open_tags == []
    text = runtime_tables(result)
    assert "7 of 8" in text and "Some Processor" in text and "7 × 2:4" in text
    with pytest.raises(CheckpointError, match=r"report\.json"):
        add_to_report(tmp_path, result)
