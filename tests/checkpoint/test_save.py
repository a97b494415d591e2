from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from wandapp_kernels.checkpoint import save
from wandapp_kernels.checkpoint.save import check_disk_space, save_pruned, to_json
from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.sparsity import Pattern, mask_from_scores

REPORT = {"method": "wanda++", "sparsity": "2:4", "seed": 0, "versions": {"torch": torch.__version__}}


def tiny(kind: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    common = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, **common))
    elif kind == "moe":
        config = Qwen3MoeConfig(
            intermediate_size=24, moe_intermediate_size=12, num_experts=2, num_experts_per_tok=1,
            num_key_value_heads=1, head_dim=8, **small, **common,
        )  # fmt: skip
        model = Qwen3MoeForCausalLM(config)
    else:
        tied = kind == "tied llama"
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=44, tie_word_embeddings=tied, **small, **common))
    model = model.to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            rows = parameter.data.abs().reshape(-1, parameter.shape[-1])
            parameter.data.mul_(mask_from_scores(rows, Pattern.parse("2:4")).reshape(parameter.shape))
    return model


@pytest.fixture
def tokenizer():
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", bos_token="w1", eos_token="w2")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gpt2", "moe"])
def test_the_weights_come_back_bit_for_bit(kind, tmp_path, tokenizer):
    model = tiny(kind)
    next(iter(model.parameters())).data[0, 0] = -0.0
    save_pruned(model, tokenizer, tmp_path / "out", REPORT)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    there = loaded.state_dict()
    assert there.keys() == model.state_dict().keys()
    assert all(same_bits(weight, there[name]) for name, weight in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w5 w7")["input_ids"] == [5, 7]
    assert json.loads((tmp_path / "out" / "wandapp.json").read_text()) == REPORT


def test_half_precision_keeps_its_type(tmp_path):
    model = tiny("llama", torch.float16)
    save_pruned(model, None, tmp_path / "out", REPORT)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_tied_weights_are_stored_once(tmp_path):
    model = tiny("tied llama")
    save_pruned(model, None, tmp_path / "out", REPORT)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in file.keys() and "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_the_config_names_no_sparsity_and_no_quantisation(tmp_path):
    model = tiny("llama")
    model.config.quantization_config = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
    model.config.sparsity_config = {"targets": ["Linear"]}
    save_pruned(model, None, tmp_path / "out", REPORT)
    text = (tmp_path / "out" / "config.json").read_text()
    assert "sparsity_config" not in text and "quant" not in text
    assert json.loads(text)["hidden_size"] == 16
    assert hasattr(model.config, "sparsity_config")  # the model in memory keeps what it had


def test_quantised_weights_are_refused(tmp_path):
    model = tiny("llama")
    config = namedtuple("Config", "quant_method")("fp8")
    model.hf_quantizer = namedtuple("Quantizer", "quantization_config")(config)
    with pytest.raises(CheckpointError, match=r"quantised \(fp8\).*dequantised"):
        save_pruned(model, None, tmp_path / "out", REPORT)
    assert not (tmp_path / "out").exists()


WRITE = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from test_save import tiny, REPORT
from wandapp_kernels.checkpoint.save import save_pruned
save_pruned(tiny("gpt2"), None, pathlib.Path(sys.argv[2]), REPORT)
"""


def test_another_process_writes_the_same_bytes(tmp_path):
    save_pruned(tiny("gpt2"), None, tmp_path / "here", REPORT)
    arguments = [sys.executable, "-c", WRITE, str(Path(__file__).parent), str(tmp_path / "there")]
    subprocess.run(arguments, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / folder).iterdir()}
        for folder in ("here", "there")
    ]
    assert "model.safetensors" in digests[0]
    assert digests[0] == digests[1]


def test_everybody_may_read_what_the_umask_allows(tmp_path):
    save_pruned(tiny("llama"), None, tmp_path / "out", REPORT)
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**12, 10**12 - 1000, 1000)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB and its disk has 0\.00 GB free"):
        save_pruned(tiny("llama"), None, tmp_path / "deep" / "out", REPORT)
    with pytest.raises(CheckpointError, match=r"needs 26\.00 GB"):
        check_disk_space(tmp_path / "out", 26_000_000_000)
    check_disk_space(tmp_path / "out", 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_refused_and_force_replaces_it(tmp_path):
    (tmp_path / "stale.bin").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        save_pruned(tiny("llama"), None, tmp_path, REPORT)
    save_pruned(tiny("llama"), None, tmp_path, REPORT, force=True)
    assert not (tmp_path / "stale.bin").exists()


def test_what_transformers_refuses_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def refuse(folder):
        (folder / "config.json").write_text("{}")
        raise ValueError("the configuration is invalid:\n- for a reason")

    model = tiny("llama")
    monkeypatch.setattr(model, "save_pretrained", refuse)
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        save_pruned(model, None, tmp_path / "out", REPORT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_published_generation_config_with_flaws_can_be_saved_back(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.5, "do_sample": False}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    save_pruned(loaded, None, tmp_path / "out", REPORT)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.5
    # What was changed since, some versions of transformers refuse to write, others all of it.
    loaded.generation_config.top_p = 0.25
    save_pruned(loaded, None, tmp_path / "again", REPORT)
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written["top_p"] == 0.25 and written["eos_token_id"] == loaded.generation_config.eos_token_id
    assert loaded.generation_config.temperature == 0.5


def test_a_model_without_generation_settings_can_be_saved(tmp_path):
    model = tiny("llama")
    model.generation_config = None
    save_pruned(model, None, tmp_path / "out", REPORT)
    assert model.generation_config is None


def test_json_has_plain_values_in_the_given_order():
    text = to_json(
        {
            "z": math.nan, "a": [math.inf, -math.inf, 1.5], "path": Path("x"), "type": torch.float16,
            "scalars": (np.float32(0.5), np.int64(3), torch.tensor(2.0), np.float64("nan")),
            3: {"on": True, "no": None},
        }
    )  # fmt: skip
    assert json.loads(text) == {
        "z": None,
        "a": [None, None, 1.5],
        "path": "x",
        "type": "torch.float16",
        "scalars": [0.5, 3, 2.0, None],
        "3": {"on": True, "no": None},
    }
    assert list(json.loads(text)) == ["z", "a", "path", "type", "scalars", "3"]
    assert text.startswith('{\n  "z": null,') and text.endswith("}\n")
