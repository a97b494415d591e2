from __future__ import annotations

import hashlib
import re
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from wandapp_kernels.data.calibration import calibration_tokens, evaluation_tokens, token_hash
from wandapp_kernels.data.sources import load_documents
from wandapp_kernels.errors import TextError, UsageError

BOS, EOS = 256, 257


def byte_tokenizer(**special):
    """One token per byte of UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<bos>": BOS, "<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def plain_tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    path.write_text("\n\n".join(" ".join(words[: i % 10 + 1]) + f" number {i}" for i in range(100)), encoding="utf-8")
    return str(path)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids.flatten().tolist(), clean_up_tokenization_spaces=False)


# --- calibration windows


def test_windows_start_with_bos_and_pack_shuffled_documents(tokenizer, source):
    tokens = calibration_tokens(tokenizer, source, samples=10, seqlen=33)
    assert tokens.ids.shape == (10, 33)
    assert tokens.ids.dtype == torch.int64
    assert (tokens.ids[:, 0] == BOS).all()
    assert not (tokens.ids[:, 1:] == BOS).any()
    *complete, last = text_of(tokenizer, tokens.ids[:, 1:]).split("\n\n")
    documents = load_documents(source, "calibration").documents
    assert set(complete) <= set(documents)
    assert len(set(complete)) == len(complete) > 5
    assert any(document.startswith(last) for document in documents)
    assert complete != list(documents[: len(complete)])


@pytest.mark.parametrize("bos", [True, False])
def test_without_special_tokens_windows_are_text_joined_by_blank_lines(plain_tokenizer, source, bos):
    tokens = calibration_tokens(plain_tokenizer, source, samples=4, seqlen=64, bos=bos)
    *complete, _ = text_of(plain_tokenizer, tokens.ids).split("\n\n")
    assert tokens.ids.shape == (4, 64)
    assert set(complete) <= set(load_documents(source, "calibration").documents)


def test_bos_false_leaves_the_whole_window_to_text(tokenizer, source):
    with_bos = calibration_tokens(tokenizer, source, samples=3, seqlen=21)
    without = calibration_tokens(tokenizer, source, samples=3, seqlen=20, bos=False)
    assert torch.equal(with_bos.ids[:, 1:], without.ids)


def test_seed_decides_the_windows(tokenizer, source):
    first, again, other = (calibration_tokens(tokenizer, source, samples=8, seqlen=32, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids)
    assert first.text_hash == again.text_hash != other.text_hash
    assert not torch.equal(first.ids, other.ids)
    assert (first.source, first.split, first.seed) == (source, "calibration", 3)


def test_token_ids_are_on_the_cpu_whatever_the_default_device_is(tokenizer, source):
    expected = calibration_tokens(tokenizer, source, samples=3, seqlen=20)
    with torch.device("meta"):
        found = calibration_tokens(tokenizer, source, samples=3, seqlen=20)
        stream, _ = evaluation_tokens(tokenizer, source, max_tokens=20)
    assert torch.equal(found.ids, expected.ids) and found.text_hash == expected.text_hash
    assert stream.device.type == "cpu"


def test_more_samples_extend_the_same_stream(tokenizer, source):
    few, many = (calibration_tokens(tokenizer, source, samples=n, seqlen=32).ids for n in (3, 9))
    assert torch.equal(few, many[:3])


@settings(max_examples=25, deadline=None)
@given(seqlen=st.integers(2, 500), seed=st.integers(0, 5))
def test_the_number_of_samples_offered_is_the_number_there_is(tokenizer, source, seqlen, seed):
    with pytest.raises(TextError, match="gives") as caught:
        calibration_tokens(tokenizer, source, samples=100_000, seqlen=seqlen, seed=seed)
    available = int(re.search(r"gives (\d+) samples of", str(caught.value))[1])
    ids = calibration_tokens(tokenizer, source, samples=available, seqlen=seqlen, seed=seed).ids
    assert ids.shape == (available, seqlen)
    with pytest.raises(TextError):
        calibration_tokens(tokenizer, source, samples=available + 1, seqlen=seqlen, seed=seed)


def test_a_window_longer_than_the_whole_source(tokenizer, source):
    with pytest.raises(TextError, match=r"calibration split of .* gives 0 samples of 100000 tokens, not 1"):
        calibration_tokens(tokenizer, source, samples=1, seqlen=100_000)


def test_only_the_documents_needed_are_tokenised(tokenizer, source):
    calls = []

    class Counting:
        bos_token_id, eos_token_id = BOS, EOS

        def __call__(self, text, **kwargs):
            calls.append(text)
            return tokenizer(text, **kwargs)

    calibration_tokens(Counting(), source, samples=2, seqlen=32)
    assert 1 <= len(calls) <= 8
    assert len("".join(calls[:-1])) < 64


@pytest.mark.parametrize(
    ("samples", "seqlen", "bos", "message"),
    [
        (0, 8, True, "at least 1 sample, not 0"),
        (-1, 8, True, "not -1"),
        (1, 0, False, "0 tokens"),
        (1, 1, True, "1 tokens holds no text"),
    ],
)
def test_too_small_a_request(tokenizer, source, samples, seqlen, bos, message):
    with pytest.raises(UsageError, match=message):
        calibration_tokens(tokenizer, source, samples=samples, seqlen=seqlen, bos=bos)


def test_splits_share_no_document(tokenizer, source):
    calibration = calibration_tokens(tokenizer, source, samples=2, seqlen=600).ids[:, 1:]
    numbers = set(re.findall(r"number (\d+)", text_of(tokenizer, calibration)))
    judged = set(re.findall(r"number (\d+)", text_of(tokenizer, evaluation_tokens(tokenizer, source)[0])))
    assert len(numbers) > 30
    assert len(judged) > 5
    assert not numbers & judged


# --- the evaluation stream


def test_evaluation_keeps_order_and_adds_no_special_token(tokenizer, source):
    ids, text_hash = evaluation_tokens(tokenizer, source)
    assert text_of(tokenizer, ids) == "\n\n".join(load_documents(source, "evaluation").documents)
    assert text_hash == token_hash(ids)


@settings(max_examples=25, deadline=None)
@given(max_tokens=st.integers(2, 2000), split=st.sampled_from(["development", "evaluation"]))
def test_max_tokens_keeps_a_prefix(tokenizer, source, max_tokens, split):
    everything, _ = evaluation_tokens(tokenizer, source, split)
    ids, _ = evaluation_tokens(tokenizer, source, split, max_tokens)
    assert torch.equal(ids, everything[:max_tokens])


def test_text_that_packs_into_very_few_tokens_is_still_read_to_the_end(tmp_path):
    vocabulary = {"[UNK]": 0} | {f"{'w' * 50}{i}": i + 1 for i in range(300)}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "long_words.txt"
    path.write_text("\n\n".join(list(vocabulary)[1:]), encoding="utf-8")
    ids, _ = evaluation_tokens(PreTrainedTokenizerFast(tokenizer_object=word_level), str(path), "evaluation", 30)
    assert len(ids) == 30
    assert 0 not in ids


@pytest.mark.parametrize("max_tokens", [1, 0, -5])
def test_too_few_tokens_asked_for(tokenizer, source, max_tokens):
    with pytest.raises(UsageError, match=f"at least 2 tokens, not {max_tokens}"):
        evaluation_tokens(tokenizer, source, max_tokens=max_tokens)


# --- the hash


def test_hash_is_the_documented_one():
    ids = torch.tensor([[1, 2, 3], [4, 5, 70_000]])
    data = struct.pack("<6q", 1, 2, 3, 4, 5, 70_000) + struct.pack("<2q", 2, 3)
    assert token_hash(ids) == hashlib.sha256(data).hexdigest()[:16]
    assert token_hash(ids.to(torch.int32)) == token_hash(ids)
    assert token_hash(ids.t().contiguous().t()) == token_hash(ids)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=12), st.data())
def test_hash_tells_values_and_shapes_apart(values, data):
    ids = torch.tensor(values)
    changed = ids.clone()
    changed[data.draw(st.integers(0, len(values) - 1))] += 1
    assert len({token_hash(ids), token_hash(changed), token_hash(ids[None]), token_hash(ids[:-1])}) == 4
