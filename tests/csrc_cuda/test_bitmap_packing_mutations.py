"""Deliberate mistakes in the packing of unstructured weights: each must be caught by a wrong bit or by a sanitizer."""

from __future__ import annotations

import numpy as np
import pytest
from bitmap_packing_problem import PackingProblem
from bitmap_problem import bits
from emulator import CSRC, HARNESS, EmulationError, Emulator, compile_objects, link

FLAGS = ("-O0", "-fsanitize=address", "-Wno-unused")
ORDER, PANEL, PACK = "bitmap_order.cuh", "bitmap_panel.cuh", "bitmap_pack.cuh"

# file, what stands there, the mistake
MUTATIONS = {
    "bits: rows g and g + 8 swapped": (ORDER, "at.bit / 2 % 2 * 8, 64", "(1 - at.bit / 2 % 2) * 8, 64"),
    "bits: the halves swapped": (ORDER, "half = at.word % 2", "half = 1 - at.word % 2"),
    "bits: another column of the pair": (ORDER, "q % 4 * 2 + at.bit % 2", "q % 4 * 2 + 1 - at.bit % 2"),
    "bits: q counted in another order": (ORDER, "q / 4 * 32 +", "q % 2 * 32 +"),
    "places: another lane": (ORDER, "at.row % 8 * 4 + at.column / 8 % 4", "at.column / 8 % 4 * 8 + at.row % 8"),
    "places: another word": (ORDER, "{2 * lane + half, 4 * q + at.row", "{2 * lane + 1 - half, 4 * q + at.row"),
    "places: another q": (ORDER, "at.column / 32 % 2 * 4", "at.column / 32 % 2 * 2"),
    "values: lanes before q": (
        ORDER,
        "q = number / 128 % 8, lane = number / 4 % 32",
        "q = number / 4 % 8, lane = number / 32 % 32",
    ),
    "values: another half first": (ORDER, "half = number / 1024", "half = 1 - number / 1024"),
    "one panel too many": (PACK, "return first_row < rows;", "return first_row <= rows;"),
    "another row of the lane": (PACK, "(lane / 2); }", "(lane % 16); }"),
    "another half of the lane": (PACK, "(lane % 2 * 64); }", "(lane / 16 * 64); }"),
    "whole bytes only": (PACK, "return (columns + 7) / 8;", "return columns / 8;"),
    "segments of another row": (PACK, "(row()) * panels + first", "(first_row) * panels + first"),
    "rows beyond the weight": (PACK, "row() >= rows or left <= 0", "left <= 0"),
    "columns beyond the weight": (PACK, "left >= 64 ? ~0ull : (1ull << left) - 1", "~0ull"),
    "a whole lane of bits is taken for none": (PACK, "left >= 64 ?", "left > 64 ?"),
    "the high bits are lost": (PACK, "static_cast<u64>(high) << 32 | low", "low"),
    "bits beyond the weight are counted": (PACK, "return bits & inside;", "return bits;"),
    "bytes beyond the weight are read": (PACK, "if (inside >> 8 * i & 0xFF) bits |=", "bits |="),
    "a segment of one half": (PACK, "kept += ptx::shuffle_xor(kept, 1);", ""),
    "segments beyond the weight are written": (
        PACK,
        "panel.lane % 2 == 0 and panel.row() < panel.rows",
        "panel.lane % 2 == 0",
    ),
    "a panel of half its rows": (PACK, "int lanes = 2; lanes < 32", "int lanes = 2; lanes < 16"),
    "the first word twice": (PACK, "2 * panel.lane + i / 32, i % 32", "2 * panel.lane, i % 32"),
    "packed from another half of a row": (PACK, "2 * from.row + from.column / 64);", "2 * from.row);"),
    "unpacked from another word": (PACK, "from.word % 2 * 32 + from.bit", "from.bit"),
    "bits of the padding are unpacked": (PACK, "    bits &= inside;\n", ""),
    "bytes beyond the weight are written": (PACK, "if (inside >> 8 * i & 0xFF) bytes[i] =", "bytes[i] ="),
    "the second half starts where the first does": (PACK, "panel.lane % 2 * first_half", "0 * first_half"),
    "the half's own bits are counted": (
        PACK,
        "ptx::popcount(bits), panel.lane & ~1u)",
        "ptx::popcount(bits), panel.lane | 1)",
    ),
    "starts beyond the weight are read": (PACK, "if (panel.row() < rows) start +=", "start +="),
    "panels start at values": (PACK, "(offsets[panel.index]) * kValuesOf16Bytes", "(offsets[panel.index])"),
    "a value counts itself": (PACK, "(1ull << column) - 1)", "(2ull << column) - 1)"),
    "a lane counts itself": (PACK, "(1u << panel.lane) - 1)", "(2u << panel.lane) - 1)"),
    "every step starts at the panel": (PACK, "moved += ptx::popcount(all_kept);", ""),
    "the last steps are left out": (PACK, "kPanelColumns / 32; ++step", "kPanelColumns / 32 - 1; ++step"),
    "one way for both": (PACK, "target[kPack ? packed : canonical]", "target[packed]"),
    "the padding is left as it was": (PACK, "if (kPack and panel.lane < (", "if (false and panel.lane < ("),
    "a full panel is padded": (PACK, "moved % kValuesOf16Bytes) % kValuesOf16Bytes)", "moved % kValuesOf16Bytes))"),
}

