"""What nvcc makes of the 2:4 decode kernel: sparse tensor cores, 16-byte weight loads, no spills, occupancy."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bench.budget import A100, H100, Loop, occupancy
from bench.disassembly import Compiled, disassemble, missing_tools
from wandapp_kernels.backends.cuda.plan import THREADS, plan

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")
# The types differ in the name of one instruction: fp16 is looked at once.
KERNELS = [f"nm_decode_bf16_{tokens}" for tokens in (8, 16)] + [f"nm_swiglu_bf16_{tokens}" for tokens in (8, 16, 32)]
KERNELS.append("nm_decode_fp16_16")


def kernels(architecture: str) -> list[tuple[Compiled, int]]:
    """Entry points and their number of 8-token tiles."""
    return [(disassemble("nm_decode", name, architecture), int(name.split("_")[-1]) // 8) for name in KERNELS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_spilled_and_registers_keep_the_launch_bound(architecture: str) -> None:
    for kernel, tiles in kernels(architecture):
        assert kernel.count("LDL", "STL") == 0, kernel.name
        assert kernel.stack_bytes == 0, kernel.name
        assert kernel.registers <= (128 if tiles <= 2 else 255), kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_main_loop(architecture: str) -> None:
    """Two rounds an iteration: 2 x 9 weight loads of 16 bytes, 2 x 8 x tiles mma.sp, no other global load."""
    for kernel, tiles in kernels(architecture):
        loop = Counter(each.name for each in kernel.loop_with("HMMA.SP"))
        weights = {name: count for name, count in loop.items() if name.startswith("LDG.")}
        assert sum(weights.values()) == 2 * 9, kernel.name
        assert all("128.CONSTANT" in name and ".NA." in name for name in weights), weights
        assert sum(count for name, count in loop.items() if name.startswith("HMMA.SP.16832.F32")) == 16 * tiles
        assert loop["LDSM.16.M88.4"] == 4 * tiles
        assert loop["LDGSTS.E.BYPASS.128"] == 2
        assert sum(loop.values()) <= 200 + 60 * tiles, kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_weight_is_loaded_in_less_than_16_bytes(architecture: str) -> None:
    for kernel, _ in kernels(architecture):
        loads = {each.name for each in kernel.instructions if each.name.startswith(("LDG", "LD."))}
        other = {name for name in loads if not (name.startswith("LDG.E.NA.") and name.endswith("128.CONSTANT"))}
        # Activations, biases, partial sums; asynchronous copies of activations.
        assert other <= {"LDG.E.U16.CONSTANT", "LDG.E.128.STRONG.GPU", "LDGSTS.E.BYPASS.128", "LDGDEPBAR"}, kernel.name


@pytest.mark.parametrize("gpu", [A100, H100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("tokens", "ctas"), [(8, 2), (16, 2), (32, 1)])
def test_occupancy(gpu, tokens: int, ctas: int) -> None:
    for matrices in (1, 2) if tokens <= 16 else (2,):
        chosen = plan(4096, 4096, tokens, gpu.multiprocessors, matrices)
        kernel = disassemble("nm_decode", chosen.kernel(torch.bfloat16, matrices), gpu.architecture)
        loop = Loop(0, 0, kernel.registers, 0, THREADS, chosen.shared_bytes, 0)
        assert occupancy(loop, gpu) == ctas
