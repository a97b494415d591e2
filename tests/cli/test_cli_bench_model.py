"""``wandapp bench model``: every form of a model, its sizes, speed and tokens; and its place in a report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from fake_backends import remember
from pruned_models import pruned_model
from tiny_models import tiny_model

from wandapp_kernels import dispatch
from wandapp_kernels.backends import Problem
from wandapp_kernels.cli import bench_model, main
from wandapp_kernels.report.page import write_report
from wandapp_kernels.report.runtime import speed_rows
from wandapp_kernels.report.tables import number
from wandapp_kernels.runtime import compiling
from wandapp_kernels.runtime.probe import MemoryUse, measure_memory

SHORT = ["--prompts", "4,6", "--batch", "1,2", "--new-tokens", "3", "--rounds", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "dense"
    pruned_model("llama", ("2:4",)).save_pretrained(path)
    return path


def test_the_result(folder: Path, tmp_path: Path, capsys) -> None:
    report = {"model": "m", "dense": {"perplexity": 2.0}, "methods": []}
    write_report(report, tmp_path / "report")
    files = ["--json", str(tmp_path / "found.json"), "--report", str(tmp_path / "report")]
    command = ["bench", "model", str(folder), *SHORT, "--dtype", "float32,bfloat16", "--no-memory", *files]
    assert main(command) == 0
    printed = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    forms = ["dense float32", "sparse float32", "dense bfloat16", "sparse bfloat16"]
    assert [(row["name"], row["prompt"], row["batch"]) for row in found["speed"]] == [
        (form, prompt, batch) for prompt, batch in ((4, 1), (4, 2), (6, 1)) for form in forms
    ]
    assert found["layers"]["sparse float32"] == "21 × 2:4" and found["layers"]["dense float32"] == "all layers dense"
    assert found["disk"]["sparse"] < found["disk"]["dense"] == (folder / "model.safetensors").stat().st_size
    same = {(entry["dtype"], entry["prompt"], entry["batch"]): entry for entry in found["same_tokens"]}
    assert len(same) == 6 and all(entry["of"] == 3 for entry in same.values())
    assert all(entry["same"] == 3 for (dtype, *_), entry in same.items() if dtype == "float32")
    assert {"device", "threads", "versions", "date", "command", "memory"} <= found.keys()
    assert "bench: round 6/6" in printed.err and "× fastest dense" in printed.out

    again = json.loads((tmp_path / "report" / "report.json").read_text())
    assert again == {**report, "runtime": found}
    html = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "dense and sparse</h2>" in html and "sparse bfloat16" in html and "21 × 2:4" in html


def test_compiled_forms_beside_the_others(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    run_together = compiling.run_together
    monkeypatch.setattr(compiling, "run_together", lambda graph: compiled.append(graph) or run_together(graph))
    pruned_model("llama", ("2:4",), num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    short = ["--prompts", "4,6", "--batch", "1,2", "--new-tokens", "3", "--rounds", "2", "--no-memory"]
    command = ["bench", "model", str(tmp_path / "dense"), *short, "--compile", "--json", str(tmp_path / "found.json")]
    assert main(command) == 0
    assert "decode steps to be compiled: 4, a minute or more each\n" in capsys.readouterr().err
    assert len(compiled) == 4  # each form once for each batch size, not once for each round or prompt
    found = json.loads((tmp_path / "found.json").read_text())
    forms = ["dense float32", "sparse float32", "dense float32 compiled", "sparse float32 compiled"]
    assert [row["name"] for row in found["speed"]] == forms * 2 + forms[:2]
    assert len({str(row["tokens"][0]) for row in found["speed"] if row["prompt"] == 4}) == 1
    ways = [(entry["dtype"], entry["batch"], entry["same"]) for entry in found["same_tokens"] if entry["prompt"] == 4]
    assert ways == [(way, batch, 3) for batch in (1, 2) for way in ("float32", "float32 compiled")]
    assert set(found["layers"]) == set(forms[:2])
    # Ratios of compiled forms are to the compiled dense form.
    rates = {row["name"]: row["tokens_per_second"] for row in found["speed"] if (row["prompt"], row["batch"]) == (4, 1)}
    row = next(row for row in speed_rows(found)[1] if row[0] == forms[3])
    assert row[6] == number(rates[forms[3]] / rates[forms[2]])
    assert row[7] == number(rates[forms[3]] / max(rates[forms[0]], rates[forms[2]]))


def test_memory_is_measured_in_a_process_of_its_own(folder: Path) -> None:
    used = measure_memory(folder, "dense", "float32", [3, 4, 5], 2)
    size = (folder / "model.safetensors").stat().st_size
    assert 0.9 * size < used.weights < 1.2 * size
    assert used.before > 50e6 and 0 < used.load_peak < 100e6


def test_with_tune_memory_is_that_of_what_the_measurements_choose(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path / "cache"))

    def tune(problems: Iterable[Problem]) -> None:
        """Dense wins everywhere."""
        for problem in problems:
            remember(problem, {"dense": 1.0, "decompress-nm": 2.0})

    monkeypatch.setattr(dispatch, "tune", tune)
    dispatch.forget()
    options = ["--prompts", "4", "--batch", "1", "--new-tokens", "2", "--rounds", "1", "--quiet", "--tune"]
    try:
        assert main(["bench", "model", str(folder), *options, "--json", str(tmp_path / "found.json")]) == 0
    finally:
        dispatch.forget()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["layers"]["sparse float32"] == "no layer is sparse"
    assert found["memory"]["sparse float32"]["weights"] == found["memory"]["dense float32"]["weights"]


def test_on_a_gpu_every_form_goes_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    gpu, real, asked = torch.device("cuda:0"), bench_model.prepare, []

    def stay(model, backend, *, tune, device):
        asked.append((backend, device))
        return real(model, backend, tune=tune)

    def measured(_folder, backend, *_arguments, tune):
        assert not tune
        asked.append((f"memory of {backend}", _arguments[-1]))
        return MemoryUse(0, 1, 2, 3, 4)

    monkeypatch.setattr(bench_model, "prepare", stay)
    monkeypatch.setattr(bench_model, "measure_memory", measured)
    monkeypatch.setattr(bench_model.checks, "device", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Abacus 9000")
    options = ["--prompts", "4", "--batch", "1", "--new-tokens", "2", "--rounds", "1", "--quiet"]
    assert main(["bench", "model", str(folder), *options, "--json", str(tmp_path / "found.json")]) == 0
    assert asked == [(name, gpu) for name in ("memory of dense", "memory of auto", "dense", "auto")]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["device"], found["threads"]) == ("Abacus 9000", 0)
    assert "memory as torch allocated it; Abacus 9000" in capsys.readouterr().out


def test_a_random_model(tmp_path: Path, capsys) -> None:
    options = ["--prompts", "4", "--batch", "1", "--new-tokens", "2", "--rounds", "1", "--no-memory", "--quiet"]
    command = ["bench", "model", "--random", "llama-tiny", "--sparsity", "0.6", *options]
    assert main([*command, "--json", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().err == ""
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["model"] == "random llama-tiny, 0.6"
    assert found["layers"]["sparse float32"] == "14 × unstructured"


def test_wrong_requests(folder: Path, tmp_path: Path, capsys) -> None:
    for options, code, message in (
        ([], 2, "either a model or --random"),
        ([str(folder), "--random", "llama-tiny"], 2, "either a model or --random"),
        ([str(folder), "--sparsity", "4:8"], 2, "--sparsity is for --random"),
        ([str(folder), "--prompts", "4,x"], 2, "--prompts is"),
        ([str(folder), "--batch", "0"], 2, "--batch is"),
        ([str(folder), "--rounds", "0"], 2, "--rounds at least 1"),
        ([str(folder), "--prompts", "63"], 2, "exceed the context"),
        ([str(folder), "--report", str(tmp_path / "none"), *SHORT, "--no-memory"], 1, "report.json"),
    ):
        assert main(["bench", "model", *options, "--quiet"]) == code
        assert message in capsys.readouterr().err
    tiny_model("llama").save_pretrained(tmp_path / "full")
    assert main(["bench", "model", str(tmp_path / "full"), *SHORT, "--quiet"]) == 1
    assert "no layer of" in capsys.readouterr().err
