"""torch.compile with the backend "wandapp": the same tokens, and layers that share an input as one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from pruned_models import pruned_linear, pruned_model
from tiny_models import tiny_model, token_ids
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.utils import run_and_get_code

from wandapp_kernels import ops
from wandapp_kernels.errors import KernelError, UsageError
from wandapp_kernels.runtime import SparseLinear, sparsify
from wandapp_kernels.runtime.compiling import compile_config, compile_graph, run_together
from wandapp_kernels.runtime.dense_linear import use_dense_kernels
from wandapp_kernels.runtime.generation import compile_decode, generate_timed


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many weights each call of the operator had."""
    found: list[int] = []

    def spy(x: torch.Tensor, weights: Sequence[Any], *rest: Any) -> list[torch.Tensor]:
        found.append(len(weights))
        return before(x, weights, *rest)

    before = ops.set_together_runner(spy)
    yield found
    ops.set_together_runner(before)


class Block(nn.Module):
    """Layers on one input, with something between two of them."""

    def __init__(self, between: Callable[[torch.Tensor], Any] = lambda x: None, kind: str = "2:4"):
        super().__init__()
        self.layers = nn.ModuleList(SparseLinear.from_linear(pruned_linear(n, 16, kind)) for n in (8, 12, 8))
        self.other = SparseLinear.from_linear(pruned_linear(8, 16, kind, bias=False))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = self.layers
        y = first(x).relu()
        self.between(x)
        return torch.cat([y, *(layer(x) for layer in rest), self.other(x + 1)], -1)


def compiled(module: nn.Module) -> tuple[Callable[..., torch.Tensor], list[int]]:
    saved: list[int] = []

    def backend(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        saved.append(run_together(graph))
        return aot_eager(graph, inputs)

    return torch.compile(module, backend=backend, fullgraph=True), saved


@pytest.mark.parametrize("kind", ["2:4", "60%"])
@torch.no_grad()
def test_layers_on_one_input_run_as_one_call(groups: list[int], kind: str) -> None:
    block = Block(kind=kind)
    fast, saved = compiled(block)
    for tokens in (1, 3, 20):
        x = torch.randn(2, tokens, 16)
        torch.testing.assert_close(fast(x), block(x))
    assert set(saved) == {2} and groups == [3, 1] * 3


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x.__setitem__((..., 0), 1.0),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch.ops.aten.add_.Tensor(x, 1),
    ],
)
@torch.no_grad()
def test_not_across_a_write(groups: list[int], write: Callable[[torch.Tensor], Any]) -> None:
    fast, saved = compiled(Block(write))
    x = torch.randn(2, 16)
    wanted = Block(write)(x.clone())
    torch.testing.assert_close(fast(x.clone()), wanted)
    assert saved == [1] and groups == [1, 2, 1]


@torch.no_grad()
def test_a_weight_that_is_made_later_is_not_used_earlier(groups: list[int]) -> None:
    layers = [SparseLinear.from_linear(pruned_linear(n, 16)) for n in (8, 12)]

    def run(x: torch.Tensor) -> torch.Tensor:
        (values, indices), bias = layers[1]._tensors(), layers[1].bias
        y = ops.linears(x, [(layers[0]._tensors(), None, 8)], 16, "2:4", "nm")[0]
        z = ops.linears(x, [([values * y.sum(), indices], bias, 12)], 16, "2:4", "nm")[0]
        return torch.cat([y, z], -1)

    x = torch.randn(2, 16)
    wanted = run(x)
    groups.clear()
    fast, saved = compiled(run)
    torch.testing.assert_close(fast(x), wanted)
    assert saved == [0] and groups == [1, 1]


def test_gradients_and_autocast_take_the_operator_that_knows_them(groups: list[int]) -> None:
    block = Block()
    fast, _ = compiled(block)
    x, same = (torch.ones(2, 16, requires_grad=True) for _ in range(2))
    fast(x).sum().backward()
    block(same).sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(torch.ones(2, 16)).dtype == torch.bfloat16
    assert groups == []


@torch.no_grad()
def test_dense_layers_in_16_bit_call_our_kernel(groups: list[int]) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    assert use_dense_kernels(model)
    for dtype, calls in ((torch.float32, 0), (torch.bfloat16, 2)):
        model.to(dtype)
        x = torch.randn(3, 16, dtype=dtype)
        groups.clear()
        torch.testing.assert_close(torch.compile(model, backend=aot_eager, fullgraph=True)(x), model(x))
        assert groups == [1] * calls


@pytest.mark.parametrize("swapped", [False, True])
def test_a_compiled_decode_writes_the_same_tokens(groups: list[int], swapped: bool) -> None:
    """With Inductor, as a user gets it."""
    model = pruned_model("llama", ("2:4",), num_hidden_layers=2)
    ids = token_ids(2, 5)
    expected = generate_timed(model, ids, 8, stop=False).tokens
    if swapped:
        sparsify(model)
    compile_decode(model, ids, 8)
    groups.clear()
    done = generate_timed(model, ids, 8, compiled=True, stop=False)
    assert torch.equal(done.tokens, expected)
    # q, k, v; o; gate, up; down: of 2 blocks, at each of the 7 tokens after the prefill
    assert groups == [3, 1, 2, 1] * 2 * 7 * swapped


@torch.no_grad()
def test_torch_finds_the_backend_by_name() -> None:
    block = Block()
    x = torch.randn(2, 16)
    fast = torch.compile(block, backend="wandapp", options={"max_autotune": False})
    torch.testing.assert_close(fast(x), block(x))


@torch.no_grad()
def test_generated_code_does_not_go_through_torchs_dispatcher(groups: list[int]) -> None:
    pytest.importorskip("torch._inductor.codegen.custom_extern_kernel_codegen", reason="this torch has no hook for it")
    block = Block()
    x = torch.randn(2, 16)
    with torch._inductor.config.patch(fx_graph_cache=False):
        y, code = run_and_get_code(torch.compile(block, backend="wandapp"), x)
    torch.testing.assert_close(y, block(x))
    assert groups == [3, 1]
    called = "\n".join(code)
    assert called.count("= torch.ops.wandapp.linears_now(") == 2 and "torch.ops.wandapp.linears.default(" not in called


def test_the_configuration_is_that_of_the_device() -> None:
    cpu, gpu = compile_config("cpu").to_dict(), compile_config("cuda:0").to_dict()
    assert cpu.pop("mode") == "default" and gpu.pop("mode") == "reduce-overhead"
    assert cpu == gpu == {"fullgraph": False, "dynamic": False, "backend": compile_graph, "options": None}


def test_why_it_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), token_ids(1, 4)
    with pytest.raises(UsageError, match="choose the static cache"):
        generate_timed(model, ids, 4, cache="dynamic", compiled=True)
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_: False)
    with pytest.raises(KernelError, match="LlamaForCausalLM, which has no cache of fixed size"):
        compile_decode(model, ids, 4)
    monkeypatch.undo()
    monkeypatch.setattr("wandapp_kernels.runtime.compiling.run_together", lambda _graph: 1 / 0)
    with pytest.raises(KernelError, match=r"cannot be compiled \(.*ZeroDivisionError"):
        compile_decode(model, ids, 4)
