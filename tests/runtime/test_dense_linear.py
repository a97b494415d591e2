"""DenseLinear: nn.Linear on another kernel, with the same Parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from fake_backends import Fake, remember
from tiny_models import tiny_model, token_ids
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from wandapp_kernels import dispatch
from wandapp_kernels.backends import BACKENDS, DENSE, Backend, Problem, load_backends
from wandapp_kernels.runtime import dense_linear, desparsify, sparsify
from wandapp_kernels.runtime.dense_linear import DenseLinear, use_dense_kernels, use_torch


class Doubling(Backend):
    """A dense backend for up to 4 tokens that is told apart by its results."""

    name, layout, default_tokens = "test-doubling", DENSE, 4

    def supports(self, problem):
        return None if problem.dtype == torch.bfloat16 else "only bfloat16"

    def run(self, x, tensors, bias, shape, pattern):
        return 2 * nn.functional.linear(x, tensors[0], bias)


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    load_backends()
    for name in [name for name, backend in BACKENDS.items() if backend.layout == DENSE and name != DENSE]:
        monkeypatch.delitem(BACKENDS, name)
    monkeypatch.setitem(BACKENDS, "test-doubling", Doubling())


def test_few_tokens_at_16_bit_use_a_kernel_meant_for_them(doubling: None) -> None:
    layer = nn.Linear(8, 6).bfloat16()
    model = nn.Sequential(copy.deepcopy(layer))
    assert use_dense_kernels(model) == ["0"] and type(model[0]) is DenseLinear
    with torch.no_grad():
        for shape, factor in (((1, 8), 2), ((2, 2, 8), 2), ((8,), 2), ((5, 8), 1), ((2, 8, 8), 1), ((0, 8), 1)):
            x = torch.randn(shape).bfloat16()
            assert torch.equal(model(x), factor * layer(x)), shape
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 7).bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(torch.ones(1, 8)), layer(torch.ones(1, 8)))
    x = torch.randn(1, 8).bfloat16().requires_grad_()
    assert torch.equal(model(x), layer(x))
    model(x).sum().backward()
    assert x.grad is not None and model[0].weight.grad is not None
    use_torch(model)
    assert type(model[0]) is nn.Linear and model[0].__dict__.keys() == layer.__dict__.keys()
    with torch.no_grad():
        assert torch.equal(model(x), layer(x))


def test_fp32_keeps_torch_unless_measured(doubling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(8, 6)
    x, expected = torch.randn(1, 8), None
    with torch.no_grad():
        expected = layer(x)
        use_dense_kernels(model := nn.Sequential(layer))
        assert torch.equal(model(x), expected)
        layer.forget_calls()
        monkeypatch.setattr(dense_linear.dispatch, "choose_dense", lambda problem: BACKENDS["test-doubling"])
        assert torch.equal(model(x), 2 * expected)


def test_tuning_measures_what_stays_dense(doubling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, asked = Fake("test-right", DENSE, reason=None), []
    monkeypatch.delitem(BACKENDS, "test-doubling")
    monkeypatch.setitem(BACKENDS, fake.name, fake)

    def tune(problems: Iterable[Problem]) -> None:
        for problem in problems:
            asked.append(problem)
            remember(problem, {DENSE: 2.0, fake.name: 1.0})

    monkeypatch.setattr(dispatch, "tune", tune)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)).requires_grad_(False)
    sparsify(model)
    model(torch.randn(1, 8))
    assert not asked and not fake.calls
    sparsify(model, tune=True)
    assert {(p.operator, p.out_features, p.in_features) for p in asked} == {("linear", 6, 8), ("linear", 8, 6)}
    assert {p.tokens for p in asked} == {1, 4, 16, 256}
    model(torch.randn(3, 8))
    assert fake.calls == [3, 3]
    monkeypatch.delitem(BACKENDS, fake.name)  # nothing to choose from: nothing to measure
    asked.clear()
    sparsify(model, tune=True)
    assert not asked


def test_the_swap_and_back() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        expected = model(token_ids(1, 5)).logits
        sparsify(model)
        assert type(model.lm_head) is DenseLinear and model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model(token_ids(1, 5)).logits, expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model.lm_head, fullgraph=True, backend="aot_eager")
        x = torch.randn(1, 32)
        torch.testing.assert_close(compiled(x), nn.functional.linear(x, model.lm_head.weight))
        desparsify(model)
    assert type(model.lm_head) is nn.Linear


@torch.no_grad()
def test_tensors_that_do_not_fit_the_layer_are_torch_s() -> None:
    torch.compiler.reset()
    x = torch.randn(2, 8).bfloat16()
    rows = nn.Parameter(torch.randn(6, 8).bfloat16(), requires_grad=False)
    bias = nn.Parameter(torch.randn(1).bfloat16(), requires_grad=False)

    def layer(weight: nn.Parameter, bias: nn.Parameter | None) -> DenseLinear:
        layer = nn.Linear(8, 6, bias=False).bfloat16()
        use_dense_kernels(nn.Sequential(layer))
        layer(x)
        layer.weight, layer.bias = weight, bias
        return layer

    for weight, its in ((rows, bias), (rows[:4].clone(), None), (rows[:4].clone(), bias)):
        changed = layer(nn.Parameter(weight, requires_grad=False), its)
        for call in (changed, torch.compile(changed, fullgraph=True, backend="aot_eager")):
            assert torch.equal(call(x), nn.functional.linear(x, weight, its))
    transposed = layer(nn.Parameter(rows.t().contiguous(), requires_grad=False), None)
    for call in (transposed, torch.compile(transposed, fullgraph=True, backend="aot_eager")):
        with pytest.raises(Exception, match=r"shapes cannot be multiplied|must have same reduction dim"):
            call(x)


@torch.no_grad()
def test_a_weight_and_a_bias_whose_signs_are_to_be_turned() -> None:
    layer, x = nn.Linear(64, 16).bfloat16(), torch.randn(1, 64).bfloat16()
    use_dense_kernels(nn.Sequential(layer))
    expected = layer(x)
    for name in ("bias", "weight"):
        setattr(layer, name, nn.Parameter(torch._neg_view(getattr(layer, name)), requires_grad=False))
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(layer(x), -expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_a_layer_without_rows() -> None:
    layer = nn.Linear(8, 0).bfloat16()
    use_dense_kernels(nn.Sequential(layer))
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        assert call(torch.randn(2, 8).bfloat16()).shape == (2, 0)


def test_tracing_and_modes_see_a_plain_linear() -> None:
    layer = nn.Linear(16, 8).to(torch.bfloat16).requires_grad_(False)
    layer.__class__ = DenseLinear
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert torch.equal(traced(x), expected)
    graph = make_fx(layer)(x)
    assert torch.equal(graph(x), expected)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 16 * 8
    assert layer.to("meta")(x.to("meta")).is_meta
