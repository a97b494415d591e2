"""Tokenizers: absent, broken, or without the files that make them what they were."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from model_folders import edit_config, refused

from wandapp_kernels.models.load import load_model


def test_tokenizer_absent_or_unwanted(original: Path, folder: Path) -> None:
    assert load_model(str(original), tokenizer=False).tokenizer is None
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert load_model(str(folder)).tokenizer is None


def test_tokenizer_broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "the tokenizer of .* cannot be loaded")


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path, kind: str) -> None:
    """transformers makes one of special tokens, which turns every text into nothing."""
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "bos_token": "<s>"}))
    refused(folder, rf"the tokenizer of .* \({kind}\) knows no words: .*put tokenizer\.json")
    assert load_model(folder, tokenizer=False).tokenizer is None


def test_a_missing_token_to_begin_with_is_reported(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_model(folder).tokenizer is not None  # tokenizer_config.json is there, and names none
        (folder / "tokenizer_config.json").unlink()
        edit_config(folder, bos_token_id=None)
        load_model(folder)
    edit_config(folder, bos_token_id=1)
    with pytest.warns(UserWarning, match=r"no tokenizer_config\.json, .* config\.json says is 1: figures will differ"):
        load_model(folder)
