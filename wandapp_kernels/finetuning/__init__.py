"""Low-rank adaptation (LoRA) of a pruned model: adapters beside the sparse weights, or merged under their masks."""
