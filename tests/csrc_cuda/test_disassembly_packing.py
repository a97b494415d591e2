"""What nvcc makes of the packing kernels: wide loads and stores where they can be, nothing spilled."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.disassembly import disassemble, missing_tools

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

# Global loads and stores of one thread. nm_decompress has two ways out: 8 bytes a group, or single columns. A bitmap
# weight's values move in steps of four.
ACCESSES = {
    "nm_pack": {"LDG.E.U16": 8, "LDG.E.U8": 4, "STG.E.128": 1, "STG.E": 1},
    "nm_unpack": {"LDG.E.U16": 1, "LDG.E.U8": 1, "STG.E.U16": 1, "STG.E.U8": 1},
    "nm_decompress": {"LDG.E.128": 1, "LDG.E": 2, "STG.E.64": 4, "STG.E.U16": 16},
    "bitmap_pack_words": {"LDG.E.U8": 8, "STG.E.64": 1, "STG.E": 2},
    "bitmap_unpack_words": {"LDG.E.64": 1, "STG.E.U8": 8, "STG.E": 2},
    "bitmap_pack_values": {"LDG.E.U8": 8, "LDG.E": 1, "LDG.E.64": 1, "LDG.E.U16": 4, "STG.E.U16": 5},
    "bitmap_unpack_values": {"LDG.E.U8": 8, "LDG.E": 1, "LDG.E.64": 1, "LDG.E.U16": 4, "STG.E.U16": 4},
}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", list(ACCESSES))
def test_packing_kernels(name: str, architecture: str) -> None:
    kernel = disassemble(f"{name.partition('_')[0]}_pack", name, architecture)
    found = Counter(each.name for each in kernel.instructions if each.name.startswith(("LDG", "STG", "LDL", "STL")))
    assert found == ACCESSES[name]
    assert kernel.stack_bytes == 0
    assert kernel.registers <= 32  # 8 CTAs of 256 threads a multiprocessor
    # Lanes ask each other for 64 bits at a time; those that ask the same lane twice ask once.
    assert kernel.count("SHFL.IDX") <= 17
