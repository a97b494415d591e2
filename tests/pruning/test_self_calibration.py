import pytest
import torch
from tiny_models import VOCABULARY, tiny_model, token_ids
from torch import nn

from wandapp_kernels.errors import ModelError, UsageError
from wandapp_kernels.pruning.methods import build_settings
from wandapp_kernels.pruning.self_calibration import PROMPT_TOKENS, self_calibration
from wandapp_kernels.pruning.walk import prune_blocks

CPU = torch.device("cpu")


@pytest.mark.parametrize(("arch", "length", "count"), [("llama", 12, 5), ("gpt2", 40, 3), ("qwen3_moe", 7, 1)])
def test_samples_have_the_given_length_and_start_with_a_piece_of_the_text(arch, length, count):
    ids = token_ids(2, length)
    written = self_calibration(tiny_model(arch), ids, count, seed=0, device=CPU)
    assert written.shape == (count, length) and written.dtype == torch.int64
    assert 0 <= int(written.min()) <= int(written.max()) < VOCABULARY
    width = min(PROMPT_TOKENS, max(length // 4, 1))
    for i, sample in enumerate(written):
        given = ids[i % 2].tolist()
        prompt = sample[:width].tolist()
        assert prompt[0] == given[0]
        piece = prompt[1:]
        assert any(given[s : s + len(piece)] == piece for s in range(1, length))


def test_the_seed_decides_and_the_global_state_is_left_alone():
    model, ids = tiny_model("llama"), token_ids(2, 16)
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    a, b, c = (self_calibration(model, ids, 4, seed=seed, device=CPU) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_samples_follow_the_model_and_not_chance():
    """A model that is sure of its next token is continued by it."""
    model, ids = tiny_model("llama"), token_ids(2, 16)
    with torch.no_grad():
        for p in model.lm_head.parameters():
            p.mul_(1e4)
    written = self_calibration(model, ids, 2, seed=0, device=CPU)
    with torch.no_grad():
        likely = model(written).logits.argmax(-1)
    assert (likely[:, 3:-1] == written[:, 4:]).float().mean() > 0.9


def test_a_model_that_cannot_write_is_refused():
    with pytest.raises(ModelError, match="self_calibration"):
        self_calibration(nn.Linear(2, 2), token_ids(1, 4), 1, seed=0, device=CPU)


def test_the_walk_uses_them_beside_the_given_samples():
    ids = token_ids(3, 12)
    report = prune_blocks(tiny_model("llama"), ids, build_settings("wanda", "2:4", self_calibration=3 * 12 + 13))
    assert report.samples == 3, "the report counts what was given"
    assert report.blocks[0].layers[0].tokens == 5 * 12


def test_enough_text_needs_none(monkeypatch):
    def refuse(*_args, **_keywords):
        raise AssertionError("nothing was to be written")

    monkeypatch.setattr("wandapp_kernels.pruning.walk.self_calibration", refuse)
    prune_blocks(tiny_model("llama"), token_ids(3, 12), build_settings("wanda", "2:4", self_calibration=36))


def test_a_negative_count_is_refused():
    with pytest.raises(UsageError, match="self_calibration"):
        build_settings("wanda", "2:4", self_calibration=-1)


def test_the_models_own_generation_settings_and_mode_do_not_matter():
    ids = token_ids(2, 16)
    expected = self_calibration(tiny_model("gpt2"), ids, 3, seed=0, device=CPU)
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    settings = {"max_new_tokens": 2, "repetition_penalty": 1.7, "top_k": 5, "temperature": 0.1, "num_beams": 2}
    settings |= {"min_p": 0.5, "no_repeat_ngram_size": 1, "return_dict_in_generate": True}
    model.generation_config.update(**settings)
    assert torch.equal(self_calibration(model, ids, 3, seed=0, device=CPU), expected)
    assert model.training and model.transformer.h[0].attn.attn_dropout.training
