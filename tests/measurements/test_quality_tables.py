import json

import pytest

from bench import tables


def run(seed: int, **methods: float) -> dict:
    entries = [
        {
            "method": name,
            "perplexity": value,
            "perplexities": {"wiki": value, "sotu": 2 * value},
            "seconds": 10.0 + seed,
            "peak_memory_bytes": 1e9 + seed,
        }
        for name, value in methods.items()
    ]
    return {
        "model": "m",
        "dense": {"perplexities": {"wiki": 15.0, "sotu": 20.0}},
        "methods": entries,
        "seed": seed,
        "device": "a CPU",
        "versions": {"torch": "2"},
        "calibration": {"source": "wiki", "samples": 4, "seqlen": 8},
        "evaluation": {"seqlen": 16, "texts": [{"text": "wiki", "text_hash": "abc", "tokens": 9}]},
    }


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for one in (run(0, wanda=150.0, sparsegpt=60.0, best=30.0), run(1, wanda=170.0, sparsegpt=80.0, best=36.0)):
        (tmp_path / f"{tables.MODEL}-2of4-seed{one['seed']}.json").write_text(json.dumps(one))


def test_rows_hold_mean_spread_ratio_and_count(results):
    lines = tables.quality_table("2:4").split("\n")
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines if "|" in line}
    assert cells["dense"][:2] == ["15.00", "20.00"]
    assert cells["wanda"][0] == "160 ± 10.00"
    assert cells["best"] == ["33.00 ± 3.00", "66.00 ± 6.00", "0.47", "2", "10–11", "1 GB"]
    assert cells["sparsegpt"][2] == "1.00"
    assert "magnitude" not in cells, "what was not measured has no row"
    assert "a CPU" in lines[-1] and "abc" in lines[-1] and "torch 2" in lines[-1]


def test_nothing_measured_says_so(results):
    assert tables.quality_table("4:8") == "not measured yet"


def test_only_what_stands_between_markers_is_replaced():
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb\n<!-- table y -->\n<!-- end -->\n"
    filled = tables.fill(text, lambda name: name.upper())
    assert filled == "a\n<!-- table x -->\nX\n<!-- end -->\nb\n<!-- table y -->\nY\n<!-- end -->\n"
    assert tables.fill(filled, lambda name: name.upper()) == filled
