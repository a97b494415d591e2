"""Prune a model from Python: ``python examples/prune.py [MODEL]``."""

import sys

import wandapp_kernels as wk
from wandapp_kernels.data.calibration import calibration_tokens

loaded = wk.load(sys.argv[1] if len(sys.argv) > 1 else "glass-0.9m")
tokens = calibration_tokens(loaded.tokenizer, "wiki", samples=16, seqlen=128, seed=0)
report = wk.prune(loaded.model, calibration=tokens, method="wanda++", sparsity="2:4")
result = wk.evaluate(loaded.model, loaded.tokenizer, "wiki", seqlen=128, max_tokens=4096)
print(f"{report.method} {report.sparsity}: {report.achieved_sparsity:.1%} zeros, perplexity {result.value:.2f}")
