"""wandapp::linears: several weights on one input; each result is that of its own operator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from wandapp_kernels import dispatch, ops
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.linears import traced_without_gradients
from wandapp_kernels.ops.running import Weight
from wandapp_kernels.sparsity import BitmapWeight, NMWeight, Pattern, mask_from_scores

K = 40
LAYOUTS = {"nm": "2:4", "bitmap": "", "dense": ""}


def weight(layout: str, rows: int, k: int = K, bias: bool = True, dtype: torch.dtype = torch.float32) -> Weight:
    generator = torch.Generator().manual_seed(rows * 100 + k)
    dense = torch.randn(rows, k, generator=generator).to(dtype)
    dense = dense * mask_from_scores(torch.rand(rows, k, generator=generator), Pattern.parse("2:4"))
    own = torch.randn(rows, generator=generator).to(dtype) if bias else None
    if layout == "nm":
        nm = NMWeight.compress(dense, pattern="2:4")
        return [nm.values, nm.indices], own, rows
    if layout == "bitmap":
        bitmap = BitmapWeight.compress(dense)
        return [bitmap.values, bitmap.bitmap, bitmap.row_offsets], own, rows
    return [dense], own, rows


def alone(x: torch.Tensor, layout: str, one: Weight, k: int = K) -> torch.Tensor:
    tensors, bias, rows = one
    if layout == "dense":
        return functional.linear(x, tensors[0], bias)
    if layout == "nm":
        return ops.nm_linear(x, tensors, bias, rows, k)
    return ops.bitmap_linear(x, tensors, bias, rows, k)


@pytest.fixture(params=["dispatch", "reference"])
def runner(request: pytest.FixtureRequest) -> Iterator[str]:
    """With what dispatch installs, and with what there is without it."""
    if request.param == "dispatch":
        yield request.param
        return
    one = ops.set_runner(ops.running.run_reference)
    several = ops.set_together_runner(ops.running.run_together_reference)
    yield request.param
    ops.set_runner(one)
    ops.set_together_runner(several)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_result_is_that_of_its_own_operator(runner: str, layout: str) -> None:
    for leading, rows in (((1,), [8]), ((2, 3), [8, 24, 5]), ((), [7, 7]), ((0,), [3]), ((2,), [0, 4])):
        weights = [weight(layout, n, bias=n % 2 == 0) for n in rows]
        for x in (torch.randn(*leading, K), torch.randn(K, *leading).movedim(0, -1)):
            found = ops.linears(x, weights, K, LAYOUTS[layout], layout)
            assert len(found) == len(rows)
            for y, one in zip(found, weights, strict=True):
                torch.testing.assert_close(y, alone(x, layout, one), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 20),
)
def test_running_together_changes_no_bit(layout: str, dtype: torch.dtype, rows: list[int], tokens: int) -> None:
    weights = [weight(layout, n, dtype=dtype) for n in rows]
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    together = ops.linears(x, weights, K, LAYOUTS[layout], layout)
    for y, one in zip(together, weights, strict=True):
        assert torch.equal(y, ops.linears(x, [one], K, LAYOUTS[layout], layout)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    weights = [weight(layout, 8), weight(layout, 12, bias=False)]
    tensors = [tensor for own, _, _ in weights for tensor in own]
    arguments = (torch.randn(3, K), tensors, [weights[0][1], None], [8, 12], K, LAYOUTS[layout], layout)
    torch.library.opcheck(torch.ops.wandapp.linears.default, arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate_as_in_dense(bad: float) -> None:
    x = torch.randn(2, K)
    x[1, 3] = bad
    weights = [weight("nm", 8), weight("nm", 4)]
    for y, one in zip(ops.linears(x, weights, K, "2:4", "nm"), weights, strict=True):
        wanted = alone(x, "dense", (weight("dense", one[2])[0], one[1], one[2]))
        torch.testing.assert_close(y, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    one, two = weight("nm", 8), weight("nm", 12)
    operator = torch.ops.wandapp.linears.default
    for x, weights, k, reason in (
        (torch.randn(2, K + 1), [one], K, "last dimension must be in_features"),
        (torch.randn(2, K).bfloat16(), [(one[0], None, 8)], K, "the weight is torch.float32"),
        (torch.randn(2, K), [(one[0], torch.randn(7), 8)], K, "bias is"),
        (torch.zeros(2, K, dtype=torch.int64), [one], K, "only floating types"),
    ):
        with pytest.raises(UsageError, match=reason):
            ops.linears(x, weights, k, "2:4", "nm")
    for tensors, biases, rows in (([*one[0], two[0][0]], [None, None], [8, 12]), (one[0], [], [8]), ([], [], [])):
        with pytest.raises(UsageError, match="cannot be those of"):
            operator(torch.randn(2, K), tensors, biases, rows, K, "2:4", "nm")


def test_a_kept_call_is_never_another_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values changed in place, tensors moved, the choice changed: every result is that of the weight given."""
    x = torch.randn(2, K)
    tensors, bias, rows = weight("nm", 8)

    def check() -> None:
        one = (tensors, bias, rows)
        torch.testing.assert_close(ops.linears(x, [one], K, "2:4", "nm")[0], alone(x, "nm", one))

    check()
    calls = len(dispatch._calls)
    check()
    assert len(dispatch._calls) == calls, "the call was not kept"
    tensors[0].mul_(2)
    check()
    tensors = [tensor.clone() for tensor in tensors]
    check()
    bias = bias.clone()
    bias += 1
    check()
    tensors[0] = tensors[0].T.contiguous().T  # not contiguous: not kept
    calls = len(dispatch._calls)
    check()
    assert len(dispatch._calls) == calls
    tensors[0] = tensors[0].contiguous()
    with dispatch.only("reference"):
        check()
        assert {call.backend.name for calls in dispatch._calls.values() for call in calls} == {"reference-nm"}
    check()
    monkeypatch.setattr(dispatch, "_MOST_CALLS", 2)
    for n in range(4, 12):
        ops.linears(x, [weight("nm", n)], K, "2:4", "nm")
    assert len(dispatch._calls) <= 2


def test_a_weight_and_its_transpose_lie_at_one_address() -> None:
    x, square = torch.randn(2, K), torch.randn(K, K)
    for dense in (square, square.T, square):
        y = ops.linears(x, [([dense], None, K)], K, "", "dense")[0]
        torch.testing.assert_close(y, functional.linear(x, dense), rtol=1e-5, atol=1e-5)


def test_eager_mode_keeps_its_own_way() -> None:
    assert not traced_without_gradients(torch.randn(1, K), torch.randn(3, K))
