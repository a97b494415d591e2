from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wandapp_kernels.report.tables import (
    comparison_rows,
    comparison_table,
    human_bytes,
    human_seconds,
    mean_score,
    method_labels,
    number,
    percent,
    score_text,
    table,
    width,
)

CELLS = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=12))


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.tuples(
            st.lists(st.text(max_size=8), min_size=n, max_size=n),
            st.lists(st.lists(CELLS, min_size=n, max_size=n), max_size=6),
        )
    )
)
def test_markdown_lines_are_equally_wide_and_have_every_cell(content):
    headers, rows = content
    lines = table(headers, rows, markdown=True).split("\n")
    assert len(lines) == 2 + len(rows)
    assert len({width(line) for line in lines}) == 1
    for line in lines:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == len(headers) + 1


@given(st.lists(st.tuples(st.text("abc xyz", max_size=9), st.integers(-(10**6), 10**6)), min_size=1, max_size=6))
def test_plain_columns_line_up(rows):
    lines = table(["name", "count"], rows).split("\n")
    body = lines[2:]
    assert len({len(line) for line in body}) == 1  # the last column is set to the right
    assert all(len(line) <= len(lines[1]) for line in lines)
    start = lines[1].index(" ")
    for line, (name, count) in zip(body, rows, strict=True):
        assert line[:start].strip() == " ".join(name.split())
        assert line[start:].strip() == str(count)


def test_a_small_table_as_it_looks():
    rows = [["wanda", 23.5, "2:4"], ["magnitude\n", None, "1:4"]]
    assert table(["method", "perplexity", "pattern"], rows) == (
        "method     perplexity  pattern\n"
        "─────────  ──────────  ───────\n"
        "wanda            23.5  2:4\n"
        "magnitude           –  1:4"
    )
    assert table(["method", "ppl"], [["a|b*", 1]], markdown=True) == (
        "| method | ppl |\n| ------ | --: |\n| a\\|b\\* |   1 |"
    )


def test_wide_characters_count_twice():
    assert width("模型") == 4 and width("e\u0301") == 1 and width("ab") == 2
    first, second = table(["a", "b"], [["模型", "x"], ["abcd", "y"]]).split("\n")[2:]
    assert first == "模型  x" and second == "abcd  y"


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="2 cells"):
        table(["a", "b"], [["only one"]])


@pytest.mark.parametrize(("value", "shown"), [
    (15.4, "15.40"), (99.99, "99.99"), (99.995, "100"), (123.456, "123"), (1234.5, "1,230"), (999499, "999,000"),
    (999500, "1.00e+06"), (1.234e7, "1.23e+07"), (0.0, "0.00"), (0.1234, "0.12"), (0.0321, "0.0321"),
    (0.0001, "0.0001"), (0.00001234, "1.23e-05"), (-3.14159, "-3.14"), (math.inf, "∞"), (-math.inf, "-∞"),
    (math.nan, "–"), (None, "–"), (7, "7.00"),
])  # fmt: skip
def test_numbers(value, shown):
    assert number(value) == shown


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_a_written_number_is_within_rounding_of_the_value(value):
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.06)


