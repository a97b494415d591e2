"""Both sparse linear operators: numbers against float64, gradients, tracing, autocast, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from wandapp_kernels import ops
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops import running
from wandapp_kernels.sparsity import BitmapWeight, NMWeight, Pattern, mask_from_scores

OPERATORS = ("nm_linear", "bitmap_linear")
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
N, K = 24, 36


@pytest.fixture(autouse=True)
def reference_runner() -> Iterator[None]:
    """These tests are about the operators; what dispatch chooses is tested there."""
    previous = ops.set_runner(running.run_reference)
    yield
    ops.set_runner(previous)


def sparse(operator: str, n: int = N, k: int = K, dtype: torch.dtype = torch.float32, pattern: str = "2:4") -> tuple:
    """Dense weight with zeros, its compressed tensors, and a function that calls the operator on x and bias."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    dense = torch.randn((n, k), generator=generator).to(dtype)
    if n and k:
        dense = dense * mask_from_scores(torch.rand((n, k), generator=generator), Pattern.parse(pattern))
    if operator == "nm_linear":
        compressed = NMWeight.compress(dense, pattern=pattern)
        tensors = [compressed.values, compressed.indices]
        return dense, tensors, lambda x, bias=None: ops.nm_linear(x, tensors, bias, n, k, pattern)
    bitmap = BitmapWeight.compress(dense)
    tensors = [bitmap.values, bitmap.bitmap, bitmap.row_offsets]
    return dense, tensors, lambda x, bias=None: ops.bitmap_linear(x, tensors, bias, n, k)


def arguments(operator: str, x: torch.Tensor, tensors: list[torch.Tensor], bias: torch.Tensor | None) -> tuple:
    names = ("2:4", "nm") if operator == "nm_linear" else ("bitmap",)
    return (x, tensors, bias, N, K, *names)


