"""Prune a model in five lines: ``python examples/prune.py [MODEL] [SPARSITY]``."""

import sys

import wandapp_kernels as wk
from wandapp_kernels.data.calibration import calibration_tokens

model, sparsity = (*sys.argv[1:], *("glass-0.9m", "2:4")[len(sys.argv) - 1 :])
loaded = wk.load(model)
tokens = calibration_tokens(loaded.tokenizer, "wiki", samples=16, seqlen=128, seed=0)
report = wk.prune(loaded.model, calibration=tokens, method="wanda++", sparsity=sparsity)
result = wk.evaluate(loaded.model, loaded.tokenizer, "wiki", seqlen=128, max_tokens=4096)
print(f"{report.method} {report.sparsity}: {report.achieved_sparsity:.1%} zeros, perplexity {result.value:.2f}")
