"""Budgets of the CUDA kernels against counts made by hand, and the packed weights against their budget."""

from __future__ import annotations

import pytest
import torch

from bench import budget
from bench.disassembly import Compiled, Instruction
from wandapp_kernels.backends.cuda.bitmap_layout import BitmapMmaLayout
from wandapp_kernels.backends.cuda.fragment_layout import FragmentLayout
from wandapp_kernels.sparsity import mask_from_scores
from wandapp_kernels.sparsity.bitmap_weight import BitmapWeight
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.pattern import Pattern


def compiled(mma: str, count: int, others: int, registers: int) -> Compiled:
    """A kernel whose loop has ``count`` tensor-core instructions and ``others``, after a loop without any."""
    names = ["IADD3", "BRA", *["IMAD"] * (others - 1), *[mma] * count, "BRA", "EXIT"]
    instructions = [Instruction(16 * i, name, "") for i, name in enumerate(names)]
    instructions[1] = Instruction(16, "BRA", " 0x0")
    instructions[-2] = Instruction(16 * (len(names) - 2), "BRA", " 0x20")
    return Compiled("k", registers, 0, tuple(instructions))


@pytest.fixture
def without_compiler(monkeypatch):
    def fake(source, kernel, architecture):
        return compiled("HMMA.16816.F32", 8, 400, 84) if "bitmap" in source else compiled("HMMA.SP.16832", 16, 80, 122)

    monkeypatch.setattr(budget, "disassemble", fake)


def test_bitmap_by_hand(without_compiler):
    found = budget.bitmap_budget(1, (4096, 4096), 0.5, budget.H100)
    panels = 256 * 32  # slabs of 16 rows × panels of 128 columns
    assert found.weight_bytes == panels * (2048 + 256 + 8 + 4)
    assert found.bytes_ratio == pytest.approx(0.5654, abs=1e-4)
    assert found.bytes_ratio < 0.5625 * 1.02
    assert found.mma == panels * 8
    assert found.instructions == 408
    assert found.other_bytes == 2 * (4096 + 4096)
    assert found.dense_bytes == 2 * 4096 * 4096 + 2 * (4096 + 4096)
    # 84 registers are 88, 22,528 a CTA; 3 slots of 4,352 bytes for each of 8 warps, and 1 KiB.
    assert found.ctas_per_multiprocessor == min(65536 // 22528, 228 * 1024 // (3 * 4352 * 8 + 1024)) == 2
    assert found.in_flight_bytes == 2 * 8 * 2 * 2316
    assert found.needed_in_flight_bytes == pytest.approx(3.35e12 / 132 * 700e-9)
    assert found.in_flight_bytes > 2 * found.needed_in_flight_bytes
    assert found.memory_us == pytest.approx((18_972_672 + 16_384) / 3.35e6)
    assert found.issue_us == pytest.approx(panels * 408 / (4 * 132 * 1830), rel=1e-6)
    assert found.tensor_us == pytest.approx(panels * 8 * 4096 / 989e6)
    assert found.predicted_us == found.memory_us


def test_bitmap_that_splits_k_counts_its_partial_sums(without_compiler):
    found = budget.bitmap_budget(16, (4096, 4096), 0.5, budget.H100)
    cut = budget.bitmap.plan_decode(16, (4096, 4096), 132, 227 * 1024)
    assert cut.splits == 4
    assert found.other_bytes == 2 * 16 * 8192 + 2 * 4 * (4 * 4096 * 16)


def test_nm_by_hand(without_compiler):
    found = budget.nm_budget(1, (4096, 4096), budget.H100)
    assert found.weight_bytes == 64 * 64 * (4096 + 512)
    assert found.bytes_ratio == 0.5625
    assert found.mma == 64 * 64 * 8
    assert found.instructions == 96 / 2  # the loop takes two blocks


def test_many_tokens_by_hand(monkeypatch):
    monkeypatch.setattr(budget, "disassemble", lambda *names: compiled("HMMA.SP.16832", 128, 142, 250))
    found = budget.nm_gemm_budget(128, (14336, 4096), budget.H100)
    assert found.kernel == "nm_gemm_bf16_128x128"
    assert found.weight_bytes == 224 * 64 * (4096 + 512)  # once, though two warps multiply each block
    assert found.units == 2 * 224 * 64
    assert found.mma == found.units * 64
    assert found.instructions == 270 / 2
    assert found.in_flight_bytes == 2 * 2 * 2 * 4608  # two CTAs, two buffers ahead, two blocks in each


def test_the_loop_is_the_smallest_one_with_all_tensor_core_instructions():
    kernel = compiled("HMMA", 8, 20, 1)
    assert len(kernel.loop_with("HMMA")) == 20 + 8
    assert kernel.loop_with("HGMMA") == ()
    assert kernel.count("HMMA") == 8


@pytest.mark.parametrize("density", budget.DENSITIES)
def test_packed_bytes_keep_the_budget(without_compiler, density):
    shape = (1024, 1024)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator).bfloat16()
    weight = BitmapWeight.compress(dense, mask_from_scores(dense.float().abs(), Pattern(1 - density)))
    packed = sum(tensor.nbytes for tensor in BitmapMmaLayout().pack(weight))
    assert packed == pytest.approx(budget.bitmap_budget(1, shape, density, budget.H100).weight_bytes, rel=3e-3)
    assert packed < (density + 1 / 16) * 1.02 * dense.nbytes


def test_packed_2_of_4_keeps_the_budget(without_compiler):
    dense = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = NMWeight.compress(dense, mask_from_scores(dense.float().abs(), Pattern.parse("2:4")), "2:4")
    packed = sum(tensor.nbytes for tensor in FragmentLayout().pack(weight))
    assert packed == budget.nm_budget(1, (256, 512), budget.H100).weight_bytes


def test_table(without_compiler, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(budget, "RESULTS", tmp_path / "budget.json")
    assert budget.saved_table() == "not computed yet"
    monkeypatch.setattr(budget, "TOKENS", (1,))
    monkeypatch.setattr(budget, "MANY_TOKENS", (32,))
    monkeypatch.setattr(budget, "SHAPES", ((4096, 4096),))
    budget.main()
    shown = budget.saved_table()
    assert shown in capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines) == 2 + 4 + 1 + 2
    assert "predicted" in lines[0]
    assert "never measured" in lines[-1]
    assert "0.5654" in shown