CALLS = """
const emulation::Kernel k0("pack_words@N", &pack_words), k1("unpack_words@N", &unpack_words);
const emulation::Kernel k2("pack_values@N", &move_values<true>), k3("unpack_values@N", &move_values<false>);
"""


def mutant(number: int, change: tuple[str, str, str] | None) -> str:
    """The kernels in a namespace of their own, with one change, callable as ``name@number``."""
    texts = {name: (CSRC / "cuda" / name).read_text() for name in (ORDER, PANEL, PACK)}
    if change is not None:
        name, right, wrong = change
        assert texts[name].count(right) == 1, f"{right!r} stands {texts[name].count(right)} times in {name}"
        texts[name] = texts[name].replace(right, wrong)
    lines = "\n".join(texts.values()).splitlines()
    body = "\n".join(line for line in lines if not line.startswith(("#include", "#pragma once")))
    calls = CALLS.replace("@N", f"@{number}")
    return f"#define bitmap bitmap{number}\n{body}\nnamespace bitmap {{ namespace {{\n{calls}\n}} }}\n#undef bitmap\n"


@pytest.fixture(scope="module")
def mutants(tmp_path_factory) -> Emulator:
    """All mutants in one program: number 0 is unchanged, number i has mistake i."""
    folder = tmp_path_factory.mktemp("mutants")
    pieces = [mutant(number, change) for number, change in enumerate([None, *MUTATIONS.values()])]
    sources = [folder / "even.cpp", folder / "odd.cpp"]  # compiled side by side
    for parity, source in enumerate(sources):
        included = '#include "emulation/runner.h"\n#include "cuda/ptx.cuh"\n'
        source.write_text(included + "".join(pieces[parity::2]))
    harness = [CSRC / "emulation" / name for name in HARNESS]
    return link(compile_objects([*sources, *harness], folder, FLAGS), folder / "emulate", FLAGS[1:2])


# The first ends inside a byte, a panel and a slab; the second fills its only panel to the last place and is packed from
# a bitmap with bits after its columns.
PROBLEMS = [(35, 333, 0.5), (16, 128, 1.0), (3, 5, 1.0)]


def is_right(emulator: Emulator, number: int) -> bool:
    """Whether a few weights are packed as torch packs them, and come back."""
    for shape in PROBLEMS:
        problem = PackingProblem(*shape)
        spare = -shape[1] % 8
        problem.bitmap[:, -1] |= 0xFF << (8 - spare) & 0xFF
        dirty = problem.words if shape[2] < 1 else np.full_like(problem.words, -1)
        try:
            found = [
                *problem.packed_words(emulator, name=f"pack_words@{number}"),
                *problem.unpacked_words(emulator, dirty, name=f"unpack_words@{number}"),
                problem.packed_values(emulator, name=f"pack_values@{number}"),
                problem.unpacked_values(emulator, name=f"unpack_values@{number}"),
            ]
        except EmulationError:
            return False
        expected = [
            *problem.expected_words(),
            *problem.expected_bitmap(),
            bits(problem.tensors[0]),
            bits(problem.weight.values),
        ]
        if not all(map(np.array_equal, found, expected)):
            return False
    return True


def test_without_a_mistake_everything_is_right(mutants):
    assert is_right(mutants, 0)


@pytest.mark.parametrize(("number", "mistake"), enumerate(MUTATIONS, start=1))
def test_a_mistake_is_caught(mutants, number, mistake):
    assert not is_right(mutants, number)
