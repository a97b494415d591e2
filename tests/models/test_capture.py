from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_model, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from wandapp_kernels.errors import ModelError, NonFiniteError, UsageError
from wandapp_kernels.models.blocks import Decoder, find_decoder
from wandapp_kernels.models.calls import BlockCalls, tensors_in
from wandapp_kernels.models.capture import call_block, capture

TOKENS = 11  # longer than the sliding windows of the tiny models


def through_blocks(decoder: Decoder, calls: BlockCalls, batch: int) -> torch.Tensor:
    """All samples through the real blocks, `batch` at a time."""
    finished = []
    with torch.no_grad():
        for start in range(0, len(calls.hidden), batch):
            hidden = torch.cat(calls.hidden[start : start + batch])
            for index, block in enumerate(decoder.blocks):
                hidden = call_block(block, hidden, *calls.arguments(index, start, batch=len(hidden)))
            finished.append(hidden)
    return torch.cat(finished)


def logits_after(model: PreTrainedModel, decoder: Decoder, final: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The model's norm and head applied to `final`, put in place of the last block's output."""

    def replace(_block: nn.Module, _args: Any, output: Any) -> Any:
        return final if isinstance(output, torch.Tensor) else (final, *output[1:])

    handle = decoder.blocks[-1].register_forward_hook(replace)
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits
    finally:
        handle.remove()


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_with_recorded_arguments_give_the_models_logits(arch: str, attention: str) -> None:
    model = tiny_model(arch)
    model.set_attn_implementation(attention)
    decoder, ids = find_decoder(model), token_ids(4, TOKENS)
    calls = capture(model, decoder, ids)
    assert calls.shared()
    expected = logits(model, ids)
    assert expected.std() > 0.1
    for batch in (1, 3, 4):
        final = through_blocks(decoder, calls, batch)
        torch.testing.assert_close(logits_after(model, decoder, final, ids), expected, rtol=0, atol=1e-5)


def test_arguments_whose_leading_size_is_batch_times_heads_are_repeated() -> None:
    model = tiny_model("bloom", vocab_size=128, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    decoder, ids = find_decoder(model), token_ids(3, TOKENS)
    calls = capture(model, decoder, ids)
    alibi = calls.arguments(0, 0)[1]["alibi"]
    assert alibi.shape[0] == 4 and calls.arguments(0, 0, batch=3)[1]["alibi"].shape[0] == 12
    final = through_blocks(decoder, calls, 3)
    torch.testing.assert_close(logits_after(model, decoder, final, ids), logits(model, ids), rtol=0, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(
    arch=st.sampled_from(["llama", "mistral", "gpt2"]),
    samples=st.integers(1, 3),
    tokens=st.integers(1, 13),
    seed=st.integers(0, 99),
)
def test_any_number_of_samples_and_tokens(arch: str, samples: int, tokens: int, seed: int) -> None:
    model = tiny_model(arch)
    decoder, ids = find_decoder(model), token_ids(samples, tokens, seed)
    final = through_blocks(decoder, capture(model, decoder, ids), samples)
    torch.testing.assert_close(logits_after(model, decoder, final, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_hidden_states_are_the_embedding_output_in_the_models_dtype() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    decoder, ids = find_decoder(model), token_ids(2, 5)
    calls = capture(model, decoder, ids)
    for sample, hidden in enumerate(calls.hidden):
        assert torch.equal(hidden, model.model.embed_tokens(ids[sample : sample + 1]))
        assert hidden.shape == (1, 5, 32) and hidden.dtype == torch.bfloat16 and not hidden.requires_grad
    final = through_blocks(decoder, calls, 1)
    one_by_one = torch.cat([logits(model, row[None]) for row in ids])
    got = [logits_after(model, decoder, final[i : i + 1], ids[i : i + 1]) for i in range(2)]
    assert torch.equal(torch.cat(got), one_by_one)


def stored(calls: BlockCalls) -> set[int]:
    return {id(tensor) for block in calls.calls for call in block for tensor in tensors_in(call)}


def test_memory_grows_neither_with_samples_nor_with_blocks() -> None:
    sizes = set()
    for blocks, samples in ((1, 1), (4, 1), (4, 6)):
        model = tiny_model("llama", num_hidden_layers=blocks)
        sizes.add(len(stored(capture(model, find_decoder(model), token_ids(samples, TOKENS)))))
    assert sizes == {3}  # position ids, cosine and sine


def test_blocks_of_different_types_get_their_own_masks_and_rotary_embeddings() -> None:
    model = tiny_model("gemma3")
    calls = capture(model, find_decoder(model), token_ids(2, TOKENS))
    local, global_, again = (calls.arguments(index, 0)[1] for index in range(3))
    assert local["attention_mask"].sum() < TOKENS * (TOKENS + 1) // 2 and global_["attention_mask"] is None
    assert not torch.equal(local["position_embeddings"][0], global_["position_embeddings"][0])
    assert again["attention_mask"] is local["attention_mask"]
    assert again["position_embeddings"][0] is local["position_embeddings"][0]


def test_the_model_is_left_as_it_was_and_the_head_never_runs() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()

    def refuse(*_: Any) -> None:
        raise AssertionError("the head ran")

    handle = model.lm_head.register_forward_pre_hook(refuse)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture(model, find_decoder(model), token_ids(2, 9))
    handle.remove()
    assert not any("forward" in vars(block) for block in model.model.layers)
    assert [block.training for block in model.model.layers] == [True, False, True] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_forward_of_the_instance_is_kept() -> None:
    model = tiny_model("llama")
    block, ids = model.model.layers[0], token_ids(1, 6)
    own = block.forward

    def halved(*args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.5 * own(*args, **kwargs)

    block.forward = halved
    decoder = find_decoder(model)
    final = through_blocks(decoder, capture(model, decoder, ids), 1)
    assert block.forward is halved
    torch.testing.assert_close(logits_after(model, decoder, final, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_non_finite_embeddings_stop_with_their_count_and_the_model_is_restored() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[70, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    ids = token_ids(3, 9)
    ids[ids == 70] = 71
    ids[1, 4] = ids[1, 6] = 70
    with pytest.raises(NonFiniteError, match="embedding output of sample 1 has 6 "):
        capture(model, find_decoder(model), ids)
    assert not any("forward" in vars(block) for block in model.model.layers)


def test_non_finite_block_weights_are_left_to_those_who_run_the_blocks() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    assert len(capture(model, find_decoder(model), token_ids(2, 9)).hidden) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_models_that_look_ahead_are_refused(kind: str, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=128, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with pytest.raises(ModelError, match="not causal"):
        capture(model, find_decoder(model), token_ids(1, 12))
    config.is_decoder = True
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    assert capture(model, find_decoder(model), token_ids(1, 12)).shared()


def test_attention_that_takes_no_fp32_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="load it with attn_implementation='sdpa'"):
        capture(model, find_decoder(model), token_ids(1, 4))


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.long), torch.zeros(0, 4).long(), torch.zeros(2, 4)])
def test_wrong_token_ids(ids: torch.Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="integer matrix"):
        capture(model, find_decoder(model), ids)


# ---- unusual ways to call blocks -------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, flavour: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.flavour = flavour

    def forward(
        self, hidden_states: torch.Tensor, token_wise: Any = None, cache: Any = None, notes: Any = None
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        assert cache is None or isinstance(cache, DynamicCache)
        output = hidden_states + torch.tanh(self.linear(hidden_states))
        if token_wise is not None:
            output = output + token_wise
        if self.flavour == "notes":  # a later block reads what the first one wrote
            notes.setdefault("first", output)
            output = output + notes["first"]
        return (output, output.mean(-1, keepdim=True)) if self.flavour in ("tuple", "side") else output


class KeywordBlock(Block):
    def forward(self, notes: Any, *, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)


class Toy(nn.Module):
    """A causal model that calls its blocks in one of several unusual ways."""

    def __init__(self, flavour: str) -> None:
        super().__init__()
        self.flavour = flavour
        self.embed = nn.Embedding(128, 8)
        self.layers = nn.ModuleList((KeywordBlock if flavour == "keyword" else Block)(flavour) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden, notes, side = self.embed(input_ids), {}, None
        blocks = list(self.layers)
        if self.flavour == "reversed":
            blocks = blocks[::-1]
        if self.flavour == "skips the last":
            blocks = blocks[:-1]
        if self.flavour == "twice":
            blocks = [block for block in blocks for _ in range(2)]
        for block in blocks:
            if self.flavour == "keyword":
                hidden = block(notes=None, hidden_states=hidden)
            elif self.flavour == "token-wise":
                hidden = block(hidden, token_wise=self.embed(input_ids).flip(-1))
            elif self.flavour == "cache":
                hidden = block(hidden, None, DynamicCache(), notes=None)
            elif self.flavour == "notes":
                hidden = block(hidden, notes=notes)
            elif self.flavour == "side":
                hidden, side = block(hidden, token_wise=side)
            elif self.flavour == "tuple":
                hidden = block(hidden)[0]
            elif self.flavour == "no hidden":
                hidden = block(hidden_states=hidden[:, 0])[:, None]
            elif self.flavour == "flat":
                hidden = block(hidden[0])[None]
            else:
                hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("flavour", ["plain", "keyword", "token-wise", "cache", "tuple"])
def test_unusual_calls_that_work(flavour: str) -> None:
    torch.manual_seed(0)
    model, ids = Toy(flavour), token_ids(3, 9)
    decoder = find_decoder(model)
    calls = capture(model, decoder, ids)
    assert calls.shared() == (flavour != "token-wise")
    with torch.no_grad():
        expected = model(ids, use_cache=False)
    final = through_blocks(decoder, calls, 1 if flavour == "token-wise" else 3)
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-6)


def test_caches_are_not_recorded() -> None:
    model = Toy("cache")
    args, kwargs = capture(model, find_decoder(model), token_ids(1, 4)).arguments(0, 0)
    assert args == (None, None) and kwargs == {"notes": None}


def test_recorded_containers_cannot_be_changed_by_a_block() -> None:
    model = Toy("keyword")
    calls = capture(model, find_decoder(model), token_ids(1, 4))
    calls.arguments(0, 0)[1]["notes"] = "written"
    assert calls.arguments(0, 0)[1]["notes"] is None


@pytest.mark.parametrize(
    ("flavour", "message"),
    [
        ("notes", "pass more to each other than the hidden state"),
        ("side", "pass more to each other than the hidden state"),
        ("reversed", "once each and in order"),
        ("twice", "once each and in order"),
        ("skips the last", "runs 2 of the 3 blocks in layers"),
        ("no hidden", "called without a hidden state"),
        ("flat", r"hidden states \[8, 8\] for token ids \[1, 8\]"),
    ],
)
def test_unusual_calls_that_are_refused(flavour: str, message: str) -> None:
    torch.manual_seed(0)
    model = Toy(flavour)
    with pytest.raises(ModelError, match=message):
        capture(model, find_decoder(model), token_ids(2, 9))
    assert not any("forward" in vars(block) for block in model.layers)
