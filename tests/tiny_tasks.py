"""Tasks of lm-evaluation-harness with a handful of questions in local files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

needs_harness = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("glassllm", "lm_eval")),
    reason="glassllm or lm-eval is not installed",
)

# Answers of about the same length, or the shortest would win whatever the model.
QUESTIONS: list[tuple[str, list[str], int]] = [
    ("The king of the north was", ["a king", "a large river", "the city"], 1),
    ("A river in the city is", ["large", "north", "a war"], 0),
    ("The war of the year was", ["the north", "a river", "a king"], 2),
    ("The city was built", ["in war", "in year", "large"], 0),
    ("The large king", ["the war", "was born", "and the"], 1),
    ("In the north a city", ["was built", "the river", "and born"], 2),
    ("The year of the war", ["was in", "of a", "a king"], 1),
    ("Born in the city the king", ["and the river", "of a river", "was in"], 0),
]
SUMMARY = "The king was born in the north. The river of the city is large."

_CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{data}", test: "{data}"}}, cache_dir: "{cache}"}}
training_split: train
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.5}}
"""

_OTHER = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}, cache_dir: "{cache}"}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""

_GROUP = """
group: both
task: [choice, second]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 3}
"""


def write_tasks(folder: Path) -> Path:
    """Write to a new folder ``tasks`` and return it.

    ``choice`` and ``second`` (multiple choice; tag ``pair``, group ``both``), ``greedy`` (log-likelihood of one
    answer), ``stream`` (of a text), ``written`` (generation), ``fixed`` (takes no examples), ``code`` (runs code) and
    ``absent`` (its data set is nowhere).
    """
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [
        {"question": question, "choices": choices, "answer": answer, "right": choices[answer], "text": SUMMARY}
        for question, choices, answer in QUESTIONS
    ]
    data, few, cache = tasks / "data.jsonl", tasks / "few.jsonl", folder / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[5:]))
    choice = _CHOICE.format(name="choice", data=data, cache=cache)
    definitions = {
        "choice": choice + "tag: pair\n",
        "second": _CHOICE.format(name="second", data=few, cache=cache) + "tag: pair\n",
        "both": _GROUP,
        "fixed": _CHOICE.format(name="fixed", data=data, cache=cache) + "num_fewshot: 0\n",
        "code": _CHOICE.format(name="code", data=data, cache=cache) + "unsafe_code: true\n",
        "absent": choice.replace("task: choice", "task: absent")
        .replace("dataset_path: json", "dataset_path: nobody/nothing")
        .replace("dataset_kwargs", "#"),
    }
    for name, kind, text, target, more in (
        ("greedy", "loglikelihood", "{{question}}", " {{right}}", ""),
        ("stream", "loglikelihood_rolling", "", "{{text}}", ""),
        ("written", "generate_until", "{{question}}", "{{right}}", "generation_kwargs: {until: [], max_gen_toks: 4}"),
    ):
        definitions[name] = _OTHER.format(
            name=name, kind=kind, text=text, target=target, more=more, data=few, cache=cache
        )
    for name, definition in definitions.items():
        (tasks / f"{name}.yaml").write_text(definition)
    return tasks
