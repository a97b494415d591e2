"""Wanda and SparseGPT of llm-compressor on our calibration and evaluation tokens: do the implementations agree?

llm-compressor pins other versions of torch and transformers, so its part runs in an environment of its own::

    python -m bench.llm_compressor export DIR             # ours: the dense model and the calibration tokens
    OTHER/bin/python bench/llm_compressor.py prune DIR    # pip install torch==2.13.0 llmcompressor==0.14.0.1
    python -m bench.llm_compressor score DIR              # ours: perplexities, into bench/results/llm_compressor.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "llm_compressor.json"
METHODS = ("wanda", "sparsegpt")
SEED = 0


def export(folder: Path) -> None:
    """Write the dense model in fp32 and the calibration token ids ``[samples, tokens]``."""
    from bench.quality import MODEL, SAMPLES, SEQLEN
    from wandapp_kernels.data.calibration import calibration_tokens
    from wandapp_kernels.models.load import load_model

    loaded = load_model(MODEL, dtype=torch.float32)
    assert loaded.tokenizer is not None
    loaded.model.save_pretrained(folder / "dense")
    loaded.tokenizer.save_pretrained(folder / "dense")
    tokens = calibration_tokens(loaded.tokenizer, "wiki", samples=SAMPLES, seqlen=SEQLEN, seed=SEED)
    (folder / "calibration.json").write_text(json.dumps({"hash": tokens.text_hash, "ids": tokens.ids.tolist()}))


def prune(folder: Path) -> None:
    """Prune the exported model to 2:4 with every method of llm-compressor's, one thread."""
    import llmcompressor
    from datasets import Dataset
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM

    ids = json.loads((folder / "calibration.json").read_text())["ids"]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    for method, modifier in zip(METHODS, (WandaPruningModifier, SparseGPTModifier), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
        recipe = [modifier(sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"])]
        start, cpu = time.perf_counter(), time.process_time()
        llmcompressor.oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(ids),
            max_seq_length=len(ids[0]),
            shuffle_calibration_samples=False,
        )
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        model.save_pretrained(folder / method)
        versions = {"llmcompressor": llmcompressor.__version__, "torch": torch.__version__}
        (folder / f"{method}.json").write_text(json.dumps({"method": method, **spent, "versions": versions}))


def score(folder: Path) -> None:
    """Perplexities of the pruned models on the texts of ``bench.quality``."""
    from transformers import AutoModelForCausalLM

    from bench.quality import EVAL_SEQLEN, EVAL_TOKENS, MODEL, TEXTS
    from wandapp_kernels.checkpoint.atomic import write_text_atomic
    from wandapp_kernels.checkpoint.save import to_json
    from wandapp_kernels.data.calibration import evaluation_tokens
    from wandapp_kernels.evaluation.perplexity import perplexity
    from wandapp_kernels.models.load import load_model
    from wandapp_kernels.pruning.walk import device_name

    tokenizer = load_model(MODEL, dtype=torch.float32).tokenizer
    assert tokenizer is not None
    rows = []
    for method in METHODS:
        model = AutoModelForCausalLM.from_pretrained(folder / method, dtype=torch.float32)
        found = {
            text: perplexity(
                model,
                evaluation_tokens(tokenizer, text, "evaluation", EVAL_TOKENS)[0],
                seqlen=EVAL_SEQLEN,
                bos_token_id=tokenizer.bos_token_id,
            ).value
            for text in TEXTS
        }
        rows.append({**json.loads((folder / f"{method}.json").read_text()), "perplexities": found})
    result = {
        "model": MODEL,
        "sparsity": "2:4",
        "seed": SEED,
        "text_hash": json.loads((folder / "calibration.json").read_text())["hash"],
        "device": device_name(torch.device("cpu")),
        "methods": rows,
    }
    write_text_atomic(RESULTS, to_json(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", "prune", "score"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    {"export": export, "prune": prune, "score": score}[arguments.step](arguments.folder)


if __name__ == "__main__":
    main()
