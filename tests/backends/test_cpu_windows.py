"""The layout bitmap_windows: weights come back bit for bit, and what is packed is what csrc/cpu/windows.h describes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")

from tests.csrc_cpu.cpu_cases import TYPES
from wandapp_kernels import dispatch
from wandapp_kernels.backends import cpu
from wandapp_kernels.backends.cpu import compiled
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.layouts import LAYOUTS
from wandapp_kernels.runtime.choice import fastest_layout
from wandapp_kernels.sparsity import BitmapWeight, NMWeight

WINDOWS = LAYOUTS["bitmap_windows"]


def random_weight(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int) -> BitmapWeight:
    """Kept zeros of both signs are among the values: the layout must not take its padding for them."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator)
    dense[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    dense[torch.rand(rows, columns, generator=generator) < 0.1] *= -0.0
    return BitmapWeight.compress(dense.to(dtype), torch.rand(rows, columns, generator=generator) < density)


def same_weight(a: BitmapWeight, b: BitmapWeight) -> bool:
    values = torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8))
    return values and torch.equal(a.bitmap, b.bitmap) and torch.equal(a.row_offsets, b.row_offsets)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 37),
    columns=st.integers(1, 700),
    density=st.sampled_from([0.0, 0.003, 0.05, 0.3, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 2**31),
)
def test_layout_is_inverted_exactly(rows: int, columns: int, density: float, dtype: torch.dtype, seed: int):
    weight = random_weight(rows, columns, density, dtype, seed)
    tensors = WINDOWS.pack(weight)
    back = WINDOWS.unpack(tensors, weight.shape, None)
    back.validate()
    assert same_weight(back, weight)
    assert WINDOWS.density(tensors, weight.shape, None) == weight.values.numel() / (rows * columns)
    dense = weight.decompress()
    assert torch.equal(WINDOWS.decompress(tensors, weight.shape, None).view(torch.uint8), dense.view(torch.uint8))
    wide = compiled.decompress("bitmap_windows", tensors, weight.shape, rows // 2, rows, torch.float32)
    assert torch.equal(wide, dense[rows // 2 :].float())


def steps_of(dense: torch.Tensor) -> list[tuple[int, list[list[tuple[int, float]]]]]:
    """What the steps of a block of fp32 rows should be: first column of the window, and (column, value) row by row."""
    rows = [[(int(k), float(row[k])) for k in row.nonzero()[:, 0]] for row in dense]
    steps, last_window = [], max(dense.shape[1] - 16, 0)
    while any(rows):
        window = min(min(row[0][0] for row in rows if row), last_window)
        taken = [[entry for entry in row[:2] if entry[0] < window + 16] for row in rows]
        rows = [row[len(took) :] for row, took in zip(rows, taken, strict=True)]
        steps.append((window, taken))
    return steps


# Where the columns of each row's two slots are in the 32 bytes of a pair of steps.
_COLUMN_BYTES = [*range(0, 8), *range(16, 24), *range(8, 16), *range(24, 32)]


@pytest.mark.parametrize(
    ("rows", "columns", "density"), [(16, 200, 0.5), (9, 100, 0.3), (16, 5, 1.0), (16, 2000, 0.002), (3, 65536, 0.0003)]
)
def test_meta_and_values_are_as_documented(rows: int, columns: int, density: float):
    weight = random_weight(rows, columns, density, torch.float32, 5)
    weight = BitmapWeight.compress(weight.decompress())
    values, meta, offsets, _ = WINDOWS.pack(weight)
    assert offsets.tolist() == [0, len(values)] and len(values) == 2 * len(meta)
    found, windows = [], []
    for step, lanes in enumerate(values.tolist()):
        pair = meta[step // 2].tolist()
        low, high = pair[32 + step % 2 * 2 : 34 + step % 2 * 2]
        windows.append(low + 256 * high)
        places = [pair[byte] >> 4 * (step % 2) & 15 for byte in _COLUMN_BYTES]
        taken: list[list[tuple[int, float]]] = []
        for row in range(16):
            first, second = places[2 * row : 2 * row + 2]
            kept = 2 if first < second else int(first == second)
            taken.append([(windows[-1] + places[slot], lanes[slot]) for slot in range(2 * row, 2 * row + kept)])
            assert lanes[2 * row + kept : 2 * row + 2] == [0.0] * (2 - kept)
        if any(taken):
            found.append((windows[-1], taken[:rows]))
            assert not any(taken[rows:])
    assert found == steps_of(weight.decompress()) and windows == sorted(windows)


def test_all_types_have_one_order():
    weight = random_weight(40, 300, 0.5, torch.bfloat16, 1)
    packed = WINDOWS.pack(weight)
    for dtype in TYPES:
        cast = BitmapWeight(weight.values.to(dtype), weight.bitmap, weight.row_offsets, weight.shape)
        expected = [packed[0].to(dtype), *packed[1:]]
        assert all(torch.equal(a, b) for a, b in zip(WINDOWS.pack(cast), expected, strict=True))
        assert torch.equal(WINDOWS.decompress(expected, weight.shape, None), cast.decompress())


@pytest.mark.parametrize(("kept", "share"), [(0.6, 0.832), (0.5, 0.718), (0.4, 0.603), (0.3, 0.488), (0.1, 0.251)])
def test_bytes_of_random_masks(kept: float, share: float):
    """The figures of the layout's docstring and of docs/cpu.md."""
    weight = random_weight(256, 4096, kept, torch.bfloat16, 0)
    size = sum(tensor.nbytes for tensor in WINDOWS.pack(weight))
    assert size / weight.dense_nbytes == pytest.approx(share, rel=0.01)


def test_bytes_are_bounded_from_below():
    """Exactly what it takes where no window ends early; less elsewhere."""
    weight = BitmapWeight.compress(torch.ones(33, 70, dtype=torch.float16))
    tensors = WINDOWS.pack(weight)
    assert WINDOWS.least_nbytes(weight) == tensors[0].nbytes + tensors[1].nbytes
    for seed in range(3):
        weight = random_weight(37, 400, 0.3, torch.bfloat16, seed)
        size = sum(tensor.nbytes for tensor in WINDOWS.pack(weight))
        assert 0.7 * size < WINDOWS.least_nbytes(weight) < size


def test_rows_that_keep_too_different_numbers_stay_canonical():
    if compiled.variant() != "avx2":
        pytest.skip("another layout is preferred here")
    even = random_weight(64, 256, 0.3, torch.bfloat16, 0)
    mask = torch.zeros(64, 256, dtype=torch.bool)
    mask[::4] = True
    uneven = BitmapWeight.compress(torch.randn(64, 256).to(torch.bfloat16), mask)
    assert sum(tensor.nbytes for tensor in WINDOWS.pack(uneven)) > uneven.dense_nbytes
    with dispatch.only("cpu"):
        assert fastest_layout(even) == "bitmap_windows" and fastest_layout(uneven) == "bitmap"


def test_what_it_does_not_hold_is_refused():
    with pytest.raises(UsageError, match="unstructured weights only"):
        WINDOWS.pack(NMWeight.compress(torch.eye(8)))
    small = BitmapWeight.compress(torch.eye(8).to(torch.int8))
    assert "int8" in str(WINDOWS.supports(small))
    wide = random_weight(1, 65537, 0.01, torch.float32, 0)
    assert "65,536 columns" in str(WINDOWS.supports(wide))
    with pytest.raises(UsageError, match="65,536 columns"):
        WINDOWS.pack(wide)
    problem = dispatch.problem_for(64, 65537, "unstructured", 1, torch.float32, density=0.5)
    assert "65,536 columns" in str(cpu.WINDOWS.supports(problem))
    with pytest.raises(UsageError, match="int8"):
        WINDOWS.pack(small)


def test_a_weight_that_contradicts_itself_is_refused():
    weight = random_weight(4, 12, 0.5, torch.float32, 3)
    bits = weight.bitmap.clone()
    bits[0, 1] |= 0x80  # after the last column: padding, whatever it is
    padded = BitmapWeight(weight.values, bits, weight.row_offsets, weight.shape)
    assert same_weight(WINDOWS.unpack(WINDOWS.pack(padded), weight.shape, None), weight)
    bits = weight.bitmap.clone()
    bits[2, 0] ^= 1
    with pytest.raises(UsageError, match="another number of bits"):
        WINDOWS.pack(BitmapWeight(weight.values, bits, weight.row_offsets, weight.shape))
    tensors = WINDOWS.pack(weight)
    for row, by in ((1, 1), (4, -1), (0, 1)):
        offsets = tensors[3].clone()
        offsets[row] += by
        with pytest.raises(UsageError, match="another number of weights"):
            WINDOWS.unpack([*tensors[:3], offsets], weight.shape, None)


def test_its_tensors_are_its_own():
    weight = random_weight(9, 40, 0.5, torch.float32, 3)
    tensors = WINDOWS.pack(weight)
    back = WINDOWS.unpack(tensors, weight.shape, None)
    assert len({weight.row_offsets.data_ptr(), tensors[3].data_ptr(), back.row_offsets.data_ptr()}) == 3


@pytest.mark.parametrize(("density", "layout"), [(0.05, "bitmap_windows"), (0.6, "bitmap_windows"), (0.7, "bitmap")])
def test_dense_masks_stay_in_the_smaller_layout(density: float, layout: str):
    if compiled.variant() != "avx2":
        pytest.skip("another layout is preferred here")
    problem = dispatch.problem_for(640, 512, "unstructured", 1, torch.bfloat16, density=density)
    with dispatch.only("cpu"):
        assert dispatch.choose_layout(problem) == layout
    assert (cpu.WINDOWS.supports(problem) is None) == (layout == "bitmap_windows")


@pytest.mark.parametrize("variant", [name for name, _ in compiled._cpu.variants()])
def test_every_variant_prefers_what_suits_it(variant: str, tmp_path: Path):
    """In a process of its own: the order of the backends is settled when they are loaded."""
    code = (
        "from wandapp_kernels.dispatch import choose_layout, problem_for; import torch;"
        "print(choose_layout(problem_for(64, 64, 'unstructured', 1, torch.bfloat16, density=0.5)))"
    )
    environment = os.environ | {compiled.VARIABLE: variant, "WANDAPP_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == ("bitmap_windows" if variant == "avx2" else "bitmap")


def test_windows_and_bitmap_agree():
    """Both kernels on the same weight, as the dispatcher may exchange them."""
    for dtype, tokens in itertools.product(TYPES, (1, 3, 9, 17)):
        weight = random_weight(37, 530, 0.4, dtype, tokens)
        x = torch.randn(tokens, 530).to(dtype)
        a, b = (
            backend.run(x, LAYOUTS[backend.layout].pack(weight), None, weight.shape, None).double()
            for backend in (cpu.WINDOWS, cpu.BITMAP)
        )
        allowed = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
        assert float((a - b).norm() / b.norm()) < allowed[dtype]
