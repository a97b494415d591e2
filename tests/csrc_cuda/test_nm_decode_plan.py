"""The launch plan: the C++ and the Python function agree, and what they choose covers the problem."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import Emulator, Launch

from wandapp_kernels.backends.cuda.fragment_layout import blocks
from wandapp_kernels.backends.cuda.plan import plan

SHAPES = [
    (1, 1, 1),
    (4096, 4096, 1),
    (4096, 11008, 8),
    (11008, 4096, 16),
    (28672, 8192, 9),
    (8192, 28672, 64),
    (128256, 4096, 1),
    (151936, 896, 17),
    (33, 100000, 3),
    (65, 65, 40),
]


def fields(chosen: object) -> list[int]:
    return list(vars(chosen).values())


def test_both_languages_plan_the_same(emulator: Emulator) -> None:
    random = np.random.default_rng(0)
    cases = [(*shape, gpu, pair) for shape in SHAPES for gpu in (1, 108, 132) for pair in (1, 2)]
    cases += [
        (*random.integers(1, 40000, 2).tolist(), int(random.integers(1, 130)), int(random.integers(1, 200)), 1)
        for _ in range(60)
    ]
    launches = [Launch("nm_plan", (1, 1, 1), 32, 0, [np.zeros(7, np.int64), *case]) for case in cases]
    for case, got in zip(cases, emulator.run(*launches), strict=True):
        assert got.tolist() == fields(plan(*case)), case


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("matrices", [1, 2])
def test_a_plan_covers_the_problem(shape: tuple[int, int, int], matrices: int) -> None:
    n, k, m = shape
    chosen = plan(n, k, m, 132, matrices)
    assert chosen.token_blocks * chosen.token_tiles * 8 >= m > (chosen.token_blocks - 1) * chosen.token_tiles * 8
    assert chosen.row_blocks == blocks(n)
    assert 1 <= chosen.splits <= blocks(k)
    assert chosen.grid == (chosen.splits * chosen.token_blocks, chosen.row_blocks, 1)
    assert chosen.shared_bytes <= 99 * 1024, "the smallest limit of the supported GPUs (sm_86, sm_89)"
    assert (chosen.partials == 0) == (chosen.counters == 0) == (chosen.splits == 1)


@pytest.mark.parametrize(
    ("n", "k"), [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096), (8192, 28672)]
)
def test_the_busiest_multiprocessor_of_an_h100_is_about_as_fast_as_the_others(n: int, k: int) -> None:
    chosen = plan(n, k, 8, 132)
    ctas = -(-chosen.row_blocks * chosen.splits // 132)
    busiest = ctas * -(-blocks(k) // chosen.splits)
    assert busiest * 4 / 7 <= 1.2 * blocks(n) * blocks(k) / 132


@pytest.mark.parametrize(
    ("shape", "fastest"),
    [((4096, 4096), {1, 4}), ((14336, 4096), {1}), ((4096, 14336), {2, 3, 4}), ((1024, 4096), {4, 5})],
)
def test_splits_are_those_that_were_fast_on_an_h100(shape: tuple[int, int], fastest: set[int]) -> None:
    assert {plan(*shape, m, 132).splits for m in (1, 8, 16)} <= fastest


def test_forced_splits_are_taken() -> None:
    assert plan(64, 640, 1, 132, 1, 7).splits == 7
