"""The 2:4 decode kernel, unchanged, on emulated lanes under sanitizers, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from emulator import EmulationError, Emulator
from nm_problem import LAYOUT, NIBBLES, Problem, bits

from wandapp_kernels.backends.cuda.plan import refusal
from wandapp_kernels.sparsity.nm_weight import NMWeight

FP16, BF16 = torch.float16, torch.bfloat16


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("m", range(1, 18))
def test_every_number_of_tokens(emulator: Emulator, m: int, dtype: torch.dtype) -> None:
    problem = Problem.random(n=5, k=72, m=m, dtype=dtype, bias=m % 2 == 0)
    problem.check(problem.run(emulator))


# Columns around multiples of 4 (group), 8 (16-byte copies), 64 (block) and 512 (round); rows around 16 and 64.
SHAPES = [
    (1, 1),
    (1, 2),
    (2, 3),
    (3, 4),
    (1, 64),
    (15, 61),
    (16, 63),
    (17, 65),
    (33, 66),
    (64, 67),
    (63, 128),
    (65, 513),
]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("pair", [False, True])
def test_awkward_shapes(emulator: Emulator, n: int, k: int, pair: bool) -> None:
    problem = Problem.random(n, k, m=3, dtype=FP16 if n % 2 else BF16, pair=pair, bias=k % 2 == 1)
    problem.check(problem.run(emulator))


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("m", [7, 13, 20, 40])
def test_every_entry_point_over_several_rounds(emulator: Emulator, m: int, dtype: torch.dtype, pair: bool) -> None:
    problem = Problem.random(n=17, k=580 if pair else 1160, m=m, dtype=dtype, pair=pair, bias=True)
    problem.check(problem.run(emulator))


@pytest.mark.parametrize(("splits", "pair"), [(2, False), (3, True), (5, False), (11, False)])
def test_splits_in_any_order_give_the_same_bits(emulator: Emulator, splits: int, pair: bool) -> None:
    problem = Problem.random(n=20, k=690, m=9, pair=pair, bias=True)
    forward = problem.run(emulator, problem.chosen(splits))
    problem.check(forward)
    backward = problem.run(emulator, problem.chosen(splits), order=1)
    assert torch.equal(forward.view(torch.int16), backward.view(torch.int16))


@pytest.mark.parametrize("m", [3, 40])
def test_tiles_that_sum_at_the_same_time_do_not_meet(emulator: Emulator, m: int) -> None:
    problem = Problem.random(n=130, k=128, m=m)
    problem.check(problem.run(emulator, problem.chosen(2), order=2))


def test_counters_end_at_zero_and_a_second_launch_is_the_same(emulator: Emulator) -> None:
    problem = Problem.random(n=70, k=200, m=2)
    first = problem.launch(problem.chosen(3))
    arrays = emulator.run(first)
    workspace = arrays[-1]
    assert workspace.dtype == np.uint32 and not workspace.any()
    second = replace(first, arguments=[*first.arguments[:5], *arrays[-2:], *first.arguments[7:]])
    assert np.array_equal(emulator.run(second)[3], arrays[3])


@pytest.mark.parametrize("columns", [64, 61])
def test_all_six_nibbles_in_every_position(emulator: Emulator, columns: int) -> None:
    rows = 64
    groups = -(-columns // 4)
    number = torch.arange(rows * groups).view(rows, groups)
    for shift in range(6):
        positions = NIBBLES[(number + number // groups + shift) % 6]
        mask = torch.zeros(rows, groups, 4, dtype=torch.bool).scatter_(2, positions, True).flatten(1)[:, :columns]
        dense = (torch.arange(rows * columns).view(rows, columns) % 15 - 7).to(BF16) * mask
        weight = NMWeight.compress(dense, mask)
        x = (torch.arange(8 * columns).view(8, columns) % 13 - 6).to(BF16)
        y = Problem([weight], x, [None]).run(emulator)
        assert torch.equal(y.double(), (x.double() @ dense.double().T).to(BF16).double())


def test_groups_with_no_and_one_non_zero(emulator: Emulator) -> None:
    dense = torch.zeros(40, 136, dtype=FP16)
    for row in range(1, 40):
        dense[row, row % 4 :: 4 * (1 + row % 3)] = float(row)
    problem = Problem(
        [NMWeight.compress(dense)], torch.randn(4, 136, generator=torch.Generator().manual_seed(1)).half(), [None]
    )
    y = problem.run(emulator)
    problem.check(y)
    assert not y[:, 0].any()


def test_signed_zeros_are_products_like_any_other(emulator: Emulator) -> None:
    problem = Problem.random(n=8, k=16, m=2, dtype=FP16)
    problem.x = torch.full((2, 16), -0.0, dtype=FP16)
    assert not problem.run(emulator).any()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_activations_stay_in_their_token_and_column(emulator: Emulator, special: float) -> None:
    problem = Problem.random(n=70, k=150, m=10, dtype=BF16)
    problem.x[6, 9] = special
    problem.x[9, 3] = special
    y = problem.run(emulator, problem.chosen(2))
    problem.check(y)
    assert y[[0, 1, 2, 3, 4, 5, 7, 8]].isfinite().all()
    assert not y[6].isfinite().all() and y[6].isfinite().any()


def test_swiglu_of_extreme_gates(emulator: Emulator) -> None:
    ones = NMWeight.compress(torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 6).to(BF16))
    bias = torch.tensor([-200.0, -88.0, 0.0, 88.0, 200.0, 30000.0]).to(BF16)
    problem = Problem([ones, ones], torch.zeros(1, 4, dtype=BF16), [bias, torch.ones(6, dtype=BF16)])
    problem.check(problem.run(emulator))


def test_unaligned_activations_take_the_element_path(emulator: Emulator) -> None:
    problem = Problem.random(n=20, k=136, m=5, dtype=FP16)
    aligned = problem.run(emulator)
    assert torch.equal(problem.run(emulator, x_offset=2).view(torch.int16), aligned.view(torch.int16))


def test_unaligned_weights_are_refused(emulator: Emulator) -> None:
    problem = Problem.random(n=20, k=64, m=2)
    with pytest.raises(EmulationError, match="not a multiple"):
        problem.run(emulator, weight_offset=8)
    values, metadata = LAYOUT.pack(problem.weights[0])
    shifted = torch.empty(values.numel() + 4, dtype=values.dtype)[4:].view_as(values)
    shifted.copy_(values)
    assert "multiple of 16 bytes" in str(refusal(problem.x, [shifted, metadata], None, (20, 64)))
    assert refusal(problem.x, [values, metadata], None, (20, 64)) is None


def test_a_workspace_too_small_is_an_error(emulator: Emulator) -> None:
    problem = Problem.random(n=64, k=128, m=1)
    chosen = problem.chosen(2)
    with pytest.raises(EmulationError, match="heap-buffer-overflow"):
        problem.run(emulator, replace(chosen, partials=chosen.partials // 2))


def test_nothing_outside_the_tensors_is_needed(emulator: Emulator) -> None:
    """Weights, activations and output end exactly where the emulated buffers end: one element less is caught."""
    problem = Problem.random(n=3, k=9, m=2)
    launch = problem.launch(problem.chosen())
    for index in (0, 1, 2, 4):
        arguments = list(launch.arguments)
        array = np.asarray(arguments[index]).reshape(-1)
        arguments[index] = array[:-1].copy()
        with pytest.raises(EmulationError, match="heap-buffer-overflow"):
            emulator.run(replace(launch, arguments=arguments))


def test_other_tensors_are_refused() -> None:
    problem = Problem.random(n=20, k=64, m=2)
    tensors = LAYOUT.pack(problem.weights[0])
    wrong = [
        (problem.x.float(), tensors, None, "float32"),
        (problem.x[:, :60].contiguous(), tensors, None, "60"),
        (problem.x, [tensors[0].half(), tensors[1]], None, "values"),
        (problem.x, [tensors[0], tensors[1].long()], None, "metadata"),
        (problem.x, [tensors[0][:, :, :1], tensors[1]], None, "values"),
        (problem.x.T.contiguous().T, tensors, None, "not contiguous"),
        (problem.x, tensors, torch.zeros(19, dtype=BF16), "bias"),
        (problem.x.to("meta"), tensors, None, "on cpu"),
    ]
    for x, packed, bias, word in wrong:
        assert word in str(refusal(x, packed, bias, (20, 64)))
    assert bits(problem.x).dtype == np.uint16
