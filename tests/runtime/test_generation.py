"""Greedy generation, timed; the swapped model says what the dense one says."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pruned_models import pruned_model
from tiny_models import tiny_model, token_ids

import wandapp_kernels as wk
from wandapp_kernels import dispatch
from wandapp_kernels.errors import UsageError
from wandapp_kernels.runtime import sparsify
from wandapp_kernels.runtime.generation import generate_timed
from wandapp_kernels.runtime.speed import Contender, common_prefix, measure_speed


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_token_is_seen_and_timed(cache: str, batch: int) -> None:
    model, ids, seen = tiny_model("llama"), token_ids(batch, 5), []
    done = generate_timed(model, ids, 7, cache=cache, stop=False, on_token=seen.append)
    assert done.tokens.shape == (batch, 7) and torch.equal(torch.stack(seen, 1), done.tokens)
    assert len(done.token_seconds) == 6 and done.ttft > 0 and min(done.token_seconds) > 0
    median = sorted(done.token_seconds)[2:4]
    assert done.tokens_per_second == pytest.approx(batch / (sum(median) / 2))
    with torch.no_grad():
        expected = ids
        for _ in range(7):  # no cache at all
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(done.tokens, expected[:, 5:])


def test_it_stops_at_the_end_of_text_unless_told_not_to() -> None:
    model, ids = tiny_model("llama"), token_ids(1, 5)
    free = generate_timed(model, ids, 8, stop=False).tokens[0].tolist()
    model.generation_config.eos_token_id = free[3]
    assert generate_timed(model, ids, 8).tokens[0].tolist() == free[: free.index(free[3]) + 1]
    assert generate_timed(model, ids, 8, stop=False).tokens[0].tolist() == free
    assert generate_timed(model, ids, 1).tokens_per_second is None


def test_the_models_own_settings_change_nothing() -> None:
    model, ids = tiny_model("llama"), token_ids(1, 5)
    expected = generate_timed(model, ids, 8, stop=False).tokens
    own = model.generation_config
    own.update(num_beams=3, num_return_sequences=2, do_sample=True, temperature=3.0, repetition_penalty=1e4)
    own.update(suppress_tokens=expected[0].tolist(), forced_eos_token_id=1)
    assert torch.equal(generate_timed(model, ids, 8, stop=False).tokens, expected)
    assert model.generation_config is own and own.num_beams == 3
    with pytest.raises(TypeError):
        generate_timed(model, ids, 8, on_token=None)  # type: ignore[arg-type]
    assert model.generation_config is own


def test_wrong_requests() -> None:
    model = tiny_model("llama")
    for ids, new, cache in ((torch.ones(3), 1, "dynamic"), (token_ids(1, 3), 0, "dynamic"), (token_ids(1, 3), 1, "x")):
        with pytest.raises(UsageError):
            generate_timed(model, ids, new, cache=cache)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_swapped_model_writes_the_same_text(arch: str, cache: str) -> None:
    model = pruned_model(arch)
    ids = token_ids(2, 6)
    expected = generate_timed(model, ids, 10, cache=cache, stop=False).tokens
    sparsify(model)
    assert torch.equal(generate_timed(model, ids, 10, cache=cache, stop=False).tokens, expected)


@pytest.mark.skipif(importlib.util.find_spec("glassllm") is None, reason="glassllm is not installed")
def test_a_real_model_writes_the_same_text() -> None:
    loaded = wk.load("glass-0.9m")
    ids = loaded.tokenizer("The king and the", return_tensors="pt")["input_ids"]
    wk.prune(loaded.model, token_ids(2, 32), "magnitude", "2:4", device="cpu")
    expected = generate_timed(loaded.model, ids, 32, stop=False).tokens
    assert len(wk.sparsify(loaded.model).swapped) == 28
    assert torch.equal(generate_timed(loaded.model, ids, 32, stop=False).tokens, expected)
    assert wk.desparsify(loaded.model)
    assert torch.equal(generate_timed(loaded.model, ids, 32, stop=False).tokens, expected)


def test_contenders_take_turns_and_every_setting_is_measured() -> None:
    model, calls = pruned_model("llama"), []

    class Spy:
        def __init__(self, name: str):
            self.name = name

        def running(self):
            calls.append(self.name)
            return dispatch.only(None)

    contenders = [Contender(name, model, Spy(name)) for name in ("dense", "sparse")]
    steps: list[tuple[int, int]] = []
    prompts = {4: token_ids(1, 4), 6: token_ids(1, 6)}
    found = measure_speed(contenders, prompts, [(4, 1), (4, 2), (6, 1)], 3, 2, lambda *step: steps.append(step))
    assert [(s.name, s.prompt, s.batch) for s in found[:4]] == [
        *(("dense", 4, 1), ("sparse", 4, 1), ("dense", 4, 2), ("sparse", 4, 2))
    ]
    assert calls[:6] == ["dense", "sparse", "sparse", "dense", "dense", "sparse"] and len(calls) == 18
    assert steps[-1] == (9, 9) and all(len(s.tokens) == s.batch and len(s.tokens[0]) == 3 for s in found)
    assert found[0].tokens == found[1].tokens and found[2].tokens == [found[0].tokens[0]] * 2
    assert all(s.ttft > 0 and s.tokens_per_second > 0 for s in found)


def test_common_prefix() -> None:
    assert [common_prefix(*p) for p in (([], [1]), ([1, 2], [1, 2]), ([1, 2, 3], [1, 4, 3]))] == [0, 2, 1]
