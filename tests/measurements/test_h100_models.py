"""bench.h100 on the CPU: pruning, generation, scoring, and one call's time, with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.h100 import models, scoring, swiglu, tables, timing, whole
from bench.h100.clock import Clock, Section
from wandapp_kernels.sparsity.nm_weight import NMWeight

ROOT = Path(__file__).parents[2]


TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


def test_pruning_is_timed_block_by_block(now):
    section = Section("pruning", 100, Clock(100, now))
    models.measure_pruning(section, "cpu", calibration=(2, 8), **TINY)
    assert {(row["method"], row["pattern"]) for row in section.rows} == {
        ("wanda", "2:4"),
        ("wanda++", "2:4"),
        ("wanda", "50%"),
    }
    assert len(section.rows) == 6
    assert all(row["seconds"] > 0 and row["samples"] == [2, 8] for row in section.rows)


def test_a_whole_model_is_pruned(monkeypatch, tmp_path, capsys):
    found = whole.prune("cpu", (2, 8), **TINY)
    assert found["blocks"] == len(found["block_seconds"]) == TINY["num_hidden_layers"]
    assert found["seconds"] >= sum(found["block_seconds"])
    assert "block 2 of 2" in capsys.readouterr().out
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results.json")
    (tmp_path / "whole.json").write_text(json.dumps({**found, "gpu": "Fake H100", "seconds": 211.6}))
    assert "(2 blocks, random weights) pruned to 2:4 with wanda++ on 2 × 8 tokens: 212 s" in tables.whole_sentence()


def test_the_fused_pair_is_left_out_without_a_gpu(now):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    section = Section("swiglu", 100, Clock(100, now))
    swiglu.measure(section, 1)
    assert section.rows == []
    assert [item["what"] for item in section.left_out] == ["LLaMA-3-8B", "LLaMA-7B"]


def test_generation_is_timed_dense_and_sparse(now, monkeypatch):
    monkeypatch.setattr(models, "STEPS", 2)
    section = Section("generation", 100, Clock(100, now))
    models.measure_generation(section, "cpu", prompts=(8,), **TINY)
    assert section.left_out == []
    assert [row["form"] for row in section.rows[::2]] == ["dense", "2:4", "50%"] * 2
    assert [row["sparse_layers"] for row in section.rows[::2]] == [0, 14, 14] * 2
    assert section.rows[2]["weight_bytes"] < section.rows[0]["weight_bytes"]


def test_a_step_after_the_prefill_is_the_next_token():
    model = models.random_model(models.SHAPES["LLaMA-7B"], "cpu", **TINY)
    found = models.time_model(model, 8, 2, 3)
    assert found["tokens_per_second"] == pytest.approx(2 / found["decode_seconds"])
    assert not found["graph"]


def test_scoring_reference_is_the_formula():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]]).bfloat16()
    gradient, norm = torch.tensor([[0.1, 0.0, 0.0, 0.0]]), torch.tensor([1.0, 1.0, 1.0, 0.1])
    mask = scoring.Problem(weight, gradient, norm).expected("2:4")
    assert mask.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("broken", [None, "mask", "values", "indices"])
def test_scoring_is_compared_with_the_compressed_reference(now, monkeypatch, broken):
    def kernels(problem: scoring.Problem) -> dict[str, scoring.Kernel]:
        mask = problem.expected("2:4")
        weight = NMWeight.compress(problem.weight, mask, "2:4")
        made = {"mask": mask, "values": weight.values, "indices": weight.indices}
        if broken is not None:
            flat = made[broken].view(-1)
            flat[3] = ~flat[3] if broken != "values" else -flat[3]
        return {"fused": scoring.Kernel("2:4", lambda: made["mask"], 1, (made["values"], made["indices"]))}

    monkeypatch.setattr(scoring, "kernels", kernels)
    section = Section("numerics", 100, Clock(100, now))
    found = list(scoring.check(section, "cpu"))
    assert len(section.rows) == 3
    assert found == [
        f"fused on {shape}: 1 entries of the {broken} are wrong"
        for shape in ("65x4100", "300x1000", "4096x4096")
        if broken is not None
    ]


def test_time_is_that_of_one_call(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def elapsed_time(self, last):
            return 0.5

    for name, answer in {"Event": Event, "synchronize": lambda: None, "_sleep": lambda cycles: None}.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    calls = []
    samples = timing._samples(lambda: calls.append(1), 20, 0.0)
    assert samples == [25.0] * timing.FEWEST_REPLAYS
    assert len(calls) == timing.FEWEST_REPLAYS + 1
