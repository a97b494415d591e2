"""Decompressing with every CPU variant this processor runs: the stored bits, whatever they are, and nothing outside."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")

from tests.csrc_cpu.cpu_cases import FORMATS, TYPES, make_case
from wandapp_kernels import _cpu
from wandapp_kernels.backends.cpu import compiled
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.layouts import LAYOUTS

VARIANTS = [name for name, _ in _cpu.variants()]


@pytest.fixture
def use_variant():
    yield compiled.use_variant
    compiled.use_variant(None)


SPECIAL = {  # quiet and signalling NaN with payloads, infinities, -0.0, the smallest and the largest subnormals
    torch.bfloat16: (0x7FD5, 0xFFD5, 0x7F95, 0xFF81, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x807F),
    torch.float16: (0x7F15, 0xFF15, 0x7D15, 0xFC01, 0x7C00, 0xFC00, 0x8000, 0x0001, 0x83FF),
    torch.float32: (0x7FC00005, 0xFFD00005, 0x7F900005, 0xFF800001, 0x7F800000, 0xFF800000, 0x80000000, 1, 0x807FFFFF),
}


def widened(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The bits of fp32 with the same value; payloads of NaN move up, quiet or not."""
    if dtype == torch.float32:
        return bits
    wide = bits.astype(np.uint32)
    if dtype == torch.bfloat16:
        return wide << 16
    as_nan = (wide & 0x8000) << 16 | 0x7F800000 | (wide & 0x3FF) << 13
    with np.errstate(invalid="ignore"):
        numbers = bits.view(np.float16).astype(np.float32).view(np.uint32)
    return np.where(wide & 0x7C00 == 0x7C00, as_nan, numbers)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_decompressing_changes_no_bit(use_variant, variant: str, layout: str, dtype: torch.dtype):
    use_variant(variant)
    unsigned = np.uint32 if dtype == torch.float32 else np.uint16
    generator = torch.Generator().manual_seed(1)
    for rows, columns in itertools.product((1, 2, 3, 6, 37), (1, 3, 4, 6, 15, 16, 33, 127, 128, 200, 341, 576)):
        for density in (0.1, 0.5, 1.0) if layout.startswith("bitmap") else (0.5,):
            case = make_case(layout, dtype, 1, rows, columns, density)
            values = case.tensors[0].contiguous().view(torch.uint8).numpy().view(unsigned)
            special = np.array(SPECIAL[dtype], unsigned)[torch.randint(9, values.shape, generator=generator)]
            some = (torch.rand(values.shape, generator=generator) < 0.3).numpy() & (values != 0)
            bits = torch.from_numpy(np.where(some, special, values).view(np.uint8)).view(dtype)
            tensors = [bits, *case.tensors[1:]]
            pattern = None if layout.startswith("bitmap") else compiled.TWO_FOUR
            want = bits if layout == "dense" else LAYOUTS[layout].unpack(tensors, case.shape, pattern).decompress()
            want = want.view(torch.uint8).numpy().view(unsigned)
            for first, last in {(0, rows), (rows // 2, rows), (0, rows // 2 + 1), (rows // 3, rows // 3 + 1)}:
                same = compiled.decompress(layout, tensors, case.shape, first, last)
                assert np.array_equal(same.view(torch.uint8).numpy().view(unsigned), want[first:last])
                wide = compiled.decompress(layout, tensors, case.shape, first, last, torch.float32)
                assert np.array_equal(wide.numpy().view(np.uint32), widened(want[first:last], dtype))


def test_what_cannot_be_decompressed_there_is_refused():
    case = make_case("bitmap", torch.bfloat16, 1, 8, 70)
    bound = compiled.Bound("bitmap", case.tensors, None, case.shape, torch.bfloat16)
    whole = torch.empty(8, 70)
    for out, first in (
        (whole, 1),
        (whole, -1),
        (whole[:, :69], 0),
        (whole.T.contiguous().T, 0),
        (whole.half(), 0),
        (whole[0], 0),
    ):
        with pytest.raises(UsageError, match="do not go into"):
            compiled.decompress_into(out, bound, first)
    assert torch.equal(compiled.decompress_into(whole[3:], bound, 3), case.dense[3:].float())
