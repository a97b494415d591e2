"""The packing kernels of unstructured weights, emulated: the bits that torch packs, from any bits, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitmap_packing_problem import SHAPES, PackingProblem
from bitmap_problem import bits
from emulator import EmulationError

from wandapp_kernels.backends.cuda.bitmap_layout import to_panels
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert [one.shape for one in found] == [one.shape for one in expected]
    assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_packing_is_what_torch_packs_and_unpacking_its_inverse(emulator, rows, columns, density):
    problem = PackingProblem(rows, columns, density)
    same(problem.packed_words(emulator), problem.expected_words())
    same(problem.unpacked_words(emulator), problem.expected_bitmap())
    same([problem.packed_values(emulator)], [bits(problem.tensors[0])])
    same([problem.unpacked_values(emulator)], [bits(problem.weight.values)])


def test_rows_that_keep_nothing_and_rows_that_keep_all(emulator):
    problem = PackingProblem(35, 300, 0.5, empty=(0, 15, 16, 20), full=(1, 17, 34))
    same(problem.packed_words(emulator), problem.expected_words())
    same(problem.unpacked_words(emulator), problem.expected_bitmap())
    same([problem.packed_values(emulator)], [bits(problem.tensors[0])])
    same([problem.unpacked_values(emulator)], [bits(problem.weight.values)])


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_of_threads_and_ctas_changes_nothing(emulator, order):
    problem = PackingProblem(20, 1500, 0.4, order=order)
    same(problem.packed_words(emulator), problem.expected_words())
    same([problem.packed_values(emulator)], [bits(problem.tensors[0])])


def test_any_bits_are_carried(emulator):
    """NaN with a payload, infinities, -0.0 and subnormal numbers: a value is 16 bits, no number."""
    problem = PackingProblem(16, 256, 1.0)
    wanted = np.arange(16 * 256, dtype=np.uint16) * 16 + 5
    wanted[[0, 700, 4095]] = 0x8000, 0x7FC1, 0xFF80
    packed = problem.packed_values(emulator, wanted)
    dense = torch.from_numpy(wanted.view(np.int16)).view(16, 256)
    assert np.array_equal(packed, to_panels(dense).reshape(-1).numpy().view(np.uint16))
    assert np.array_equal(problem.unpacked_values(emulator, packed), wanted)


def test_bits_outside_the_weight_count_as_removed(emulator):
    problem = PackingProblem(19, 132, 0.6)
    clean = problem.expected_words(), problem.expected_bitmap()
    problem.bitmap[:, -1] |= 0xF0  # columns 132 to 135
    same(problem.packed_words(emulator), clean[0])
    same([problem.packed_values(emulator)], [bits(problem.tensors[0])])
    everywhere = np.full_like(problem.words, -1)
    inside = PackingProblem(19, 132, 1.0)
    mask = np.unpackbits(problem.unpacked_words(emulator, everywhere)[0], axis=1, bitorder="little")
    assert mask[:, :132].all() and not mask[:, 132:].any()
    same(problem.unpacked_words(emulator, everywhere), inside.expected_bitmap())


@pytest.mark.parametrize("missing", ["bitmap", "words", "starts", "values", "packed"])
def test_a_tensor_that_is_too_short_is_not_read_beyond_its_end(emulator, missing):
    problem = PackingProblem(17, 200, 1.0)
    with pytest.raises(EmulationError, match="AddressSanitizer"):
        if missing == "bitmap":
            problem.bitmap = problem.bitmap.reshape(-1)[:-1]
            problem.packed_words(emulator)
        elif missing == "words":
            problem.unpacked_words(emulator, problem.words.reshape(-1)[:-2])
        elif missing == "starts":
            problem.starts = problem.starts[:-2]  # the last one is the number of values
            problem.packed_values(emulator)
        elif missing == "values":
            problem.packed_values(emulator, bits(problem.weight.values)[:-1])
        else:
            problem.unpacked_values(emulator, bits(problem.tensors[0])[:-8])


def test_the_order_is_the_one_of_the_layout(emulator):
    """One bit and one value at a time: every place of a panel has a bit of its own, and its number among the values."""
    weight = BitmapWeight.compress(torch.ones(16, 128, dtype=torch.float16))
    problem = PackingProblem(16, 128, 1.0, weight=weight)
    numbers = np.arange(2048, dtype=np.uint16)
    order = problem.packed_values(emulator, numbers)
    assert sorted(order) == list(range(2048))
    single = []
    for place in order[:: 2048 // 64]:
        one = torch.zeros(16, 128, dtype=torch.float16)
        one.view(-1)[int(place)] = 1
        single.append(PackingProblem(16, 128, 0.0, weight=BitmapWeight.compress(one)))
    for problem in single:
        same(problem.packed_words(emulator), problem.expected_words())
        same(problem.unpacked_words(emulator), problem.expected_bitmap())
