"""Fragment and metadata maps against two oracles that share no code with them: CuTe's layouts, torch's conversion."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import Emulator, Launch
from hypothesis import given, settings
from hypothesis import strategies as st
from nm_problem import LAYOUT, NIBBLES, Problem, bits, random_weight
from torch.sparse import _semi_structured_conversions as conversions

from wandapp_kernels.backends.cuda.fragment_layout import BLOCK, FragmentLayout, blocks
from wandapp_kernels.backends.cuda.plan import THREADS, pack_grid, unpack_grid
from wandapp_kernels.errors import UsageError
from wandapp_kernels.sparsity.nm_weight import NMWeight

# CUTLASS 4.2, include/cute/atom: (lane, value) -> column-major offset in the tile, as (shape, stride).
# SM80_16x8x16_F32F16F16F32_TN; B is that of k16 with twice the values; E is half a warpgroup's ELayout_64x32.
A_16x16 = (((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128)))
B_8x16 = (((4, 8), (2, 2)), ((16, 1), (8, 64)))
B_8x32 = (((4, 8), (2, 4)), ((16, 1), (8, 64)))
C_16x8 = (((4, 8), (2, 2)), ((32, 1), (16, 8)))
E_64x32 = (((2, 2, 8, 4), (16, 2)), ((1024, 0, 1, 16), (64, 8)))


def offset(layout: tuple, *coordinates: int) -> int:
    """The offset of a CuTe layout at one integer coordinate a mode (each taken apart column-major)."""
    total = 0
    for coordinate, shape, stride in zip(coordinates, *layout, strict=True):
        for extent, step in zip(shape, stride, strict=True):
            total += coordinate % extent * step
            coordinate //= extent
    return total


def gather(layout: tuple, matrix: np.ndarray, values: int) -> np.ndarray:
    """[32, values]: what each lane holds of `matrix`."""
    flat = matrix.T.reshape(-1)
    return np.array([[flat[offset(layout, lane, i)] for i in range(values)] for lane in range(32)])


def scatter(layout: tuple, registers: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    matrix = np.zeros(shape[0] * shape[1], registers.dtype)
    for lane in range(32):
        for i in range(registers.shape[1]):
            matrix[offset(layout, lane, i)] = registers[lane, i]
    return matrix.reshape(shape[1], shape[0]).T


def metadata_words(nibbles: np.ndarray, selector: int) -> np.ndarray:
    """uint32 [32] from nibbles [16, 8] (rows, groups of four of 32 columns): bit by bit through E_64x32.

    Lanes of the other selector hold nibbles that no instruction accepts.
    """
    bit_of = np.array([[nibbles[row, column // 4] >> column % 4 & 1 for column in range(32)] for row in range(16)])
    words = np.zeros(32, np.uint32)
    for lane in range(32):
        if lane // 2 % 2 != selector:
            continue
        for i in range(32):
            place = offset(E_64x32, lane, i)
            words[lane] |= np.uint32(bit_of[place % 64, place // 64]) << np.uint32(i)
    return words


def half_bits(array: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return bits(torch.from_numpy(array).to(dtype))


def random_nibbles(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0x4, 0x8, 0xC, 0x9, 0xD, 0xE]), (16, 8))


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("selector", [0, 1])
def test_sparse_mma_multiplies_what_cute_places(
    emulator: Emulator, name: str, dtype: torch.dtype, selector: int
) -> None:
    random = np.random.default_rng(selector)
    a, b = random.integers(-8, 9, (16, 16)).astype(np.float32), random.integers(-8, 9, (32, 8)).astype(np.float32)
    c, nibbles = random.integers(-8, 9, (16, 8)).astype(np.float32), random_nibbles(selector)
    dense = np.zeros((16, 32))
    for row in range(16):
        for group in range(8):
            for slot in range(2):
                position = nibbles[row, group] >> 2 * slot & 3
                dense[row, 4 * group + position] = a[row, 2 * group + slot]
    arguments = [
        half_bits(gather(A_16x16, a, 8), dtype),
        half_bits(gather(B_8x32, b.T, 8), dtype),
        metadata_words(nibbles, selector),
        gather(C_16x8, c, 4),
    ]
    *_, d = emulator.run(Launch(f"sparse_mma_{name}_{selector}", (1, 1, 1), 32, 0, arguments))
    assert np.array_equal(scatter(C_16x8, d, (16, 8)), dense @ b + c)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_dense_mma_multiplies_what_cute_places(emulator: Emulator, name: str, dtype: torch.dtype) -> None:
    random = np.random.default_rng(3)
    a, b = random.integers(-8, 9, (16, 16)).astype(np.float32), random.integers(-8, 9, (16, 8)).astype(np.float32)
    c = random.integers(-8, 9, (16, 8)).astype(np.float32)
    arguments = [
        half_bits(gather(A_16x16, a, 8), dtype),
        half_bits(gather(B_8x16, b.T, 4), dtype),
        gather(C_16x8, c, 4),
    ]
    *_, d = emulator.run(Launch(f"dense_mma_{name}", (1, 1, 1), 32, 0, arguments))
    assert np.array_equal(scatter(C_16x8, d, (16, 8)), a @ b + c)


def test_packed_registers_are_those_of_cute() -> None:
    weight = random_weight(2 * BLOCK, 3 * BLOCK, torch.float16, seed=5)
    values, metadata = (tensor.numpy() for tensor in LAYOUT.pack(weight))
    fields = weight.fields().numpy()
    nibbles = fields[:, ::2] | fields[:, 1::2] << 2
    for rows in range(0, weight.shape[0], 16):
        row_block, tile = divmod(rows // 16, 4)
        for columns in range(0, weight.shape[1], 32):
            block, step = divmod(columns // 32, 2)
            compressed = weight.values[rows : rows + 16, columns // 2 : columns // 2 + 16].numpy()
            assert np.array_equal(values[row_block, block, step, tile], gather(A_16x16, compressed, 8))
            words = metadata_words(nibbles[rows : rows + 16, columns // 4 : columns // 4 + 8], step)
            supplies = np.arange(32) // 2 % 2 == step
            assert np.array_equal(metadata[row_block, block, :, tile].view(np.uint32)[supplies], words[supplies])


def test_the_layouts_are_those_of_the_installed_cutlass() -> None:
    found = importlib.util.find_spec("cutlass_library")
    if found is None or not found.submodule_search_locations:
        pytest.skip("nvidia-cutlass is not installed")
    atoms = Path(next(iter(found.submodule_search_locations))) / "source" / "include" / "cute" / "atom"

    def layout(text: str) -> tuple:
        plain = re.sub(r"[_\s]|Shape|Stride", "", text)
        return ast.literal_eval(plain.replace("<", "(").replace(">", ")"))

    sparse = (atoms / "mma_traits_sm90_gmma_sparse.hpp").read_text()
    published = re.search(r"using ELayout_64x32\s*=\s*Layout<(.*?)>;", sparse, re.DOTALL)
    assert published is not None and layout(published[1]) == E_64x32
    dense = (atoms / "mma_traits_sm80.hpp").read_text()
    traits = re.search(r"struct MMA_Traits<SM80_16x8x16_F16F16F16F16_TN>(.*?)\};", dense, re.DOTALL)
    assert traits is not None
    for name, expected in (("ALayout", A_16x16), ("BLayout", B_8x16)):
        text = re.search(rf"using {name}\s*=\s*Layout<(.*?)>;", traits[1], re.DOTALL)
        assert text is not None and layout(text[1]) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_conversion_means_the_same_weight(emulator: Emulator, dtype: torch.dtype) -> None:
    problem = Problem.random(64, 128, 5, dtype)
    dense = problem.weights[0].decompress()
    compressed, reordered = conversions.sparse_semi_structured_from_dense_cutlass(dense)
    assert torch.equal(
        LAYOUT.decompress(LAYOUT.pack(problem.weights[0]), dense.shape, problem.weights[0].pattern), dense
    )
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(compressed, reordered), dense)
    # With torch's interleaving undone, its int16 metadata are the canonical index bytes.
    rows, columns = reordered.shape
    places = conversions._calculate_meta_reordering_scatter_offsets(rows, columns, reordered.dtype, reordered.device)
    plain = torch.gather(reordered.reshape(-1), 0, places).view(rows, columns)
    foreign = NMWeight(compressed, plain.contiguous().view(torch.uint8), dense.shape, problem.weights[0].pattern)
    foreign.validate()
    assert torch.equal(foreign.decompress(), dense)
    problem.weights = [foreign]
    problem.check(problem.run(emulator))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 200), st.sampled_from([torch.float16, torch.bfloat16]))
def test_packing_is_inverted_exactly(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = random_weight(rows, columns, dtype, seed=rows + columns)
    values, metadata = LAYOUT.pack(weight)
    padded = blocks(rows) * blocks(columns) * BLOCK * BLOCK
    assert values.nbytes + metadata.nbytes == padded * 2 * 9 // 16
    assert values.is_contiguous() and metadata.is_contiguous() and values.dtype == dtype
    back = LAYOUT.unpack([values, metadata], weight.shape, weight.pattern)
    back.validate()
    assert torch.equal(back.values.view(torch.int16), weight.values.view(torch.int16))
    assert torch.equal(back.indices, weight.indices)


def nibble_weight(nibble: int) -> tuple[NMWeight, torch.Tensor]:
    """One block whose groups go through the six nibbles in turn, from ``nibble`` on; and the same dense."""
    positions = NIBBLES[(torch.arange(BLOCK * BLOCK // 4).view(BLOCK, -1) + nibble) % 6]
    mask = torch.zeros(BLOCK, BLOCK // 4, 4, dtype=torch.bool).scatter_(2, positions, True).flatten(1)
    dense = torch.arange(1, BLOCK * BLOCK + 1).view(BLOCK, BLOCK).remainder(2000).half() * mask
    return NMWeight.compress(dense, mask), dense


def test_every_nibble_survives_in_every_place() -> None:
    for nibble in range(6):
        weight, dense = nibble_weight(nibble)
        assert torch.equal(LAYOUT.decompress(LAYOUT.pack(weight), weight.shape, weight.pattern), dense)


def test_padding_holds_legal_nibbles() -> None:
    _, metadata = LAYOUT.pack(random_weight(1, 1, torch.float16, seed=0))
    words = metadata.numpy().view(np.uint32)
    nibbles = np.array([words >> 4 * i & 0xF for i in range(8)])
    assert set(nibbles.reshape(-1)) <= {0x4, 0x8, 0xC, 0x9, 0xD, 0xE}


SHAPES = [(1, 1), (1, 260), (3, 6), (64, 64), (65, 61), (70, 130), (17, 259), (130, 68)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_packing_kernels_do_the_same(emulator: Emulator, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape, torch.bfloat16, seed=sum(shape))
    packed = [bits(tensor) for tensor in LAYOUT.pack(weight)]
    arguments = [bits(weight.values), bits(weight.indices), *map(np.zeros_like, packed), *shape]
    _, _, values, metadata = emulator.run(Launch("nm_pack", pack_grid(*shape), THREADS, 0, arguments))
    assert np.array_equal(values, packed[0])
    assert np.array_equal(metadata, packed[1])
    empty = [np.full_like(bits(weight.values), 0xFFFF), np.full_like(bits(weight.indices), 0xFF)]
    _, _, values, indices = emulator.run(
        Launch("nm_unpack", unpack_grid(*shape), THREADS, 0, [*packed, *empty, *shape])
    )
    assert np.array_equal(values, bits(weight.values))
    assert np.array_equal(indices, bits(weight.indices))
    dense = np.full(shape, 0x7FFF, np.uint16)
    *_, dense = emulator.run(Launch("nm_decompress", pack_grid(*shape), THREADS, 0, [*packed, dense, *shape]))
    assert np.array_equal(dense, bits(weight.decompress()))


def test_every_nibble_in_every_place_is_made_dense_by_the_kernel(emulator: Emulator) -> None:
    for nibble in range(6):
        weight, dense = nibble_weight(nibble)
        packed = [bits(tensor) for tensor in LAYOUT.pack(weight)]
        empty = np.full(dense.shape, 0x7FFF, np.uint16)
        *_, found = emulator.run(
            Launch("nm_decompress", pack_grid(*dense.shape), THREADS, 0, [*packed, empty, *dense.shape])
        )
        assert np.array_equal(found, bits(dense))


def test_other_weights_are_refused() -> None:
    layout = FragmentLayout()
    with pytest.raises(UsageError, match="1:4"):
        layout.pack(NMWeight.compress(torch.eye(4, 8).half(), None, "1:4"))
    with pytest.raises(UsageError, match="float32"):
        layout.pack(random_weight(4, 8, torch.float32, seed=1))
