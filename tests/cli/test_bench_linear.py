"""``wandapp bench linear``: the table, the JSON file, the plot."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from wandapp_kernels.backends import layouts_of
from wandapp_kernels.cli.bench_linear import weight_bytes
from wandapp_kernels.cli.main import main
from wandapp_kernels.dispatch import problem_for
from wandapp_kernels.ops.layouts import get_layout
from wandapp_kernels.tuning.measure import sample_weight
from wandapp_kernels.tuning.store import Measurement

FIELDS = {
    "n", "k", "m", "sparsity", "dtype", "backend", "us", "gb_per_s", "share_of_copy", "ceiling", "speedup_torch",
    "speedup_best_dense", "candidates",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """No copies of weights beyond a cache of 64 kB, and measurements that are forgotten."""
    from wandapp_kernels import dispatch
    from wandapp_kernels.cli import bench_linear
    from wandapp_kernels.tuning import measure

    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path / "cache"))
    for module in (measure, bench_linear):
        monkeypatch.setattr(module, "last_level_cache", lambda device: 1 << 16)
    dispatch.forget()
    yield
    dispatch.forget()


def test_one_row_for_each_shape_sparsity_and_m(tmp_path, capsys):
    file = tmp_path / "linear.json"
    command = "bench linear --shapes 64x128,32x96 --m 1,4 --sparsity 2:4,0.6 --seconds 0 --quiet --json"
    assert main([*command.split(), str(file)]) == 0
    result = json.loads(file.read_text())
    assert {"device", "threads", "cpu_kernels", "versions", "date", "copy_gb_per_s", "rows"} <= set(result)
    keys = {(row["n"], row["k"], row["m"], row["sparsity"]) for row in result["rows"]}
    assert keys == {(*shape, m, s) for shape in ((64, 128), (32, 96)) for m in (1, 4) for s in ("2:4", 0.6)}
    for row in result["rows"]:
        assert set(row) == FIELDS
        times = row["candidates"]
        assert row["backend"] in times and "dense" in times and row["us"] == times[row["backend"]]
        assert row["speedup_torch"] == pytest.approx(times["dense"] / row["us"], rel=0.2)
        assert row["speedup_best_dense"] <= row["speedup_torch"]
        assert row["ceiling"] > 1.3
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if line.startswith(("64x128", "32x96"))]) == 8
    assert "GB/s" in printed and "× best dense" in printed


def test_rows_of_a_weight_are_of_one_layout_chosen_by_all_of_them(tmp_path, monkeypatch):
    pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")
    from wandapp_kernels import dispatch

    def measure(problem, sample, seconds):
        few = problem.tokens == 1
        return Measurement({"dense": 90.0, "cpu-windows": 10.0 if few else 80.0, "cpu-bitmap": 10.5 if few else 20.0})

    monkeypatch.setattr(dispatch, "measure", measure)
    file = tmp_path / "linear.json"
    for tokens, backend in (("1", "cpu-windows"), ("1,4,8", "cpu-bitmap")):
        command = f"bench linear --shapes 64x128 --m {tokens} --sparsity 0.5 --seconds 0 --quiet --json {file}"
        assert main(command.split()) == 0
        rows = json.loads(file.read_text())["rows"]
        assert {row["backend"] for row in rows} == {backend}
        assert len({row["ceiling"] for row in rows}) == 1


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_types_have_short_and_long_names(name, tmp_path):
    file = tmp_path / "linear.json"
    command = f"bench linear --shapes 64x128 --m 1 --sparsity 2:4 --seconds 0 --quiet --dtype {name} --json {file}"
    assert main(command.split()) == 0
    assert json.loads(file.read_text())["rows"][0]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "64"], "not NxK"),
        (["--shapes", "0x4"], "not NxK"),
        (["--m", "3"], "powers of two"),
        (["--m", "one"], "powers of two"),
        (["--sparsity", "5:4"], "5:4"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, words, capsys):
    assert main(["bench", "linear", *arguments, "--quiet"]) != 0
    assert words in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "linear", "--shapes", "8x8", "--plot", str(tmp_path / "plot.svg")]) == 2
    assert 'pip install "wandapp_kernels[plot]"' in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_bytes_are_those_of_the_layout(pattern):
    problem = problem_for(2048, 96, pattern, 1, torch.bfloat16, density=0.4)
    sample = sample_weight(problem)
    for name in layouts_of(problem.operator):
        if get_layout(name).supports(sample.compressed) is None:
            packed = sum(tensor.nbytes for tensor in get_layout(name).pack(sample.compressed))
            assert weight_bytes(problem, name) == pytest.approx(packed, rel=0.02), name
    assert weight_bytes(problem, "dense") == 2048 * 96 * 2
