"""Tasks of lm-evaluation-harness: figures against those from the model's own log-likelihoods, and what is refused."""

from __future__ import annotations

import copy
import math
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pruned_models import pruned_model
from tiny_tasks import QUESTIONS, SUMMARY, needs_harness, write_tasks

import wandapp_kernels as wk
from wandapp_kernels.errors import NonFiniteError, TextError, UsageError
from wandapp_kernels.evaluation import tasks as tasks_module
from wandapp_kernels.evaluation.tasks import load_tasks
from wandapp_kernels.evaluation.zero_shot import zero_shot
from wandapp_kernels.models.load import load_model
from wandapp_kernels.runtime.swap import sparse_layers

pytestmark = needs_harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("zero-shot"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("glass-0.9m").tokenizer


def tiny(tokenizer, **config):
    return pruned_model(vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, **config)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(tokenizer)


@pytest.fixture(autouse=True)
def few_built_in_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of lm-eval's own 14,000, which take longer to read than all of these tests."""
    index = {name: SimpleNamespace() for name in ("arc_easy", "hellaswag")}
    monkeypatch.setattr(tasks_module, "_built_in", lambda: SimpleNamespace(task_index=index))


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, answer: str) -> tuple[float, bool]:
    """Of the answer's tokens after the context's, token by token, and whether each is the most probable one."""
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + answer)["input_ids"]
    log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    steps = [(log_p[i - 1, ids[i]].item(), log_p[i - 1].argmax().item() == ids[i]) for i in range(start, len(ids))]
    return math.fsum(value for value, _ in steps), all(best for _, best in steps)


def by_hand(model, tokenizer, questions=QUESTIONS) -> tuple[float, float]:
    """acc and acc_norm."""
    right = normed = 0
    for question, choices, answer in questions:
        values = [log_likelihood(model, tokenizer, question, f" {choice}")[0] for choice in choices]
        right += max(range(3), key=values.__getitem__) == answer
        normed += max(range(3), key=lambda i: values[i] / len(choices[i])) == answer
    return right / len(questions), normed / len(questions)


def test_accuracy_is_that_of_the_models_log_likelihoods(model, tokenizer, folder: Path) -> None:
    (found,) = zero_shot(model, tokenizer, "choice", task_folder=folder)
    acc, acc_norm = by_hand(model, tokenizer)
    assert 0 < acc < 1 and acc != acc_norm  # or it would tell nothing
    assert (found.task, found.metric, found.value) == ("choice", "acc", acc)
    assert found.standard_error == pytest.approx(math.sqrt(acc * (1 - acc) / (len(QUESTIONS) - 1)))
    assert {name: metric.value for name, metric in found.metrics.items()} == {"acc": acc, "acc_norm": acc_norm}
    assert (found.samples, found.shots, found.version) == (len(QUESTIONS), 0, "2.5")
    assert found.lm_eval.startswith("0.") and len(found.prompt_hash) == 16


def test_the_other_kinds_of_tasks(model, tokenizer, folder: Path) -> None:
    seen: list[tuple] = []

    def note(*where) -> None:
        seen.append(where)

    asked = load_tasks(["greedy", "stream", "written"], task_folder=folder, progress=note)
    greedy, stream, written = zero_shot(model, tokenizer, asked, progress=note)
    few = QUESTIONS[5:]
    values = [log_likelihood(model, tokenizer, question, f" {choices[answer]}") for question, choices, answer in few]
    assert greedy.metric == "acc" and greedy.value == sum(best for _, best in values) / 3
    assert greedy.metrics["perplexity"].value == pytest.approx(math.exp(-sum(value for value, _ in values) / 3))

    bare = tokenizer(SUMMARY)["input_ids"]
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([[tokenizer.bos_token_id, *bare[:-1]]])).logits[0].double(), -1)
    total = -log_p[range(len(bare)), bare].sum().item()
    assert len(bare) < 64 and stream.metric not in ("acc", "exact_match")
    assert stream.metrics["bits_per_byte"].value == pytest.approx(total / len(SUMMARY.encode()) / math.log(2))

    for request, (question, *_) in zip(asked.tasks[2].tasks["written"].instances, few, strict=True):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert request.resps == [tokenizer.decode(new, skip_special_tokens=True)]
    assert written.metric == "exact_match" and written.samples == 3
    assert [where for where in seen if where[0] == "stream"] == [("stream", done, 3) for done in (1, 2, 3)]
    ends = {stage: (done, total) for stage, done, total in seen}
    assert ends == {"loading tasks": (3, 3), "greedy": (3, 3), "stream": (3, 3), "written": (3, 3)}


def test_sparse_layers_score_what_the_dense_model_with_zeros_does(model, tokenizer, folder: Path) -> None:
    sparse = copy.deepcopy(model)
    wk.sparsify(sparse)
    layers = [(name, id(layer)) for name, layer in sparse_layers(sparse)]
    assert layers
    assert zero_shot(sparse, tokenizer, "choice", task_folder=folder) == zero_shot(
        model, tokenizer, "choice", task_folder=folder
    )
    assert [(name, id(layer)) for name, layer in sparse_layers(sparse)] == layers
    (again,) = zero_shot(model, tokenizer, "choice", task_folder=folder, batch_size=1)
    assert again.value == by_hand(sparse, tokenizer)[0]


