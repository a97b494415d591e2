from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.report.charts import bar_chart, line_chart, scale_for
from wandapp_kernels.report.page import render, write_report

VOID = {"meta", "br"}


def example() -> dict:
    def method(name: str, perplexity: float, step: float) -> dict:
        blocks = [
            {"name": f"model.layers.{i}", "output_error": 0.01 * step * (i + 1), "seconds": 1.0} for i in range(6)
        ]
        return {
            "method": name, "sparsity": "2:4", "achieved_sparsity": 0.5, "perplexity": perplexity,
            "perplexities": {"wiki": perplexity, "sotu": 2 * perplexity}, "seconds": 72.0,
            "peak_memory_bytes": 1_900_000_000, "blocks": blocks, "warnings": [],
        }  # fmt: skip

    return {
        "model": "smollm-135m",
        "dense": {"perplexity": {"wiki": 15.4, "sotu": 22.0}, "seconds": 30.0},
        "methods": [method("magnitude", 2222.0, 9), method("wanda", 52.3, 4), method("wanda++", 35.1, 2)],
        "seed": 0,
        "text_hash": "ab12cd",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "calibration": {"source": "wikitext", "samples": 128, "seqlen": 2048},
        "evaluation": {"seqlen": 2048, "tokens": 30_000},
        "device": "cpu (Some Processor)",
        "command": "wandapp compare smollm-135m --sparsity 2:4",
    }


