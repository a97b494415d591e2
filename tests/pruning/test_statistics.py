from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from wandapp_kernels.errors import NonFiniteError, UsageError
from wandapp_kernels.pruning.regional import RegionalGradient
from wandapp_kernels.pruning.statistics import (
    PROBE_TOKENS,
    InputRecorder,
    LayerStatistics,
    check_weights_finite,
)

HIDDEN, WIDE = 6, 10


class Block(nn.Module):
    """q, k and v read one tensor, o a flattened one, down its own; routed sees some tokens, unused none."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))
            self.o = nn.Linear(HIDDEN, WIDE)
            self.down = nn.Linear(WIDE, HIDDEN, bias=False)
            self.routed = nn.Linear(HIDDEN, HIDDEN, bias=False)
            self.unused = nn.Linear(5, 3)
        self.requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mixed = self.q(hidden) * self.k(hidden).tanh() + self.v(hidden)
        wide = self.o(mixed.reshape(-1, HIDDEN))  # [tokens of all samples, HIDDEN]
        out = hidden + self.down(wide.relu()).reshape(hidden.shape)
        chosen = hidden[..., 0] > 0.5
        if chosen.any():
            out = out.index_put((chosen,), out[chosen] + self.routed(out[chosen]))
        return out

    def linears(self) -> dict[str, nn.Linear]:
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}

    def inputs(self, samples: torch.Tensor) -> dict[str, np.ndarray]:
        """What each Linear reads, in float64, computed without hooks."""
        exact = copy.deepcopy(self).double()
        with torch.no_grad():
            hidden = samples.double()
            mixed = (exact.q(hidden) * exact.k(hidden).tanh() + exact.v(hidden)).reshape(-1, HIDDEN)
            wide = exact.o(mixed).relu()
            flat = hidden.reshape(-1, HIDDEN)
            routed = (flat + exact.down(wide))[flat[:, 0] > 0.5]
        read = {"q": flat, "k": flat, "v": flat, "o": mixed, "down": wide, "routed": routed, "unused": flat[:0, :5]}
        return {name: rows.numpy() for name, rows in read.items()}


def sample_batch(count: int, tokens: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def record(block: Block, samples: torch.Tensor, batch: int, gram: bool, x_norm: str = "sum") -> InputRecorder:
    with torch.no_grad(), InputRecorder(block.linears(), gram=gram, x_norm=x_norm) as recorder:
        for part in samples.split(batch):
            block(part)
            recorder.end_batch(len(part))
    return recorder


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_sums_equal_float64(batch: int, gram: bool) -> None:
    block, samples = Block(), sample_batch(8)
    statistics = record(block, samples, batch, gram).statistics
    assert statistics.keys() == block.linears().keys()
    for name, rows in block.inputs(samples).items():
        found = statistics[name]
        np.testing.assert_allclose(found.sum_squares.numpy(), (rows**2).sum(0), rtol=1e-5, atol=1e-6, err_msg=name)
        assert (found.tokens, found.sequences) == (len(rows), 8), name
        if gram and len(rows):
            assert found.gram is not None
            np.testing.assert_allclose(found.gram.numpy(), rows.T @ rows, rtol=1e-5, atol=1e-4, err_msg=name)
            assert torch.equal(found.sum_squares, found.gram.diagonal())
        else:
            assert found.gram is None
    assert 0 < statistics["routed"].tokens < 72


@pytest.mark.parametrize("gram", [False, True])
def test_batches_add_up_to_one_piece(gram: bool) -> None:
    block, samples = Block(), sample_batch(64, tokens=33)
    whole = record(block, samples, 64, gram).statistics
    for batch in (1, 7):
        for name, found in record(block, samples, batch, gram).statistics.items():
            torch.testing.assert_close(found.sum_squares, whole[name].sum_squares, rtol=1e-6, atol=1e-6)
            if found.gram is not None:
                scale = float(whole[name].sum_squares.max())
                torch.testing.assert_close(found.gram, whole[name].gram, rtol=0, atol=1e-6 * scale)


def test_many_batches_do_not_drift_from_float64() -> None:
    """512 samples one at a time, as the regional gradient runs them: fp32 sums stay within 1e-5."""
    linear = nn.Linear(HIDDEN, 2)
    samples = sample_batch(512, tokens=16, seed=3) + 5.0
    for gram in (False, True):
        with torch.no_grad(), InputRecorder({"layer": linear}, gram=gram) as recorder:
            for sample in samples.split(1):
                linear(sample)
                recorder.end_batch(1)
        exact = samples.double().reshape(-1, HIDDEN).square().sum(0)
        torch.testing.assert_close(recorder.statistics["layer"].sum_squares.double(), exact, rtol=1e-5, atol=0)


def test_layers_that_read_one_tensor_share_their_sums() -> None:
    recorder = record(Block(), sample_batch(4), 2, gram=True)
    q, k, v = (recorder.statistics[name] for name in "qkv")
    assert q.gram is k.gram is v.gram and q.sum_squares is k.sum_squares is v.sum_squares
    assert q.tokens == k.tokens == v.tokens == 36
    assert recorder.statistics["o"].gram is not q.gram


def test_probes_are_the_first_tokens_of_the_first_batch() -> None:
    block, samples = Block(), sample_batch(9, tokens=60)
    recorder = record(block, samples, 8, gram=False)
    read = block.inputs(samples[:8])
    assert recorder.probes["q"] is recorder.probes["k"]
    assert recorder.probes.keys() == read.keys() - {"unused"}
    for name, probe in recorder.probes.items():
        np.testing.assert_allclose(probe.numpy(), read[name][:PROBE_TOKENS], rtol=1e-4, atol=1e-5)


def test_hooks_leave_no_trace() -> None:
    block, samples = Block(), sample_batch(2)
    before = block(samples)
    recorder = record(block, samples, 1, gram=True)
    sums = recorder.statistics["q"].sum_squares.clone()
    assert torch.equal(block(samples), before)
    assert torch.equal(recorder.statistics["q"].sum_squares, sums)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_hooks_are_removed_when_the_forward_fails() -> None:
    block = Block()
    with pytest.raises(UsageError), InputRecorder(block.linears()):
        block(torch.zeros(1, 2, HIDDEN + 1))
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_half_precision_inputs_are_summed_in_fp32() -> None:
    linear = nn.Linear(3, 2, dtype=torch.bfloat16)
    inputs = torch.full((1, 4000, 3), 300.0, dtype=torch.bfloat16)
    with torch.no_grad(), InputRecorder({"layer": linear}) as recorder:
        linear(inputs)
        recorder.end_batch(1)
    sums = recorder.statistics["layer"].sum_squares
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), inputs.double().square().sum((0, 1)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("gram", [False, True])
def test_non_finite_activations_name_the_module_and_the_count(poison: float, gram: bool) -> None:
    linears = {"model.layers.3.fine": nn.Linear(4, 2), "model.layers.3.broken": nn.Linear(4, 2)}
    inputs = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    broken = inputs.clone()
    broken[0, 1, 2] = broken[1, 4, 2] = broken[1, 4, 0] = poison
    with (
        pytest.raises(NonFiniteError, match=r"^2 of 4 input channels of model\.layers\.3\.broken "),
        torch.no_grad(),
        InputRecorder(linears, gram=gram) as recorder,
    ):
        linears["model.layers.3.fine"](inputs)
        linears["model.layers.3.broken"](broken)
        recorder.end_batch(2)


def test_norm_conventions() -> None:
    statistics = LayerStatistics(torch.tensor([36.0, 0.0]), sequences=4)
    assert statistics.norm().tolist() == [6.0, 0.0]
    assert statistics.norm("mean").tolist() == [3.0, 0.0]
    statistics.x_norm = "mean"
    assert statistics.norm().tolist() == [3.0, 0.0]
    assert statistics.norm("sum").tolist() == [6.0, 0.0]
    assert statistics.dead_channels == 1
    assert LayerStatistics(torch.zeros(2), x_norm="mean").norm().tolist() == [0.0, 0.0]


def test_a_layer_never_reached_has_only_dead_channels() -> None:
    found = record(Block(), sample_batch(2), 1, gram=False).statistics["unused"]
    assert (found.tokens, found.sequences, found.dead_channels) == (0, 2, 5)


@pytest.mark.parametrize("poison", [float("nan"), -float("inf")])
def test_non_finite_weights_name_the_module_and_the_count(poison: float) -> None:
    linears = Block().linears()
    check_weights_finite(linears)
    linears["down"].weight[2, 1] = linears["down"].weight[0, 0] = poison
    with pytest.raises(NonFiniteError, match=r"^2 of 60 weights of down "):
        check_weights_finite(linears)


def naive_regional_gradient(block: Block, samples: torch.Tensor) -> dict[str, np.ndarray]:
    """RMS over samples of ``∂‖f(X_n)‖₂ / ∂W``, each by central differences in float64."""
    exact, step = copy.deepcopy(block).double(), 1e-5
    squares = {name: np.zeros(linear.weight.shape) for name, linear in exact.linears().items()}
    with torch.no_grad():
        for sample in samples.double().split(1):
            for name, linear in exact.linears().items():
                for i, j in np.ndindex(*linear.weight.shape):
                    value = linear.weight[i, j].item()
                    norms = []
                    for moved in (value + step, value - step):
                        linear.weight[i, j] = moved
                        norms.append(float(exact(sample).square().sum()) ** 0.5)
                    linear.weight[i, j] = value
                    squares[name][i, j] += ((norms[0] - norms[1]) / (2 * step)) ** 2
    return {name: np.sqrt(total / len(samples)) for name, total in squares.items()}


def regional_gradient(block: Block, samples: torch.Tensor) -> dict[str, torch.Tensor]:
    accumulator = RegionalGradient(block.linears())
    with torch.no_grad():  # as the walk runs it
        for sample in samples.split(1):
            output = accumulator.add(lambda sample=sample: block(sample))
            assert torch.equal(output, block(sample)) and not output.requires_grad
    return accumulator.root_mean_square()


def test_regional_gradient_is_the_rms_over_samples_of_finite_differences() -> None:
    block, samples = Block(), sample_batch(4, tokens=3)
    found = regional_gradient(block, samples)
    for name, expected in naive_regional_gradient(block, samples).items():
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-3, atol=1e-5, err_msg=name)
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert found["unused"].abs().sum() == 0


def test_an_expert_that_no_sample_reaches_has_no_gradient_and_a_rare_one_a_small_one() -> None:
    block, samples = Block(), sample_batch(4, tokens=3)
    samples[..., 0] = 0.0
    assert not regional_gradient(block, samples)["routed"].any()
    samples[0, 0, 0] = 1.0
    once = regional_gradient(block, samples[:1])["routed"]
    torch.testing.assert_close(regional_gradient(block, samples)["routed"], once / 2)  # sqrt(1/4 · g²)


def test_regional_gradient_runs_inside_a_recorder() -> None:
    block, samples = Block(), sample_batch(3)
    accumulator = RegionalGradient(block.linears())
    with torch.no_grad(), InputRecorder(block.linears(), gram=True) as recorder:
        for sample in samples.split(1):
            accumulator.add(lambda sample=sample: block(sample))
            recorder.end_batch(1)
    plain = record(block, samples, 1, gram=True)
    for name, found in recorder.statistics.items():
        assert torch.equal(found.sum_squares, plain.statistics[name].sum_squares)
        assert not found.sum_squares.requires_grad
    alone = regional_gradient(block, samples)
    assert all(torch.equal(g, alone[name]) for name, g in accumulator.root_mean_square().items())


def test_a_non_finite_regional_gradient_names_the_module() -> None:
    block = Block()
    block.o.weight *= 1e25  # finite outputs, but the squares of down's gradients overflow
    block.down.weight *= 1e-25
    accumulator = RegionalGradient(block.linears())
    accumulator.add(lambda: block(sample_batch(1)))
    with pytest.raises(NonFiniteError, match="of 60 regional gradients of down are NaN or infinite"):
        accumulator.root_mean_square()
    assert not any(parameter.requires_grad for parameter in block.parameters())
