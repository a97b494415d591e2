"""Building a model without weights concerns the thread that does it, and no other; what is never written."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from pruned_models import pruned_model
from tiny_models import token_ids
from torch import nn
from transformers import AutoModelForCausalLM

import wandapp_kernels as wk
from wandapp_kernels.errors import CheckpointError, NonFiniteError
from wandapp_kernels.runtime.folder import _weights_on_meta


def on_meta() -> bool:
    module = nn.BatchNorm1d(3)
    assert not module.running_mean.is_meta and bool((module.running_var == 1).all())
    assert {p.is_meta for p in module.parameters()} == {module.weight.is_meta}
    return module.weight.is_meta


def in_a_thread() -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(on_meta()))
    thread.start()
    thread.join()
    return found[0]


def test_only_inside_and_also_nested_or_after_an_error() -> None:
    assert not on_meta()
    with _weights_on_meta():
        assert on_meta()
        with _weights_on_meta():
            assert on_meta()
        assert on_meta()
        with pytest.raises(KeyError), _weights_on_meta():
            raise KeyError
        assert on_meta()
    assert not on_meta()
    with pytest.raises(KeyError), _weights_on_meta():
        raise KeyError
    assert not on_meta()


def test_what_a_parameter_is_besides_stays() -> None:
    with _weights_on_meta():
        module = nn.Linear(3, 2, bias=False)
        module.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        module.register_parameter("none", None)
    assert module.none is None and module.frozen.is_meta
    assert module.weight.requires_grad and not module.frozen.requires_grad


def test_other_threads_build_real_modules_meanwhile() -> None:
    with _weights_on_meta():
        assert not in_a_thread()
        assert on_meta()
    assert not in_a_thread()


def test_loads_at_the_same_time() -> None:
    inside, leave = threading.Barrier(2, timeout=20), threading.Event()
    found: dict[str, bool] = {}

    def other() -> None:
        with _weights_on_meta():
            inside.wait()
            leave.wait(20)
            found["inside, after the first has left"] = on_meta()
        found["outside"] = on_meta()

    thread = threading.Thread(target=other)
    thread.start()
    with _weights_on_meta():
        inside.wait()
        assert on_meta()
    assert not on_meta()
    leave.set()
    thread.join()
    assert found == {"inside, after the first has left": True, "outside": False}


def test_what_loading_would_refuse_is_not_written(tmp_path: Path) -> None:
    for name in ("layers.1.mlp.up_proj", "embed_tokens"):
        model = pruned_model("llama", ("2:4",))
        with torch.no_grad():
            weight = model.model.get_submodule(name).weight
            weight[weight != 0] *= 1e6
        wk.sparsify(model)
        model.to(torch.float16)
        with pytest.raises(NonFiniteError, match=rf"model\.{name}\.weight.*wider type"):
            wk.save(model, None, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_tensor_that_the_config_ties_to_another_one_is_not_dropped(tmp_path: Path) -> None:
    model = pruned_model("llama", ("2:4",), tie_word_embeddings=True)
    wk.sparsify(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path / "same")  # both are written
    wk.load(tmp_path / "same")
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    model.save_pretrained(tmp_path / "other")
    for load in (wk.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight .*embed_tokens\.weight, .*tie_word_embeddings"):
            load(tmp_path / "other")


@torch.no_grad()
def test_the_default_device_and_type_change_nothing(tmp_path: Path) -> None:
    model, ids = pruned_model("llama", ("2:4", "60%")), token_ids(1, 5)
    wk.sparsify(model)
    wk.save(model, None, tmp_path / "small")
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        loaded = wk.load(tmp_path / "small").model
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
