"""Whole models of real shapes with random weights: pruning block by block, prefill and decode, dense beside sparse."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from bench.h100.clock import Section
from wandapp_kernels.pruning.methods import build_settings
from wandapp_kernels.pruning.walk import prune_blocks
from wandapp_kernels.runtime.prepare import weight_bytes
from wandapp_kernels.runtime.swap import sparsify
from wandapp_kernels.sparsity import Pattern, mask_from_scores

SHAPES: dict[str, dict[str, Any]] = {
    "LLaMA-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "LLaMA-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
}
PRUNED_BLOCKS, SAMPLES, SEQLEN = 2, 128, 2048  # calibration as in Wanda++, section 5
PROMPTS, BATCHES = (128, 2048), (1, 8)
STEPS, WARM_STEPS, EAGER_STEPS = 32, 3, 8


def random_model(shape: dict[str, Any], device: str, **changes: Any) -> LlamaForCausalLM:
    """A LLaMA in bfloat16 whose weights are drawn on ``device``."""
    config = LlamaConfig(**{**shape, **changes}, tie_word_embeddings=False, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def prune_by_magnitude(model: torch.nn.Module, sparsity: str) -> None:
    """Zeros into the linears of every block: only speed is looked at."""
    pattern = Pattern.parse(sparsity)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.mul_(mask_from_scores(module.weight.abs(), pattern))


def measure_pruning(
    section: Section,
    device: str = "cuda",
    shape: str = "LLaMA-7B",
    calibration: tuple[int, int] = (SAMPLES, SEQLEN),
    **changes: Any,
) -> None:
    """Seconds and peak memory of every pruned block."""
    sizes = {"num_hidden_layers": PRUNED_BLOCKS, **changes}
    for method, pattern in section.cases([("wanda", "2:4"), ("wanda++", "2:4"), ("wanda", "50%")]):
        model = random_model(SHAPES[shape], device, **sizes)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, calibration, generator=generator)
        report = prune_blocks(model, tokens, build_settings(method, pattern), device=torch.device(device))
        for block in report.blocks:
            section.rows.append(
                {
                    "model": shape,
                    "method": method,
                    "pattern": pattern,
                    "block": block.name,
                    "of_blocks": SHAPES[shape]["num_hidden_layers"],
                    "seconds": block.seconds,
                    "peak_memory_bytes": block.peak_memory_bytes,
                    "samples": list(tokens.shape),
                }
            )
        del model
        _release()


def measure_generation(
    section: Section, device: str = "cuda", prompts: Sequence[int] = PROMPTS, **changes: Any
) -> None:
    """Prefill and decode of each model: dense, 2:4 and 50 % unstructured, from the same weights' shapes."""
    for shape, form in section.cases([(s, f) for s in reversed(SHAPES) for f in ("dense", "2:4", "50%")]):
        model = random_model(SHAPES[shape], device, **changes)
        swapped = 0
        if form != "dense":
            prune_by_magnitude(model, form)
            swapped = len(sparsify(model).swapped)
        _release()
        for prompt in prompts:
            for batch in BATCHES:
                try:
                    found = time_model(model, prompt, batch, STEPS)
                except Exception as error:
                    section.leave_out(
                        f"{shape} {form}, {prompt} tokens, batch {batch}", f"{type(error).__name__}: {error}"
                    )
                    _release()
                    continue
                section.rows.append(
                    {
                        "model": shape,
                        "form": form,
                        "prompt": prompt,
                        "batch": batch,
                        "sparse_layers": swapped,
                        "weight_bytes": weight_bytes(model),
                        **found,
                    }
                )
        del model
        _release()


@torch.no_grad()  # as transformers' generate
def time_model(model: LlamaForCausalLM, prompt: int, batch: int, steps: int) -> dict[str, Any]:
    """Seconds of the prefill and of one decode step, issued by the host and, where it can be, as a CUDA graph.

    The cache of keys and values has a fixed size, so that every step does the same work.
    """
    device = model.device
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=device)
    # Each step, those before the capture too, takes one place.
    cache = StaticCache(config=model.config, max_cache_len=prompt + 1 + EAGER_STEPS + WARM_STEPS + steps)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def prefill() -> torch.Tensor:
        cache.reset()
        return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    prefill()
    ttft = statistics.median(_seconds(prefill, device) for _ in range(5))
    token, place = ids[:, :1].clone(), torch.full((batch, 1), prompt, device=device)

    def step() -> torch.Tensor:
        return model(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True).logits

    step()
    eager = statistics.median(_seconds(step, device) for _ in range(EAGER_STEPS))
    run, graph = _captured(step) if device.type == "cuda" else (step, False)
    tpot = statistics.median(_seconds(run, device) for _ in range(steps))
    return {
        "prefill_seconds": ttft,
        "decode_seconds": tpot,
        "eager_decode_seconds": eager,
        "tokens_per_second": batch / tpot,
        "graph": graph,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


def _captured(step: Callable[[], Any]) -> tuple[Callable[[], Any], bool]:
    """``step`` as a graph and True, or itself and False where something in the model cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_STEPS):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            step()
    except Exception:
        torch.cuda.synchronize()
        return step, False
    return graph.replay, True


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