@pytest.mark.parametrize(("count", "shown"), [
    (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (999_499, "999 kB"), (999_600, "1 MB"),
    (269_060_552, "269 MB"), (14e9, "14 GB"), (3.2e12, "3.2 TB"), (5e16, "50,000 TB"), (None, "–"),
])  # fmt: skip
def test_bytes(count, shown):
    assert human_bytes(count) == shown


@pytest.mark.parametrize(("seconds", "shown"), [
    (0, "0.00 s"), (0.424, "0.42 s"), (9.994, "9.99 s"), (12.34, "12.3 s"), (59.96, "1 min 00 s"),
    (185, "3 min 05 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min"),
    (None, "–"), (math.nan, "–"),
])  # fmt: skip
def test_seconds(seconds, shown):
    assert human_seconds(seconds) == shown


def test_percent():
    assert percent(0.5) == "50.00 %" and percent(None) == "–"


def method(name: str, perplexity: float | None, pattern: str = "2:4", **more) -> dict:
    return {"method": name, "sparsity": pattern, "perplexity": perplexity, **more}


def test_the_comparison_of_one_number_each():
    report = {"dense": {"perplexity": 10.0}, "methods": [method("wanda", 25.0, achieved_sparsity=0.5, seconds=75,
              peak_memory_bytes=2e9), method("broken", math.inf)]}  # fmt: skip
    headers, rows = comparison_rows(report)
    assert headers == ["method", "pattern", "zeros", "perplexity", "× dense", "time", "peak memory"]
    assert rows == [
        ["dense", "–", "–", "10.00", "1.00", "–", "–"],
        ["wanda", "2:4", "50.00 %", "25.00", "2.50", "1 min 15 s", "2 GB"],
        ["broken", "2:4", "–", "∞", "∞", "–", "–"],
    ]
    assert "wanda" in comparison_table(report) and "| wanda" in comparison_table(report, markdown=True)


def test_nothing_is_compared_with_a_dense_model_that_has_no_perplexity():
    report = {"dense": {"perplexity": math.inf}, "methods": [method("wanda", 25.0)]}
    assert [row[3:5] for row in comparison_rows(report)[1]] == [["∞", "–"], ["25.00", "–"]]


def test_the_comparison_of_several_texts_divides_by_the_same_text():
    report = {
        "dense": {"perplexity": {"wiki": 10.0, "sotu": 20.0}, "seconds": 3},
        "methods": [
            method("wanda", 30.0, perplexities={"sotu": 50.0, "wiki": 30.0}),
            method("partial", 12.0, perplexities={"wiki": 12.0}),
            method("single", 15.0),
        ],
    }
    headers, rows = comparison_rows(report)
    assert headers[3:6] == ["perplexity wiki", "perplexity sotu", "× dense"]
    assert [row[3:6] for row in rows] == [
        ["10.00", "20.00", "1.00"],
        ["30.00", "50.00", "3.00"],
        ["12.00", "–", "1.20"],
        ["15.00", "–", "1.50"],
    ]


def test_labels_differ():
    same = {"methods": [method("wanda", 1), method("ria", 1), method("wanda", 1)]}
    assert method_labels(same) == ["wanda", "ria", "wanda (2)"]
    mixed = {"methods": [method("wanda", 1), method("wanda", 1, "50%"), method("wanda", 1, "50%")]}
    assert method_labels(mixed) == ["wanda 2:4", "wanda 50%", "wanda 50% (2)"]


# Tasks


def scored(*values: float | None, metric: str = "acc") -> dict:
    names = ("arc_easy", "rte", "wic")
    return {
        name: {"metric": metric, "value": value, "standard_error": 0.0098}
        for name, value in zip(names, values, strict=False)
    }


def test_scores_are_in_per_cent_where_they_are_shares():
    score = {"metric": "acc", "value": 0.652, "standard_error": 0.0098}
    assert score_text(score) == "65.20 ± 0.98"
    assert score_text({**score, "standard_error": None}) == "65.20"
    assert score_text({**score, "metric": "exact_match,strict-match"}) == "65.20 ± 0.98"
    assert score_text({**score, "metric": "bits_per_byte"}) == "0.65 ± 0.0098"
    assert score_text(None) == score_text({**score, "value": None}) == "–"


def test_a_comparison_has_a_column_for_every_task_and_their_mean():
    report = {
        "dense": {"perplexity": 10.0, "tasks": scored(0.6, 0.5, 0.4)},
        "methods": [
            {"method": "wanda", "perplexity": 20.0, "tasks": scored(0.4, 0.5, 0.3)},
            {"method": "ria", "perplexity": 30.0, "tasks": scored(0.4)},
        ],
    }
    headers, rows = comparison_rows(report)
    assert headers[5:9] == ["arc_easy acc, %", "rte acc, %", "wic acc, %", "mean acc, %"]
    assert [row[5:9] for row in rows] == [
        ["60.00 ± 0.98", "50.00 ± 0.98", "40.00 ± 0.98", "50.00"],
        ["40.00 ± 0.98", "50.00 ± 0.98", "30.00 ± 0.98", "40.00"],
        ["40.00 ± 0.98", "–", "–", "–"],
    ]
    assert headers[9:] == ["time", "peak memory"]


def test_one_task_or_different_metrics_have_no_mean():
    assert mean_score(scored(0.5)) is None
    assert mean_score({**scored(0.5), **{"stream": {"metric": "bits_per_byte", "value": 1.0}}}) is None
