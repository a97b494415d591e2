"""Comparing methods: what is returned, and that every figure is what pruning and evaluating by hand give."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from tiny_text import write_text

from wandapp_kernels import api
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.data.calibration import TokenSet, calibration_tokens, evaluation_tokens
from wandapp_kernels.errors import UsageError
from wandapp_kernels.evaluation.compare import EvaluationText, compare, score_texts
from wandapp_kernels.models.load import LoadedModel, load_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")

CPU = torch.device("cpu")
SEQLEN, EVAL_TOKENS = 48, 600
METHODS = ("magnitude", "wanda", "wanda++")
FEW = {"rounds": 1, "samples": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


def load() -> LoadedModel:
    return load_model("glass-0.9m")


@pytest.fixture(scope="module")
def calibration(text: str) -> TokenSet:
    return calibration_tokens(load().tokenizer, text, samples=3, seqlen=SEQLEN, seed=5)


@pytest.fixture(scope="module")
def texts(text: str) -> list[EvaluationText]:
    tokenizer = load().tokenizer
    return [
        EvaluationText(name, split, evaluation_tokens(tokenizer, text, split, EVAL_TOKENS)[0])
        for name, split in (("held out", "evaluation"), ("other", "development"))
    ]


def run(calibration: TokenSet, texts: list[EvaluationText], methods=METHODS, **changes) -> dict:
    changes = {"optimizer": FEW if "wanda++" in methods else None, "seed": 9, **changes}
    return compare(load, methods, "2:4", calibration, texts, eval_seqlen=SEQLEN, device=CPU, **changes)


@pytest.fixture(scope="module")
def result(calibration: TokenSet, texts: list[EvaluationText]) -> dict:
    return run(calibration, texts)


def test_the_result_has_the_documented_keys(result: dict, calibration: TokenSet) -> None:
    assert set(result) == {
        *("model", "dense", "methods", "seed", "text_hash", "versions", "calibration", "evaluation", "device")
    }
    assert set(result["dense"]) == {"perplexity", "perplexities"}
    for entry, method in zip(result["methods"], METHODS, strict=True):
        assert set(entry) == {
            *("method", "sparsity", "achieved_sparsity", "perplexity", "perplexities", "seconds"),
            *("cpu_seconds", "peak_memory_bytes", "settings", "blocks", "warnings"),
        }
        assert (entry["method"], entry["sparsity"]) == (method, "2:4")
        assert entry["seconds"] > 0 and entry["cpu_seconds"] > 0 and entry["peak_memory_bytes"] > 10**6
        assert list(entry["perplexities"]) == ["held out", "other"]
        assert entry["perplexity"] == entry["perplexities"]["held out"]
        assert len(entry["blocks"]) == 4
        assert all(set(b) == {"name", "output_error", "loss", "seconds", "peak_memory_bytes"} for b in entry["blocks"])
        # Magnitude compares whole matrices where the pattern lets it; 341 columns leave a tail that is kept.
        assert entry["achieved_sparsity"] == pytest.approx(0.5, abs=0.001)
    assert result["model"] == "glass-0.9m" and result["seed"] == 9
    assert result["text_hash"] == calibration.text_hash
    assert result["calibration"] == {
        "source": calibration.source,
        "samples": 3,
        "seqlen": SEQLEN,
        "seed": 5,
        "text_hash": calibration.text_hash,
    }
    assert result["evaluation"]["seqlen"] == SEQLEN
    assert [(t["text"], t["split"]) for t in result["evaluation"]["texts"]] == [
        ("held out", "evaluation"),
        ("other", "development"),
    ]
    assert all(t["tokens"] == EVAL_TOKENS for t in result["evaluation"]["texts"])


def test_the_result_is_json(result: dict) -> None:
    assert json.loads(to_json(result))["methods"][2]["settings"]["optimizer"]["rounds"] == 1


def test_the_dense_row_is_that_of_evaluate(result: dict, text: str) -> None:
    loaded = load()
    expected = api.evaluate(loaded.model, loaded.tokenizer, text, seqlen=SEQLEN, max_tokens=EVAL_TOKENS)
    assert result["dense"]["perplexity"] == expected.value
    assert result["evaluation"]["texts"][0]["text_hash"] == expected.text_hash


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_row_is_that_of_pruning_by_hand(
    result: dict, calibration: TokenSet, texts: list[EvaluationText], method: str
) -> None:
    loaded = load()
    changes = {"optimizer": FEW} if method == "wanda++" else {}
    report = api.prune(loaded.model, calibration, method, "2:4", seed=9, device=CPU, **changes)
    entry = next(entry for entry in result["methods"] if entry["method"] == method)
    assert entry["perplexities"] == {m.source: m.value for m in score_texts(loaded, texts, SEQLEN, CPU)}
    assert entry["achieved_sparsity"] == report.achieved_sparsity
    assert entry["settings"] == report.settings
    assert [b["output_error"] for b in entry["blocks"]] == [b.output_error for b in report.blocks]
    assert entry["perplexity"] != result["dense"]["perplexity"]


def test_two_runs_give_the_same_figures(result: dict, calibration: TokenSet, texts: list[EvaluationText]) -> None:
    again = run(calibration, texts)
    for one, other in zip([result["dense"], *result["methods"]], [again["dense"], *again["methods"]], strict=True):
        assert one["perplexities"] == other["perplexities"]


def test_a_method_does_not_see_the_work_of_those_before_it(
    result: dict, calibration: TokenSet, texts: list[EvaluationText]
) -> None:
    backwards = run(calibration, texts, METHODS[1::-1])
    expected = {entry["method"]: entry["perplexity"] for entry in result["methods"]}
    assert {e["method"]: e["perplexity"] for e in backwards["methods"]} == {m: expected[m] for m in METHODS[:2]}


def test_an_interrupted_comparison_goes_on_where_it_was(
    result: dict, calibration: TokenSet, texts: list[EvaluationText]
) -> None:
    kept: list[dict] = []
    part = run(calibration, texts, METHODS[:1], keep=lambda sofar: kept.append(json.loads(to_json(sofar))))
    assert len(kept) == 1 and kept[0]["methods"][0]["perplexity"] == part["methods"][0]["perplexity"]
    kept[0]["methods"][0]["perplexity"] = -1.0  # to see that it is not measured again
    whole = run(calibration, texts, METHODS[:2], known=kept[0])
    assert whole["dense"] == kept[0]["dense"]
    assert [e["perplexity"] for e in whole["methods"]] == [-1.0, result["methods"][1]["perplexity"]]


def test_an_earlier_result_that_was_measured_otherwise_is_refused(
    result: dict, calibration: TokenSet, texts: list[EvaluationText]
) -> None:
    known = json.loads(to_json(result))
    for change, known_change, what in (
        ({}, {"text_hash": "0" * 16}, "calibration text"),
        ({"seed": 8}, {}, "seed"),
        ({"alpha": 7.0}, {}, "settings of magnitude"),
        ({"ignore": ("down_proj",)}, {}, "settings of magnitude"),
        ({}, {"evaluation": {**known["evaluation"], "seqlen": 7}}, "evaluation window"),
        ({}, {"evaluation": {**known["evaluation"], "texts": known["evaluation"]["texts"][:1]}}, "evaluation texts"),
    ):
        with pytest.raises(UsageError, match=f"differs in its {what}"):
            run(calibration, texts, METHODS, known={**known, **known_change}, **change)
    assert run(calibration, texts, METHODS, known=known) == known  # nothing is left to do
    with pytest.raises(UsageError, match="differs in its settings of magnitude"):
        compare(load, METHODS[:1], "50%", calibration, texts, eval_seqlen=SEQLEN, seed=9, device=CPU, known=known)


def test_callbacks_follow_the_work(calibration: TokenSet, texts: list[EvaluationText]) -> None:
    events: list[tuple] = []
    loads: list[int] = []

    def loading() -> LoadedModel:
        loads.append(1)
        return load()

    found = compare(
        loading,
        ("wanda", "wanda++rgs"),
        "50%",
        calibration,
        texts[:1],
        eval_seqlen=SEQLEN,
        device=CPU,
        ignore=("down_proj",),
        progress=lambda method, where: events.append((method, where.stage, where.done, where.total)),
        done=lambda method, perplexity, seconds: events.append((method, perplexity, seconds)),
    )
    assert len(loads) == 3  # the dense figures and one for each method
    blocks = [("block", i, 4) for i in range(1, 5)]
    dense, wanda, regional = found["dense"], *found["methods"]
    assert events == [
        ("dense", dense["perplexity"], 0.0),
        *(("wanda", *block) for block in blocks),
        ("wanda", wanda["perplexity"], wanda["seconds"]),
        *(("wanda++rgs", *block) for block in blocks),
        ("wanda++rgs", regional["perplexity"], regional["seconds"]),
    ]
    assert wanda["settings"]["ignore"] == ("down_proj",) and wanda["sparsity"] == "50%"


def test_tokens_of_another_vocabulary_are_refused(calibration: TokenSet, texts: list[EvaluationText]) -> None:
    foreign = replace(calibration, ids=calibration.ids + 10**6)
    with pytest.raises(UsageError, match="outside the vocabulary of"):
        run(foreign, texts, ("wanda",))


def test_wrong_requests_fail_before_any_model_is_loaded(calibration: TokenSet, texts: list[EvaluationText]) -> None:
    def no_load() -> LoadedModel:
        raise AssertionError("loaded")

    for methods, sparsity, changes in (
        (("wanda", "nonsense"), "2:4", {}),
        (("wanda",), "4:2", {}),
        (("wanda", "ria"), "2:4", {"optimizer": FEW}),
    ):
        with pytest.raises(UsageError):
            compare(no_load, methods, sparsity, calibration, texts, eval_seqlen=SEQLEN, device=CPU, **changes)