class Page(HTMLParser):
    """The text and the tags of a page; asserts that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def bars(chart: ElementTree.Element) -> list[float]:
    return [float(bar.get("width")) for bar in chart.iter("rect")]


def texts(chart: ElementTree.Element) -> list[str]:
    return [text.text for text in chart.iter("text")]


def test_the_folder_holds_the_page_and_the_numbers(tmp_path):
    report = example()
    write_report(report, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == render(report)
    with pytest.raises(CheckpointError, match="not empty"):
        write_report(report, tmp_path / "out")
    write_report(report, tmp_path / "out", force=True)


def test_the_page_has_every_part():
    html = render(example())
    page = Page(html)
    for part in ("smollm-135m", "2:4 · calibrated on 128 × 2048 tokens of wikitext · seed 0 · cpu (Some Processor)",
                 "magnitude", "wanda++", "35.10", "2,220", "2.28", "1 min 12 s", "1.9 GB", "50.00 %", "2.13.0",
                 "wandapp compare smollm-135m --sparsity 2:4", "ab12cd"):  # fmt: skip
        assert part in page.text, part
    assert len(charts(html)) == 3  # two texts, and the blocks
    assert html.count("<tr>") + html.count('<tr class="dense">') >= 1 + 4
    assert len(html) < 40_000


def test_the_page_needs_nothing_but_itself():
    html = render(example())
    names = {tag for tag, _ in Page(html).tags}
    assert not names & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not re.search(r"https?:|url\(|@import|src=|href=", html)
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html
    used = set(re.findall(r"var\((--\w+)\)", html))
    light, dark = html.split("@media (prefers-color-scheme: dark)")[0], html.split("@media")[1].split("} }")[0]
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)


EVIL = '<script>alert("x")</script>&\''


@given(st.sampled_from(["model", "method", "text", "block", "warning", "version", "source", "device", "command"]))
def test_every_text_is_escaped(place):
    report = example()
    first = report["methods"][0]
    if place in ("model", "device", "command"):
        report[place] = EVIL
    elif place == "method":
        first["method"] = EVIL
    elif place == "text":
        report["dense"]["perplexity"] = {EVIL: 1.0}
        first["perplexities"] = {EVIL: 2.0}
    elif place == "block":
        first["blocks"][0]["name"] = EVIL
    elif place == "warning":
        first["warnings"] = [EVIL]
    elif place == "version":
        report["versions"] = {EVIL: EVIL}
    else:
        report["calibration"]["source"] = EVIL
    html = render(report)
    assert "<script" not in html
    page = Page(html)
    assert EVIL in page.text or EVIL[:20] in page.text
    assert charts(html)


def test_missing_parts_leave_no_empty_sections():
    report = {"model": "m", "dense": {"perplexity": 10.0}, "methods": [{"method": "wanda", "perplexity": 12.0}]}
    html = render(report)
    page = Page(html)
    assert "Warnings" not in page.text and "Error of every block" not in page.text and "None" not in page.text
    assert len(charts(html)) == 1
    assert "12.00" in page.text and "1.20" in page.text
    Page(render({**report, "methods": []}))


def test_every_task_and_their_mean_have_a_chart():
    report = example()
    for entry, value in zip([report["dense"], *report["methods"]], (0.6, 0.3, 0.4, None), strict=True):
        score = {"metric": "acc", "value": value, "standard_error": 0.01}
        entry["tasks"] = {"arc_easy": score, "rte": score} if value else {"arc_easy": score}
    html = render(report)
    page = Page(html)
    assert "arc_easy acc, %" in page.text and "60.00 ± 1.00" in page.text
    *_, easy, _rte, mean, _blocks = charts(html)
    assert "dense 60.00" in texts(easy) and "not measured" in texts(easy)
    assert {"30.00", "40.00"} <= set(texts(easy)) and {"30.00", "40.00"} <= set(texts(mean))
    assert len(bars(easy)) == len(bars(mean)) == 2


def test_warnings_are_listed_with_their_method():
    report = example()
    report["methods"][1]["warnings"] = ["3 dead channels in model.layers.0"]
    page = Page(render(report))
    assert "Warnings" in page.text and "3 dead channels in model.layers.0" in page.text


def test_numbers_that_are_not_finite_do_not_break_the_page(tmp_path):
    report = example()
    report["methods"][0].update(perplexity=math.inf, perplexities={"wiki": math.inf, "sotu": None})
    report["methods"][1]["blocks"][2]["output_error"] = math.nan
    write_report(report, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["methods"][0]["perplexity"] is None
    html = render(report)
    wiki, sotu, blocks = charts(html)
    assert "not finite" in texts(wiki) and "not measured" in texts(sotu)
    assert len(bars(wiki)) == 2
    assert "nan" not in ElementTree.tostring(blocks, "unicode").lower().replace("wanda", "")
    # The gap splits the second line in two.
    paths = [path.get("d") for path in blocks.iter("path")]
    assert [d.count("M") for d in paths if "L" in d] == [1, 2, 1]


def test_the_page_does_not_change_the_report():
    report = example()
    before = copy.deepcopy(report)
    render(report)
    assert report == before


# Charts


def test_bars_are_proportional_on_a_linear_scale():
    chart = ElementTree.fromstring(bar_chart("t", {"a": 10.0, "b": 20.0, "c": 40.0}, ("dense", 8.0)))
    a, b, c = bars(chart)
    assert b == pytest.approx(2 * a, abs=0.3) and c == pytest.approx(4 * a, abs=0.3)
    assert "log scale" not in texts(chart)
    (line,) = [element for element in chart.iter("line") if element.get("class") == "reference"]
    start = float(next(chart.iter("rect")).get("x"))
    assert float(line.get("x1")) == pytest.approx(start + 0.8 * a, abs=0.2)
    assert "dense 8.00" in texts(chart) and "40.00" in texts(chart)


def test_the_dense_model_counts_for_the_choice_of_scale():
    assert "log scale" in bar_chart("t", {"a": 100.0, "b": 200.0}, ("dense", 10.0))
    assert "log scale" not in bar_chart("t", {"a": 100.0, "b": 200.0}, ("dense", 25.0))


def test_equal_ratios_are_equal_steps_on_a_log_scale():
    a, b, c = bars(ElementTree.fromstring(bar_chart("t", {"a": 10.0, "b": 100.0, "c": 1000.0}, ("dense", 10.0))))
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert a > 5


def test_every_bar_and_point_has_a_title():
    chart = ElementTree.fromstring(bar_chart("Perplexity", {"wanda": 10.0}, ("dense", 8.0)))
    assert chart.get("role") == "img" and chart.find("title").text == "Perplexity"
    assert [bar.find("title").text for bar in chart.iter("rect")] == ["wanda: 10.00"]
    lines = ElementTree.fromstring(line_chart("Error", {"wanda": [("block 0", 0.5)]}, "block"))
    assert [dot.find("title").text for dot in lines.iter("circle")] == ["wanda, block 0: 0.50"]


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text("abc <&", max_size=50), st.one_of(st.none(), st.floats()), max_size=12),
    st.one_of(st.none(), st.floats()),
)
def test_whatever_the_numbers_everything_stays_inside(values, base):
    points = [(name, value) for name, value in values.items()]
    for svg in (bar_chart("t", values, ("dense", base)), line_chart("t", {"a": points, "b": points[1:]}, "block")):
        chart = ElementTree.fromstring(svg)
        _, _, wide, high = map(float, chart.get("viewBox").split())
        for element in chart.iter():
            for key in ("x", "x1", "x2", "cx"):
                assert 0 <= float(element.get(key, 0)) <= wide
            for key in ("y", "y1", "y2", "cy"):
                assert 0 <= float(element.get(key, 0)) <= high
            assert float(element.get("width", 0)) >= 0
            assert float(element.get("x", 0)) + float(element.get("width", 0)) <= wide


@given(st.lists(st.floats(min_value=1e-30, max_value=1e30), min_size=1, max_size=6))
def test_ticks_are_inside_and_few(values):
    scale = scale_for(values, 100, 700)
    ticks = scale.ticks()
    assert ticks == sorted(set(ticks))
    assert all(99.9 <= scale.position(tick) <= 700.1 for tick in ticks)
    assert 1 <= len(ticks) <= 12


def test_the_legend_wraps_and_the_chart_grows():
    few = line_chart("t", {"a": [("0", 1.0)]}, "block")
    many = line_chart("t", {f"a method with a long name {i}": [("0", 1.0)] for i in range(12)}, "block")
    heights = [float(ElementTree.fromstring(svg).get("viewBox").split()[3]) for svg in (few, many)]
    assert heights[1] > heights[0] + 40
    # The ninth line has the first one's colour and is dashed.
    assert "stroke-dasharray" in many and "stroke-dasharray" not in few
