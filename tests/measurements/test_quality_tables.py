import json

import pytest

from bench import speed_tables, tables


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


def test_cpu_seconds_are_shown_where_a_run_of_every_method_has_them(results):
    files = sorted(tables.RESULTS.glob("*.json"))
    runs = [json.loads(path.read_text()) for path in files]
    assert "seconds on the clock" in tables.quality_table("2:4")
    for number, (path, one) in enumerate(zip(files, runs, strict=True)):
        for entry in one["methods"]:
            entry["cpu_seconds"] = 3.0 + number
        path.write_text(json.dumps(one))
    table = tables.quality_table("2:4")
    assert "CPU seconds, fastest" in table and "10–11" not in table and "3–4" in table
    for entry in runs[1]["methods"]:
        del entry["cpu_seconds"]
    files[1].write_text(json.dumps(runs[1]))
    table = tables.quality_table("2:4")
    assert "CPU seconds where they were recorded" in table and "3–4" not in table
    del runs[0]["methods"][0]["cpu_seconds"]
    files[0].write_text(json.dumps(runs[0]))
    assert "seconds on the clock" in tables.quality_table("2:4")


def test_nothing_measured_says_so(results, tmp_path):
    assert tables.quality_table("4:8") == "not measured yet"
    assert speed_tables.linear_table(tmp_path / "none") == "not measured yet"
    assert speed_tables.linear_summary(tmp_path / "none") == "not measured yet"
    assert speed_tables.model_table("none", tmp_path) == "not measured yet"
    assert speed_tables.peer_table(tmp_path / "none.json") == "not measured yet"


def test_rows_of_linears_lose_nothing(tmp_path):
    row = {"n": 8, "k": 4, "m": 1, "sparsity": "2:4", "dtype": "bfloat16", "backend": "cpu-nm", "us": 1234.5}
    row |= {"gb_per_s": 9.87, "speedup_torch": 2.5, "speedup_best_dense": 1.5, "ceiling": 1.778}
    slower = {**row, "m": 16, "sparsity": 0.5, "backend": "cpu-bitmap", "speedup_best_dense": 0.8}
    one = {
        "device": "a CPU",
        "threads": 2,
        "cpu_kernels": "avx2",
        "versions": {"torch": "2"},
        "date": "2026-01-02",
        "copy_gb_per_s": 20.5,
    }
    (tmp_path / "a_cpu.json").write_text(json.dumps({**one, "rows": [row, slower]}))
    lines = speed_tables.linear_table(tmp_path).split("\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| 8")]
    assert cells[0] == ["8 × 4", "2:4", "1", "cpu-nm", "1,234", "9.9", "2.50", "1.50", "1.78"]
    assert cells[1][1:4] == ["50%", "16", "cpu-bitmap"] and cells[1][7:] == ["0.80", "–"]
    summary = speed_tables.linear_summary(tmp_path).split("\n")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary if line.startswith("| a CPU")]
    assert cells == [
        ["a CPU (avx2), 8 × 4", "2:4", "1.50", "–", "2.50"],
        ["a CPU (avx2), 8 × 4", "50%", "–", "0.80", "–"],
    ]
    assert summary[-1] == "a CPU, 2 threads, torch 2, 2026-01-02."
    assert (
        "a CPU, 2 threads, kernels avx2, bfloat16" in lines[-1]
        and "20.5 GB/s" in lines[-1]
        and "2026-01-02" in lines[-1]
    )


def test_the_peers_row_stands_beside_ours_of_the_same_text(results, tmp_path):
    path = sorted(tables.RESULTS.glob("*.json"))[1]
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_hash": "abc"}))
    for other in sorted(tables.RESULTS.glob("*.json"))[:1]:
        other.write_text(json.dumps({**json.loads(other.read_text()), "text_hash": "other"}))
    entry = {"method": "sparsegpt", "perplexities": {"wiki": 81.0}, "seconds": 9.0, "cpu_seconds": 7.0}
    peer = {"text_hash": "abc", "sparsity": "2:4", "device": "a CPU", "methods": [{**entry, "versions": {"x": "1"}}]}
    (tmp_path / "peer.json").write_text(json.dumps(peer))
    shown = speed_tables.peer_table(tmp_path / "peer.json").split("\n")
    assert [cell.strip() for cell in shown[2].split("|")[1:-1]] == ["sparsegpt", "80.00", "81.00", "–", "7"]
    (tmp_path / "peer.json").write_text(json.dumps({**peer, "text_hash": "nobody's"}))
    assert speed_tables.peer_table(tmp_path / "peer.json") == "not measured yet"


def test_only_what_stands_between_markers_is_replaced():
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb\n<!-- table y -->\n<!-- end -->\n"
    filled = tables.fill(text, lambda name: name.upper())
    assert filled == "a\n<!-- table x -->\nX\n<!-- end -->\nb\n<!-- table y -->\nY\n<!-- end -->\n"
    assert tables.fill(filled, lambda name: name.upper()) == filled
