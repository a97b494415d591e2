"""The kernels for unstructured weights, emulated: numbers, races, waits, bounds (under Address- and UB-Sanitizer)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitmap_problem import BitmapProblem, Cut, bits, from_bits
from emulator import EmulationError

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def check(problem: BitmapProblem, out: torch.Tensor) -> None:
    """One rounding of the result, and of fp32 sums that may cancel."""
    reference = problem.reference
    magnitude = problem.x.double().abs() @ problem.weight.decompress().double().abs().T
    tolerance = ROUNDING[problem.x.dtype] * reference.abs() + 2.0**-20 * (magnitude + 1)
    worst = ((out.double() - reference).abs() / tolerance).max()
    assert worst <= 1, f"{worst} times the rounding error at {(out.double() - reference).abs().argmax()}"


AWKWARD = [
    # tokens, rows, columns, density
    (1, 1, 8, 0.5),
    (1, 17, 200, 0.5),
    (2, 16, 128, 1.0),
    (3, 33, 1000, 0.3),
    (5, 40, 136, 0.0),
    (7, 47, 264, 0.7),
    (8, 16, 1032, 0.5),
    (9, 64, 384, 0.5),
    (13, 31, 129, 0.4),
    (16, 80, 515, 0.6),
]


@pytest.mark.parametrize(("tokens", "rows", "columns", "density"), AWKWARD)
def test_decode_on_awkward_shapes(emulator, tokens, rows, columns, density):
    dtype = torch.float16 if tokens % 2 else torch.bfloat16
    problem = BitmapProblem(tokens, rows, columns, density, dtype, bias=rows % 2 == 0, seed=tokens)
    check(problem, problem.out(emulator.run(problem.decode())))


@pytest.mark.parametrize("cut", [Cut(1, 1, 1), Cut(1, 2, 4), Cut(2, 2, 3), Cut(4, 2, 2), Cut(3, 1, 7)])
def test_every_cut_gives_the_same_sum_in_any_order(emulator, cut):
    problem = BitmapProblem(6, 50, 900, 0.5, torch.float16)
    first = problem.out(emulator.run(problem.decode(cut)))
    last = problem.out(emulator.run(problem.decode(cut, reversed=True)))
    check(problem, first)
    assert torch.equal(first, last)


def test_counters_are_left_as_zeros(emulator):
    problem = BitmapProblem(4, 20, 700)
    results = emulator.run(problem.decode(Cut(1, 2, 3)))
    assert results[-1].dtype == np.uint32
    assert not results[-1].any()


def test_infinite_and_nan_activations_reach_every_output_as_in_a_dense_product(emulator):
    problem = BitmapProblem(3, 20, 140)
    problem.x[1, 7] = torch.inf
    problem.x[2, 139] = torch.nan
    out = problem.out(emulator.run(problem.decode()))
    clean = BitmapProblem(3, 20, 140)
    assert torch.equal(out[0], clean.out(emulator.run(clean.decode()))[0])
    assert torch.equal(out.isnan(), problem.reference.isnan())
    assert torch.equal(out.isinf(), problem.reference.isinf())


def test_signs_of_zero_and_smallest_numbers_survive(emulator):
    problem = BitmapProblem(1, 18, 130, 0.6, torch.float16)
    values = problem.weight.values
    values[::3] = torch.tensor(2.0**-24, dtype=torch.float16)
    values[1::7] = -0.0
    problem.tensors = type(problem).__init__.__globals__["BitmapMmaLayout"]().pack(problem.weight)
    dense = from_bits(emulator.run(problem.decompress())[-1], torch.float16)
    assert np.array_equal(bits(dense), bits(problem.weight.decompress()))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 128), (17, 136), (35, 77), (20, 260)])
def test_decompress(emulator, rows, columns):
    problem = BitmapProblem(1, rows, columns, 0.5, torch.bfloat16, seed=rows)
    dense = emulator.run(problem.decompress())[-1]
    assert np.array_equal(dense, bits(problem.weight.decompress()))


def test_a_value_that_is_missing_is_not_read_from_elsewhere(emulator):
    problem = BitmapProblem(1, 16, 128, 0.5)
    launch = problem.decode(Cut(1, 1, 1))
    launch.arguments[0] = launch.arguments[0][:-8]
    with pytest.raises(EmulationError, match="AddressSanitizer"):
        emulator.run(launch)
