"""What nvcc makes of the bitmap kernels: wide loads only, no spills, registers and occupancy as launches count on."""

from __future__ import annotations

import pytest

from bench.budget import A100, H100, Gpu, Loop, occupancy
from bench.disassembly import Compiled, disassemble, missing_tools
from wandapp_kernels.backends.cuda.bitmap import SLOT_BYTES, STAGES, plan_decode

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

DECODE = ["bitmap_decode_bf16_8", "bitmap_decode_bf16_16", "bitmap_decode_fp16_8", "bitmap_decode_fp16_16"]
GPUS = [pytest.param(gpu, id=gpu.name) for gpu in (A100, H100)]


@pytest.fixture(params=DECODE)
def name(request) -> str:
    return request.param


def names(body, *prefixes: str) -> list[str]:
    return [each.name for each in body if each.name.startswith(prefixes)]


@pytest.mark.parametrize("gpu", GPUS)
def test_decode(name, gpu: Gpu):
    kernel = disassemble("bitmap_decode", name, gpu.architecture)
    tiles = 2 if name.endswith("16") and not name.endswith("_8") else 1
    loop = kernel.loop_with("HMMA")
    assert len(names(loop, "HMMA.16816.F32")) == 8 * tiles
    # Weights arrive by 16-byte copies past the registers; what is loaded besides are activations and one offset.
    assert set(names(loop, "LDGSTS")) == {"LDGSTS.E.BYPASS.128"}
    assert len(names(loop, "LDGSTS")) == 1 + 4096 // 512
    loads = [each for each in names(loop, "LDG.", "LD.")]
    assert sorted(set(loads)) in (["LDG.E.128", "LDG.E.CONSTANT"], ["LDG.E.128.CONSTANT", "LDG.E.CONSTANT"])
    assert sum(each.startswith("LDG.E.128") for each in loads) == 4 * tiles
    assert len(names(loop, "LDS.U16")) == 64
    assert len(names(loop, "POPC")) == 0
    assert len(loop) < 520 + 40 * tiles


@pytest.mark.parametrize("gpu", GPUS)
def test_decode_spills_nothing_and_fills_the_multiprocessor(name, gpu: Gpu):
    kernel = disassemble("bitmap_decode", name, gpu.architecture)
    no_spills(kernel, 128)
    cut = plan_decode(1, (4096, 4096), gpu.multiprocessors, gpu.most_shared_of_cta)
    loop = Loop(0, 0, kernel.registers, 0, cut.threads, cut.shared_bytes, 0)
    assert cut.shared_bytes == cut.threads // 32 * STAGES * SLOT_BYTES
    assert (cut.threads, occupancy(loop, gpu)) == ((256, 2) if gpu is H100 else (128, 3))


@pytest.mark.parametrize("gpu", GPUS)
def test_decompress(gpu: Gpu):
    kernel = disassemble("bitmap_decompress", "bitmap_decompress_16", gpu.architecture)
    no_spills(kernel, 64)
    stores = [each.name for each in kernel.instructions if each.name.startswith("STG")]
    assert stores.count("STG.E.128") == 8  # 2 halves × 2 rows × 2 segments of a lane
    assert set(stores) == {"STG.E.128", "STG.E.U16"}
    assert set(names(kernel.instructions, "LDGSTS")) == {"LDGSTS.E.BYPASS.128"}


def no_spills(kernel: Compiled, most_registers: int) -> None:
    assert kernel.count("LDL", "STL") == 0
    assert kernel.stack_bytes == 0
    assert kernel.registers <= most_registers