def overload(operator: str) -> Callable[..., torch.Tensor]:
    return getattr(torch.ops.wandapp, operator).default


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(OPERATORS),
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 17),
    st.integers(0, 33),
    st.sampled_from(["2:4", "4:8", "1:3"]),
    st.booleans(),
)
def test_equals_float64(
    operator: str, dtype: torch.dtype, leading: list[int], n: int, k: int, pattern: str, with_bias: bool
) -> None:
    dense, _, call = sparse(operator, n, k, dtype, pattern)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((*leading, k), generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if with_bias else None
    wanted = functional.linear(x.double(), dense.double(), None if bias is None else bias.double())
    got = call(x, bias)
    assert got.dtype == dtype and got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_reference_is_rounded_only_once(operator: str) -> None:
    """In bf16 the sum of 1 and many small products is lost unless it is kept in float32."""
    k = 512
    dense = torch.full((1, k), 2.0**-9, dtype=torch.bfloat16)
    dense[0, 0] = 1.0
    if operator == "nm_linear":
        dense[0].view(-1, 4)[:, 2:] = 0
        got = ops.nm_linear_reference(torch.ones(1, k, dtype=torch.bfloat16), NMWeight.compress(dense))
    else:
        got = ops.bitmap_linear_reference(torch.ones(1, k, dtype=torch.bfloat16), BitmapWeight.compress(dense))
    assert got.item() == dense.double().sum().to(torch.bfloat16).item()
    assert got.item() > 1.4


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_a_weight_of_another_type_is_cast_to_that_of_x(operator: str, storage: torch.dtype) -> None:
    dense, _, _ = sparse(operator)
    dense = (dense * 4).round().to(storage)
    if operator == "nm_linear":
        weight = NMWeight.compress(dense)
        got = ops.nm_linear(torch.eye(K), [weight.values, weight.indices], None, N, K)
    else:
        bitmap = BitmapWeight.compress(dense)
        got = ops.bitmap_linear(torch.eye(K), [bitmap.values, bitmap.bitmap, bitmap.row_offsets], None, N, K)
    assert torch.equal(got, dense.float().T)


@pytest.mark.parametrize("operator", OPERATORS)
def test_any_strides(operator: str) -> None:
    dense, _, call = sparse(operator)
    for x in (torch.randn(K, 5).T, torch.randn(2, 3, 2 * K)[..., ::2], torch.randn(K).expand(4, K), torch.randn(K)):
        torch.testing.assert_close(call(x), functional.linear(x, dense))


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_reach_x_and_bias_twice(operator: str) -> None:
    dense, tensors, call = sparse(operator, dtype=torch.float64)
    x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(N, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(call, (x, bias), fast_mode=True)
    torch.autograd.gradgradcheck(call, (x, bias), fast_mode=True)
    call(x, bias).square().sum().backward()
    grad_x, grad_bias = x.grad, bias.grad
    x.grad = bias.grad = None
    functional.linear(x, dense, bias).square().sum().backward()
    torch.testing.assert_close(grad_x, x.grad)
    torch.testing.assert_close(grad_bias, bias.grad)
    assert all(tensor.grad is None for tensor in tensors)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("wanted", ["x", "bias"])
def test_only_what_asks_for_a_gradient_gets_one(operator: str, wanted: str) -> None:
    _, _, call = sparse(operator)
    x, bias = torch.randn(3, K, requires_grad=wanted == "x"), torch.randn(N, requires_grad=wanted == "bias")
    call(x, bias).sum().backward()
    assert (x.grad is not None) == (wanted == "x") and (bias.grad is not None) == (wanted == "bias")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("tokens", "grad", "with_bias"), [(0, False, True), (1, False, False), (5, True, True)])
def test_opcheck(operator: str, tokens: int, grad: bool, with_bias: bool) -> None:
    _, tensors, _ = sparse(operator)
    x = torch.randn(2, tokens, K, requires_grad=grad)
    bias = torch.randn(N, requires_grad=grad) if with_bias else None
    torch.library.opcheck(overload(operator), arguments(operator, x, tensors, bias))


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck_of_decompress(operator: str) -> None:
    dense, tensors, _ = sparse(operator)
    sample = (tensors, N, K, "2:4", "nm") if operator == "nm_linear" else (tensors, N, K, "", "bitmap")
    torch.library.opcheck(torch.ops.wandapp.decompress.default, (*sample, torch.bfloat16))
    assert torch.equal(ops.decompress(*sample, torch.float32), dense)


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_as_one_graph_for_every_number_of_tokens(operator: str) -> None:
    torch.compiler.reset()
    dense, _, call = sparse(operator)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    bias = torch.randn(N, requires_grad=True)
    compiled = torch.compile(lambda x: call(x, bias).relu(), fullgraph=True, dynamic=True, backend=backend)
    for tokens in (3, 4, 17):
        x = torch.randn(2, tokens, K, requires_grad=True)
        compiled(x).sum().backward()
        grad, x.grad = x.grad, None
        wanted = functional.linear(x, dense, bias).relu()
        wanted.sum().backward()
        torch.testing.assert_close(compiled(x), wanted)
        torch.testing.assert_close(grad, x.grad)
    assert len(graphs) == 1, "every number of tokens was compiled anew"
    with torch.no_grad():
        x = torch.randn(2, 4, K)
        torch.testing.assert_close(compiled(x), functional.linear(x, dense, bias).relu())


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_casts_as_linear_does(operator: str) -> None:
    dense, _, call = sparse(operator)
    bias = torch.randn(N)
    for dtype in (torch.float32, torch.float16, torch.float64):
        weight = dense.double() if dtype == torch.float64 else dense
        x = torch.randn(3, K, dtype=dtype, requires_grad=True)
        matching = bias.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = call(x, matching), functional.linear(x, weight, matching.to(weight.dtype))
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=4e-2, atol=4e-2)
        got.sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_in_x_propagate_as_in_dense(operator: str, bad: float) -> None:
    dense, _, call = sparse(operator)
    x = torch.randn(3, K)
    x[1, 7] = bad
    got, wanted = call(x), functional.linear(x, dense)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert bool(got[[0, 2]].isfinite().all()) and not bool(got[1].isfinite().any())


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_does_not_fit_is_refused(operator: str) -> None:
    _, _, call = sparse(operator)
    x = torch.randn(3, K)
    for wrong, message in (
        ((torch.randn(3, K + 1),), f"last dimension must be in_features = {K}"),
        ((torch.tensor(1.0),), "last dimension"),
        ((torch.ones(3, K, dtype=torch.int64),), "x is torch.int64"),
        ((torch.randn(3, K, device="meta"),), "x is on meta, but the weight is on cpu"),
        ((x, torch.randn(N + 1)), rf"bias is torch.float32 \({N + 1},\) .* \({N},\)"),
        ((x, torch.randn(N, dtype=torch.float64)), "bias is torch.float64"),
        ((x, torch.randn(N, device="meta")), "on meta"),
    ):
        with pytest.raises(UsageError, match=message):
            call(*wrong)


@pytest.mark.parametrize("operator", OPERATORS)
def test_plain_calls_skip_the_dispatcher_and_traced_ones_do_not(operator: str) -> None:
    _, _, call = sparse(operator)
    x = torch.randn(3, K)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = call(x)
    assert f"wandapp.{operator}.default" in seen
    assert torch.equal(watched, call(x))
    calls = []
    previous = ops.set_runner(lambda *everything: calls.append(everything) or previous(*everything))
    call(x)
    assert len(calls) == 1


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_installed_runner_gets_contiguous_rows_and_only_work_worth_doing(operator: str) -> None:
    _, _, call = sparse(operator)
    calls = []

    def runner(x: torch.Tensor, tensors: object, bias: object, n: int, k: int, pattern: str, layout: str):
        calls.append((tuple(x.shape), x.is_contiguous(), n, k, pattern, layout))
        return x.new_zeros(x.shape[0], n)

    ops.set_runner(runner)
    assert call(torch.randn(K, 2, 3).movedim(0, 2)).shape == (2, 3, N)
    assert call(torch.randn(K, 5).T).shape == (5, N)
    assert call(torch.randn(0, K)).shape == (0, N)
    names = ("2:4", "nm") if operator == "nm_linear" else ("", "bitmap")
    assert calls == [((tokens, K), True, N, K, *names) for tokens in (6, 5)]


def test_vmap_is_refused_rather_than_run_on_hidden_memory() -> None:
    _, _, call = sparse("nm_linear")
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(call)(torch.randn(4, 3, K))
