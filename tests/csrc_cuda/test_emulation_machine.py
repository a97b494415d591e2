"""The emulation itself: what is right runs, and each broken rule is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import EmulationError, Emulator, Launch

FAULTS = {
    1: "cp.async that has not been waited for",
    2: "cp.async that has not been waited for",
    3: "read of memory that was never written|read without a barrier after the write",
    4: "without a barrier after the (read|write)",
    5: "never written",
    6: "out of bounds",
    7: "heap-buffer-overflow",
    8: "reaches shfl|while others",
    9: "waits for ever in the barrier",
    10: "not a multiple",
    12: "still in flight",
}


def machine(fault: int, order: int = 0) -> Launch:
    values = np.arange(256, dtype=np.uint32).reshape(64, 4)
    arguments = [values, np.zeros(64, np.float32), np.full(64, np.nan, np.float32), fault]
    return Launch("machine", (1, 1, 1), 64, 64 * 16, arguments, order)


@pytest.mark.parametrize("order", [0, 1])
def test_a_correct_kernel_runs(emulator: Emulator, order: int) -> None:
    _, out, _ = emulator.run(machine(0, order))
    # Thread i ends with the sum of its warp's neighbours i ^ 1, seen from the other side of the CTA.
    value = np.arange(64) * 4 + 1
    sums = value + value[np.arange(64) ^ 1]
    assert np.array_equal(out, sums[::-1])


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_broken_rule_is_named(emulator: Emulator, fault: int, order: int) -> None:
    with pytest.raises(EmulationError, match=FAULTS[fault]):
        emulator.run(machine(fault, order))


def test_partial_sums_without_a_fence_stay_invisible(emulator: Emulator) -> None:
    _, out, _ = emulator.run(machine(11))
    assert np.isnan(out).any()


def test_metadata_that_does_not_ascend_is_refused(emulator: Emulator) -> None:
    registers = np.zeros((32, 4), np.uint32)
    metadata = np.full(32, 0x44444444, np.uint32)
    for nibble in (0x0, 0x1, 0x5, 0x6, 0xA, 0xF):
        broken = metadata.copy()
        broken[4 * 3 + 2] ^= np.uint32((0x4 ^ nibble) << 20)
        arguments = [registers, registers, broken, np.zeros((32, 4), np.float32)]
        emulator.run(Launch("sparse_mma_fp16_0", (1, 1, 1), 32, 0, arguments))  # selector 0 does not read that lane
        with pytest.raises(EmulationError, match=f"row 11, group 1 is {nibble}: the two positions do not ascend"):
            emulator.run(Launch("sparse_mma_fp16_1", (1, 1, 1), 32, 0, arguments))


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_conversions_are_those_of_torch(emulator: Emulator, name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (20_000,), generator=generator).to(torch.int32)
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (halves[:-1] + halves[1:]) / 2  # ties
    values = torch.cat([patterns.view(torch.float32), halves, between, torch.tensor([65519.9, 65520.0, 1e-45, -0.0])])
    arguments = [values.numpy(), np.zeros(len(values), np.uint16), np.zeros(65536, np.float32), len(values)]
    _, rounded, widened = emulator.run(Launch(f"convert_{name}", (1, 1, 1), 32, 0, arguments))
    got = torch.from_numpy(rounded.view(np.int16)).view(dtype)
    assert torch.equal(got.isnan(), values.isnan())
    number = ~values.isnan()
    assert torch.equal(got[number].view(torch.int16), values[number].to(dtype).view(torch.int16))
    assert np.array_equal(widened, halves.numpy(), equal_nan=True)
