"""Layers that share an input run as one call, and give what they would give alone."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrize
import torch.utils.checkpoint
from tiny_models import tiny_model, token_ids
from torch import nn

from wandapp_kernels import dispatch
from wandapp_kernels.errors import UsageError
from wandapp_kernels.runtime import SparseLinear, shared_input, sparsify
from wandapp_kernels.runtime.dense_linear import use_dense_kernels

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
    # Strips, where they are the default for so many tokens, are no call of it.
    assert calls == ([] if cpu.compiled.has_fast_bf16_gemm() else [1, 1, 1, 1])
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
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    inputs = [torch.randn(1, 64) for _ in range(4)]
    expected = [model(x.clone()) for x in inputs]
    right: list[bool] = []

    def repeat(index: int) -> None:
        with torch.no_grad():
            right.extend(torch.equal(model(inputs[index]), expected[index]) for _ in range(50))

    workers = [threading.Thread(target=repeat, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(right) == 4 * 50 and all(right)


@torch.no_grad()
def test_a_dropped_model_and_a_long_prompt_are_freed_at_once() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    for _ in range(2):
        model(torch.randn(1, 64))
    layers = [weakref.ref(layer._tensors()[0]) for layer in model.children()]
    prompt = torch.randn(1, 500, 64)
    storage = weakref.ref(prompt)
    model.o(prompt[:, -1:])
    gc.disable()
    try:
        del model, prompt
        assert not any(values() is not None for values in layers) and storage() is None
    finally:
        gc.enable()


CHANGES: dict[str, Callable[[SparseLinear], object]] = {
    "bias": lambda k: k.bias.add_(5),
    "new bias": lambda k: setattr(k, "bias", nn.Parameter(torch.full((16,), 3.0), requires_grad=False)),
    "strided bias": lambda k: setattr(k, "bias", nn.Parameter(torch.arange(32.0)[::2], requires_grad=False)),
    "weight": lambda k: k._tensors()[0].mul_(2),
    "state": lambda k: k.load_state_dict(
        {name: 2 * value if value.is_floating_point() else value for name, value in k.state_dict().items()}
    ),
    "assigned state": lambda k: k.load_state_dict(
        {name: 2 * value if value.is_floating_point() else value for name, value in k.state_dict().items()}, assign=True
    ),
    "layout": lambda k: k.set_layout("nm"),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_layer_changed_after_it_was_computed_ahead(calls: list[int], change: str) -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    for _ in range(2):
        model(torch.randn(1, 64))
    x = torch.randn(1, 64)
    model.q(x)
    assert calls[-1] == 3
    CHANGES[change](model.k)
    expected = model.k.to_linear()(x)
    torch.testing.assert_close(model.k(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.k(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_weight_in_the_place_of_a_freed_one(calls: list[int], bias: bool) -> None:
    """Address, shape and version are those of the weight that was multiplied; only the tensor is another."""
    model = Attention(torch.bfloat16, bias)
    model.k.weight = nn.Parameter(model.k.weight.data, requires_grad=False)
    use_dense_kernels(model)
    for _ in range(2):
        model(torch.randn(1, 2, 64).bfloat16())
    x = torch.randn(1, 2, 64).bfloat16()
    calls.clear()
    model.q(x)
    assert calls == [3]
    before = model.k.weight
    before.data.mul_(2)
    model.k.weight = nn.Parameter(before.data, requires_grad=False)
    assert model.k.weight._version == before._version and model.k.weight.data_ptr() == before.data_ptr()
    torch.testing.assert_close(model.k(x), nn.functional.linear(x, model.k.weight, model.k.bias), rtol=0.02, atol=0.02)
    assert calls == [3, 1]


@torch.no_grad()
def test_weights_made_in_inference_mode_are_not_computed_ahead(calls: list[int]) -> None:
    with torch.inference_mode():
        model = Attention(torch.float32)
        sparsify(model, "2:4")
    for _ in range(2):
        model(torch.randn(1, 64))
    x = torch.randn(1, 64)
    model.q(x)
    assert calls[-1] == 1
    with torch.inference_mode():
        model.k.bias.add_(5)
    assert torch.equal(model.k(x), model.k(x.clone()))


@torch.no_grad()
def test_other_types_devices_and_backends_after_it_was_computed_ahead() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    for _ in range(2):
        model(torch.randn(1, 64))
    x = torch.randn(1, 64)
    model.q(x)
    with dispatch.only("reference"):
        torch.testing.assert_close(model.k(x), model.k.to_linear()(x))
    model.k.half()
    model.q(x)
    assert model.k(x.half()).dtype == torch.float16
    model.k.to("meta")
    model.q(y := torch.randn(1, 64))
    assert model.k(y.half().to("meta")).is_meta


def test_a_layer_that_is_trained_is_not_computed_ahead() -> None:
    model = nn.ModuleList([nn.Linear(64, 32, dtype=torch.bfloat16) for _ in range(2)])
    use_dense_kernels(model)
    first, second = model
    first.requires_grad_(False)
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    for step in range(12):
        with torch.no_grad():
            for layer in model:
                layer(x.clone() if step % 2 else x)
        first(x)
        second(x).sum().backward()
        with torch.no_grad():
            second.weight -= second.weight.grad
            torch.testing.assert_close(second(x), nn.functional.linear(x, second.weight, second.bias))


@torch.no_grad()
def test_dense_layers_whose_weight_is_laid_out_anew() -> None:
    layer = nn.Linear(32, 32, dtype=torch.bfloat16)
    use_dense_kernels(model := nn.Sequential(layer))
    x = torch.randn(1, 32, dtype=torch.bfloat16)
    model(x)
    layer.weight.data = layer.weight.data.t()
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.weight, layer.bias, layer.out_features = nn.Parameter(layer.weight[:8].clone()), None, 8
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight))
    for dtype in (torch.float32, torch.float16, torch.bfloat16) * 4:
        model.to(dtype)
        assert model(x.to(dtype)).dtype == dtype


@torch.no_grad()
def test_odd_surroundings() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    x = torch.randn(1, 64)
    expected = model(x.clone())
    with torch.device("meta"):
        assert torch.equal(model(x.clone()), expected)
    negative = torch._neg_view(-x)
    assert torch.equal(model.q(negative), model.q(x))
    changed, dense = copy.deepcopy(model.q), model.q.to_linear()
    changed.bias = nn.Parameter(torch._neg_view(changed.bias), requires_grad=False)
    torch.testing.assert_close(changed(x), nn.functional.linear(x, dense.weight, -dense.bias))
    setattr(
        changed, changed._tensor_names[0], nn.Parameter(torch._neg_view(changed._tensors()[0]), requires_grad=False)
    )
    torch.testing.assert_close(changed(x), -dense(x))
    with pytest.raises(UsageError, match="last dimension"):
        model.q(torch.tensor(1.0))
    torch.nn.utils.parametrize.register_parametrization(model.k, "bias", nn.Identity())
    assert torch.equal(model(x.clone()), expected)


def test_gradient_checkpointing() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    x = torch.randn(2, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
        y.sum().backward()
        torch.testing.assert_close(x.grad, expected)
        x.grad = None


@torch.no_grad()
def test_misses_in_a_row_count(calls: list[int]) -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    for _ in range(3 * shared_input.MOST_MISSES):
        model.q(torch.randn(1, 64))
        model(torch.randn(1, 64))
    assert calls[-2] == 3


@torch.no_grad()
def test_only_and_tune_change_the_call() -> None:
    model = Attention(torch.float32)
    sparsify(model, "2:4")
    x = torch.randn(1, 64)
    model.q(x)
    with dispatch.only("reference"):
        found = model.q.call_ahead(x)
        assert found is not None and not found[0].backend.name.startswith("cpu")
    found = model.q.call_ahead(x)
    assert found is not None and found[0].backend.name.startswith("cpu")


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
