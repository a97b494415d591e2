"""Layers that share an input run as one call, and give what they would give alone."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch import nn

from wandapp_kernels import dispatch
from wandapp_kernels.runtime import SparseLinear, shared_input, sparsify

cpu = pytest.importorskip("wandapp_kernels.backends.cpu", reason="the compiled CPU kernels are missing")


class Attention(nn.Module):
    """q, k and v of one input, k and v with fewer rows; a layer of another input after them."""

    def __init__(self, dtype: torch.dtype, bias: bool = True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, rows, bias=bias) for rows in (64, 16, 16))
        self.o = nn.Linear(64, 64, bias=bias)
        with torch.no_grad():
            for layer in self.children():
                layer.weight.view(layer.out_features, -1, 4)[..., 1:3] = 0
        self.to(dtype).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(q + torch.cat([k, v, v, k], -1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each call of the compiled module took."""
    found: list[int] = []
    multiply = cpu.compiled.multiply

    def counting(x, bound):
        found.append(len(bound))
        return multiply(x, bound)

    monkeypatch.setattr(cpu.compiled, "multiply", counting)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_three_layers_become_one_call_with_the_same_bits(calls: list[int], dtype: torch.dtype, bias: bool) -> None:
    model = Attention(dtype, bias)
    sparsify(model, "2:4")
    inputs = [torch.randn(2, tokens, 64).to(dtype) for tokens in (1, 3, 7, 1)]
    alone = [torch.cat([layer(x.clone()) for layer in (model.q, model.k, model.v)], -1) for x in inputs]
    outputs = []
    for x in inputs:
        calls.clear()
        outputs.append((torch.cat([model.q(x), model.k(x), model.v(x)], -1), list(calls)))
    assert outputs[0][1] == [1, 1, 1]  # the first time, it is learnt
    assert all(made == [3] for _, made in outputs[1:])
    assert all(torch.equal(given, expected) for (given, _), expected in zip(outputs, alone, strict=True))


@torch.no_grad()
def test_a_changed_input_is_computed_anew(calls: list[int]) -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    model(torch.randn(1, 64))
    x = torch.randn(1, 64)
    model.q(x)
    assert calls[-1] == 3
    x.mul_(2)
    assert torch.equal(model.k(x), model.k(x.clone()))


@torch.no_grad()
def test_layers_that_nobody_asks_for_are_not_computed_for_ever(calls: list[int]) -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    model(torch.randn(1, 64))
    for _ in range(shared_input.MOST_MISSES + 2):
        model.q(torch.randn(1, 64))
    assert calls[-1] == 1 and 3 in calls
    model(torch.randn(1, 64))
    model.q(torch.randn(1, 64))
    assert calls[-1] == 1


@torch.no_grad()
def test_long_inputs_and_inference_mode_run_one_by_one(calls: list[int]) -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    for x in (torch.randn(1, 64), torch.randn(shared_input.MOST_TOKENS + 1, 64)):
        calls.clear()
        model(x)
    assert calls == [1, 1, 1, 1]
    model(torch.randn(1, 64))
    with torch.inference_mode():
        calls.clear()
        model(torch.randn(1, 64))
    assert calls == [1, 1, 1, 1]


@torch.no_grad()
def test_gradients_see_every_layer() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    for _ in range(2):
        model(torch.randn(1, 64))
    with torch.enable_grad():
        x = torch.randn(1, 64, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        dense = [layer.to_linear() for layer in (model.q, model.k, model.v, model.o)]
        q, k, v = (layer(x) for layer in dense[:3])
        (expected,) = torch.autograd.grad(dense[3](q + torch.cat([k, v, v, k], -1)).sum(), x)
    torch.testing.assert_close(gradient, expected)


@torch.no_grad()
def test_copies_moves_and_new_weights_are_seen() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    other = Attention(torch.float32)
    sparsify(other, "2:4")
    x = torch.randn(1, 64)
    for _ in range(2):
        model(x.clone())
    copied = copy.deepcopy(model)
    for layer in copied.children():
        layer.bias.zero_()
    for _ in range(2):
        assert not torch.equal(copied(x.clone()), model(x.clone()))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x.clone()), other(x.clone()))
    model.bfloat16()
    assert model(x.bfloat16()).dtype == torch.bfloat16
    model.q.bias.data = torch.full((64,), 7.0).bfloat16()
    assert bool((model.q(torch.zeros(1, 64).bfloat16()) == 7).all())


@torch.no_grad()
def test_threads_do_not_see_each_other_s_inputs() -> None:
    torch.set_num_threads(before := torch.get_num_threads())
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    inputs = [torch.randn(1, 64) for _ in range(4)]
    expected = [model(x.clone()) for x in inputs]
    wrong: list[int] = []

    def repeat(index: int) -> None:
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(model(inputs[index]), expected[index]):
                    wrong.append(index)

    workers = [threading.Thread(target=repeat, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and torch.get_num_threads() == before


@torch.no_grad()
def test_a_dropped_model_is_freed_at_once() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    for _ in range(2):
        model(torch.randn(1, 64))
    values = weakref.ref(model.q.weight_values) if hasattr(model.q, "weight_values") else weakref.ref(model.q)
    gc.disable()
    try:
        del model
        assert values() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_only_and_tune_change_the_call() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    x = torch.randn(1, 64)
    model.q(x)
    with dispatch.only("reference"):
        kernel = model.q.call_for(x, 1)
        assert kernel is not None and not kernel.backend.name.startswith("cpu")
    kernel = model.q.call_for(x, 1)
    assert kernel is not None and kernel.backend.name.startswith("cpu")


@torch.no_grad()
def test_a_whole_model_makes_fewer_calls_and_the_same_tokens(calls: list[int]) -> None:
    model = tiny_model("llama")
    for layer in model.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.view(layer.out_features, -1, 4)[..., 2:] = 0
    ids = token_ids(1, 6)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    sparsify(model, "2:4")
    sparse = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    calls.clear()
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    blocks = len(sparse) // 7
    assert [made for made in calls if made > 1] == [3, 2] * blocks * 5
