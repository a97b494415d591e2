"""What nvcc makes of the packing kernels of 2:4 weights: wide loads and stores where they can be, nothing spilled."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.disassembly import disassemble, missing_tools

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

# Global loads and stores of one thread. nm_decompress has two ways out: 8 bytes a group, or single columns.
ACCESSES = {
    "nm_pack": {"LDG.E.U16": 8, "LDG.E.U8": 4, "STG.E.128": 1, "STG.E": 1},
    "nm_unpack": {"LDG.E.U16": 1, "LDG.E.U8": 1, "STG.E.U16": 1, "STG.E.U8": 1},
    "nm_decompress": {"LDG.E.128": 1, "LDG.E": 2, "STG.E.64": 4, "STG.E.U16": 16},
}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("name", list(ACCESSES))
def test_packing_kernels(name: str, architecture: str) -> None:
    kernel = disassemble("nm_pack", name, architecture)
    found = Counter(each.name for each in kernel.instructions if each.name.startswith(("LDG", "STG", "LDL", "STL")))
    assert found == ACCESSES[name]
    assert kernel.stack_bytes == 0
    assert kernel.registers <= 32  # 8 CTAs of 256 threads a multiprocessor