def test_another_model_scores_something_else(model, tokenizer, folder: Path) -> None:
    values = {
        zero_shot(tiny(tokenizer, seed=seed), tokenizer, "choice", task_folder=folder)[0].value for seed in (1, 2)
    }
    assert values != {zero_shot(model, tokenizer, "choice", task_folder=folder)[0].value}


def test_the_limit_takes_the_first_questions(model, tokenizer, folder: Path) -> None:
    for limit in (3, 5):
        (found,) = zero_shot(model, tokenizer, "choice", task_folder=folder, limit=limit)
        assert (found.samples, found.value) == (limit, by_hand(model, tokenizer, QUESTIONS[:limit])[0])


def test_examples_are_the_same_in_every_run(model, tokenizer, folder: Path) -> None:
    asked = load_tasks("choice", shots=2, task_folder=folder)
    request = asked.tasks[0].tasks["choice"].instances[0]
    assert request.args[0].count("\n\n") == 2 and request.args[0].endswith(QUESTIONS[0][0])
    prompts = []
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of prompts longer than the tiny context
            (found,) = zero_shot(model, tokenizer, asked)
        assert found.shots == 2 and found.prompt_hash == asked.tasks[0].prompt_hash
        prompts.append([request.args for request in asked.tasks[0].tasks["choice"].instances])
    assert prompts[0] == prompts[1]
    others = [load_tasks("choice", shots=shots, task_folder=folder, seed=seed) for shots, seed in ((0, 1234), (2, 7))]
    assert len({asked.tasks[0].prompt_hash, *(other.tasks[0].prompt_hash for other in others)}) == 3


def test_a_group_has_one_figure_and_a_tag_stands_for_its_tasks(model, tokenizer, folder: Path) -> None:
    choice, second, both = zero_shot(model, tokenizer, "pair,both", task_folder=folder)
    assert [one.task for one in (choice, second, both)] == ["choice", "second", "both"]
    assert both.value == pytest.approx((8 * choice.value + 3 * second.value) / 11)
    assert (both.metric, both.samples, both.version) == ("acc", 11, "3")


def test_model_tokenizer_and_random_state_are_left_as_they_were(tokenizer, folder: Path, capsys) -> None:
    model = tiny(tokenizer).train()
    model.model.layers[0].eval()
    own = copy.deepcopy(tokenizer)
    own.pad_token = None
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    zero_shot(model, own, "choice,written", task_folder=folder)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert own.pad_token is None
    assert capsys.readouterr() == ("", "")


def test_prompts_longer_than_the_context_are_told(tokenizer, folder: Path) -> None:
    small = tiny(tokenizer, max_position_embeddings=8)
    with pytest.warns(UserWarning, match=r"^\d+ prompts of choice are longer than the model's context"):
        zero_shot(small, tokenizer, "choice", task_folder=folder)
    with pytest.raises(TextError, match=r"an answer of the task has \d+ tokens, but the model's context is 2"):
        zero_shot(tiny(tokenizer, max_position_embeddings=2), tokenizer, "choice", task_folder=folder)
    with pytest.raises(UsageError, match="the task written does not fit this model"):
        zero_shot(tiny(tokenizer, max_position_embeddings=4), tokenizer, "written", task_folder=folder)


def test_a_model_that_gives_nan_has_no_accuracy(tokenizer, folder: Path) -> None:
    model = tiny(tokenizer)
    model.lm_head.weight.data[7, 3] = math.nan
    with pytest.raises(NonFiniteError, match=r"log-likelihood of \d+ of \d+ answers"):
        zero_shot(model, tokenizer, "choice", task_folder=folder)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("choise", {}, r"no task 'choise' in lm-eval .* or .*tasks; did you mean choice"),
        ("hellaswg", {}, "did you mean hellaswag"),
        (" , ", {}, "no task is named"),
        ("choice", {"shots": -1}, "shots is -1"),
        ("choice", {"limit": 0}, "limit is 0"),
        ("fixed", {"shots": 1}, "fixed is defined without examples, but 1 shots"),
        ("code", {}, "code runs code that the model writes"),
        ("choice", {"batch_size": 0}, "batch size must be at least 1"),
    ],
)
def test_requests_refused(model, tokenizer, folder: Path, names: str, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        zero_shot(model, tokenizer, names, task_folder=folder, **options)


def test_without_a_folder_only_lm_evals_names_are_known(model, tokenizer) -> None:
    with pytest.raises(UsageError, match=r"no task 'arc_esay' in lm-eval [\d.]+; did you mean arc_easy"):
        zero_shot(model, tokenizer, "arc_esay")


def test_other_wrong_requests(model, tokenizer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not there"):
        load_tasks("choice", task_folder=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no \.yaml file that lm-eval reads as a task"):
        load_tasks("choice", task_folder=tmp_path)
    with pytest.raises(UsageError, match="has loaded these tasks already"):
        zero_shot(model, tokenizer, load_tasks("choice", task_folder=folder), shots=1)
    with pytest.raises(UsageError, match="no tokenizer"):
        zero_shot(model, None, "choice", task_folder=folder)
    with pytest.raises(UsageError, match="no torch module"):
        zero_shot(load_model("glass-0.9m"), tokenizer, "choice", task_folder=folder)


def test_a_data_set_that_cannot_be_had_is_told_in_one_sentence(folder: Path) -> None:
    with pytest.raises(TextError, match=r"the task absent cannot be loaded \(.*nobody/nothing.*HF_HOME.*folder\)$"):
        load_tasks("choice,absent", task_folder=folder)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install wandapp_kernels\[eval\]"):
        load_tasks("choice", task_folder=folder)
