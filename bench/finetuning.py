"""What LoRA wins back after pruning: ``python -m bench.finetuning``.

SmolLM2-135M is pruned to 2:4 as in ``bench.quality`` (seed 0) and fine-tuned on text of the same split in both forms,
adapters beside the weights and merged under the mask; perplexities are on the texts of ``bench.quality``. Pruned models
are kept in the folder ``--work``, rows in ``bench/results/finetuning.json``; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.quality import EVAL_SEQLEN, EVAL_TOKENS, MODEL, SAMPLES, SEQLEN, TEXTS
from wandapp_kernels import api
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.checkpoint.save import to_json
from wandapp_kernels.data.calibration import calibration_tokens, evaluation_tokens
from wandapp_kernels.evaluation.compare import EvaluationText, score_texts
from wandapp_kernels.finetuning.finetune import ADAPTERS, MERGED
from wandapp_kernels.finetuning.settings import FinetuneSettings
from wandapp_kernels.models.bundled import quiet_transformers
from wandapp_kernels.models.load import LoadedModel, load_model
from wandapp_kernels.report.tables import human_bytes, number, table

RESULTS = Path(__file__).parent / "results" / "finetuning.json"
METHODS = ("wanda", "wanda++")
SPARSITY = "2:4"
CPU = torch.device("cpu")

# The recipe for 128 sequences of 128 tokens instead of 30,000 of 1,024: all layers, smaller batches, a higher rate.
TRAIN_SAMPLES = 128
RECIPE = FinetuneSettings(targets=("all",), lr=1e-3, warmup=2, batch=4, micro_batch=4)


def pruned(method: str, work: Path) -> LoadedModel:
    """SmolLM2-135M in fp32, pruned by ``method``: from the folder, or made and kept there."""
    folder = work / f"{MODEL}-{method}"
    if not folder.exists():
        loaded = load_model(MODEL, dtype=torch.float32)
        assert loaded.tokenizer is not None
        tokens = calibration_tokens(loaded.tokenizer, "wiki", samples=SAMPLES, seqlen=SEQLEN)
        report = api.prune(loaded.model, tokens, method, SPARSITY, device=CPU)
        with quiet_transformers():
            api.save(loaded.model, loaded.tokenizer, folder, report)
    return load_model(folder)


def perplexities(loaded: LoadedModel, tokens: int) -> dict[str, Any]:
    """Text -> perplexity on the first tokens of its evaluation split."""
    assert loaded.tokenizer is not None
    texts = [
        EvaluationText(t, "evaluation", evaluation_tokens(loaded.tokenizer, t, max_tokens=tokens)[0]) for t in TEXTS
    ]
    return {score.source: score.value for score in score_texts(loaded, texts, EVAL_SEQLEN, CPU)}


def measure(
    method: str, form: str, work: Path, samples: int, tokens: int, before: dict[str, Any] | None
) -> dict[str, Any]:
    """One row."""
    loaded = pruned(method, work)
    assert loaded.tokenizer is not None
    before = before or perplexities(loaded, tokens)
    text = calibration_tokens(loaded.tokenizer, "wiki", samples=samples, seqlen=SEQLEN)
    with quiet_transformers():
        _, report = api.finetune(
            loaded.model,
            text,
            merge=form == MERGED,
            progress=lambda at: print(f"{method} {form}: step {at.done}/{at.total}, loss {at.loss:.3f}", flush=True),
            **asdict(RECIPE),
        )
    recorded = {key: value for key, value in report.to_dict().items() if key != "layers"}
    return {"method": method, "before": before, "after": perplexities(loaded, tokens), **recorded}


def finetuning_table(path: Path = RESULTS) -> str:
    """Perplexities before and after, and what one run took."""
    if not path.exists():
        return "not measured yet"
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = result["rows"]
    texts = list(rows[0]["before"])
    headers = ["method", "LoRA", *(f"{text}, {when}" for text in texts for when in ("before", "after")), "s", "peak"]
    shown = [
        [
            row["method"],
            row["form"],
            *(number(row[when][text]) for text in texts for when in ("before", "after")),
            f"{row['cpu_seconds']:.0f}",
            human_bytes(row["peak_memory_bytes"]),
        ]
        for row in rows
    ]
    first = rows[0]
    recipe = first["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"{table(headers, shown, markdown=True)}\n\n{MODEL} to {SPARSITY}, fp32, {first['device']}; pruned on wiki, "
        f"{SAMPLES} × {SEQLEN} tokens; trained on wiki, {first['samples']} × {first['seqlen']} tokens (hash "
        f"{first['text_hash']}), targets {', '.join(recipe['targets'])}, rank {recipe['rank']}, alpha "
        f"{recipe['alpha']}, dropout {recipe['dropout']}, lr {recipe['lr']:g}, batches of {recipe['batch']}, "
        f"{len(first['losses'])} steps, seed {recipe['seed']}; CPU seconds of the training; perplexity on "
        f"{result['eval_tokens']} held-out tokens of each text in windows of {EVAL_SEQLEN}; {versions}."
    )


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/finetuning"), help="folder for the pruned models")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the rows (default: bench/results)")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("--form", choices=(MERGED, ADAPTERS), action="append")
    parser.add_argument("--samples", type=int, default=TRAIN_SAMPLES, help="sequences to train on (for a trial)")
    parser.add_argument("--eval-tokens", type=int, default=EVAL_TOKENS, help="of each text (for a trial)")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    if (asked.samples, asked.eval_tokens) != (TRAIN_SAMPLES, EVAL_TOKENS) and asked.out == RESULTS:
        parser.error("a trial needs an --out of its own")
    torch.set_num_threads(asked.threads)
    rows = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    for method in asked.method or METHODS:
        for form in asked.form or (MERGED, ADAPTERS):
            there = [row for row in rows if row["method"] == method]
            if all(row["form"] != form for row in there):
                before = there[0]["before"] if there else None
                rows.append(measure(method, form, asked.work, asked.samples, asked.eval_tokens, before))
                result = {"model": MODEL, "sparsity": SPARSITY, "eval_tokens": asked.eval_tokens, "rows": rows}
                write_text_atomic(asked.out, to_json(result))
    print(finetuning_table(asked.out))


if __name__ == "__main__":
    main()
