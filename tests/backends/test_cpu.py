"""The CPU backends: every variant this processor runs, against float64, at awkward shapes."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")

from cpu_runs import check, run

from tests.csrc_cpu.cpu_cases import EPSILON, TYPES, make_case, two_four_mask
from wandapp_kernels import _cpu, dispatch
from wandapp_kernels.backends import Problem, cpu
from wandapp_kernels.backends.cpu import compiled
from wandapp_kernels.errors import UsageError
from wandapp_kernels.ops.bitmap_linear import bitmap_linear
from wandapp_kernels.ops.layouts import LAYOUTS
from wandapp_kernels.sparsity import NMWeight

VARIANTS = [name for name, _ in _cpu.variants()]
LAYOUT_NAMES = ("dense", "nm", "nm_pairs", "bitmap", "bitmap_windows")
PAIRS = [
    (variant, layout)
    for variant, layout in itertools.product(VARIANTS, LAYOUT_NAMES)
    if _cpu.has_kernel(dict(_cpu.variants())[variant], compiled.FORMATS[layout], _cpu.Type.bf16)
]


@pytest.fixture
def use_variant():
    yield compiled.use_variant
    compiled.use_variant(None)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("variant", "layout"), PAIRS)
def test_matches_float64(use_variant, variant: str, layout: str, dtype: torch.dtype):
    use_variant(variant)
    for columns, rows in itertools.product((4, 6, 33, 341, 576), (1, 2, 3, 17, 33)):
        check(case := make_case(layout, dtype, 1 + rows % 5, rows, columns), run(case))
    for tokens in (*range(1, 18), 64):
        check(case := make_case(layout, dtype, tokens, 17, 341), run(case))
    for columns in (1000, 4100):
        check(case := make_case(layout, dtype, 3, 33, columns, bias=False), run(case))


@pytest.mark.parametrize(("variant", "layout"), PAIRS)
def test_the_number_of_threads_changes_no_bit(use_variant, two_threads, variant: str, layout: str):
    use_variant(variant)
    for tokens, dtype in itertools.product((1, 2, 3, 7, 21), TYPES):
        case = make_case(layout, dtype, tokens, 1100, 576)
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(case))
        assert all(torch.equal(result, results[0]) for result in results[1:])


def test_calls_from_several_threads_at_once(two_threads):
    torch.set_num_threads(2)
    cases = [
        make_case(layout, torch.bfloat16, 1, 640, 576)
        for layout in ("bitmap", cpu.WINDOWS.layout, cpu.NM_LAYOUT, "dense")
    ]
    expected = [run(case) for case in cases]
    right = []

    def repeat(case, want):
        right.extend(torch.equal(run(case), want) for _ in range(100))

    workers = [threading.Thread(target=repeat, args=pair) for pair in zip(cases, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(right) == 100 * len(cases) and all(right)


@pytest.mark.parametrize("backend", [cpu.NM, cpu.BITMAP, cpu.WINDOWS, cpu.DENSE], ids=lambda backend: backend.name)
def test_run_many_is_run_of_each(backend):
    cases = [make_case(backend.layout, torch.bfloat16, 2, rows, 341, bias=rows != 5) for rows in (33, 5, 64)]
    x = cases[0].x
    matrices = [(case.tensors, case.bias, case.shape) for case in cases]
    together = backend.run_many(x, matrices)
    for out, (tensors, bias, shape) in zip(together, matrices, strict=True):
        assert torch.equal(out, backend.run(x, tensors, bias, shape, None))
    check(cases[0], together[0])


@pytest.mark.parametrize("kernel", [cpu.NM, cpu.BITMAP, cpu.WINDOWS], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_strips_give_the_same(kernel, dtype: torch.dtype, monkeypatch):
    from wandapp_kernels.backends.cpu import backends

    for size in ("_STRIP_BYTES", "_STRIP_BYTES_PER_THREAD"):
        monkeypatch.setattr(backends, size, 1)  # strips of 64 rows
    case = make_case(kernel.layout, dtype, 40, 150, 341)
    out = cpu.CpuStrips(kernel).run(case.x, case.tensors, case.bias, case.shape, None)
    error = (out.double() - case.exact()).abs()
    assert bool((error <= case.allowed() + EPSILON[dtype] * case.exact().abs()).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", [cpu.NM, cpu.BITMAP, cpu.WINDOWS, cpu.DENSE], ids=lambda backend: backend.name)
def test_nan_and_infinity_behave_as_in_a_dense_linear(backend, value: float):
    case = make_case(backend.layout, torch.float32, 3, 9, 70)
    case.x[1, 33] = value
    out = backend.run(case.x, case.tensors, case.bias, case.shape, None)
    want = torch.nn.functional.linear(case.x, case.dense, case.bias)
    torch.testing.assert_close(out, want, equal_nan=True)
    assert not out[1].isfinite().any() and out[0].isfinite().all()


def test_other_strides_are_copied():
    layouts = [layout for layout in LAYOUT_NAMES[1:] if compiled.has_kernel(layout)]
    assert "bitmap" in layouts and len(layouts) == (2 if compiled.variant() == "plain" else 3)
    for layout in layouts:
        case = make_case(layout, torch.bfloat16, 3, 20, 70)
        wide = torch.randn(3, 140).to(torch.bfloat16)
        wide[:, ::2] = case.x
        strided = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in case.tensors]
        assert not any(tensor.is_contiguous() for tensor in strided)
        out = compiled.linear(layout, wide[:, ::2], [(strided, case.bias, case.shape)])
        assert out is not None and torch.equal(out[0], run(case))


def test_what_does_not_fit_is_refused():
    case = make_case("bitmap", torch.bfloat16, 2, 8, 70)
    values, bitmap, offsets = case.tensors
    x, shape = case.x, case.shape

    def refused(words: str, x=x, tensors=case.tensors, bias=None, shape=shape, layout="bitmap"):
        with pytest.raises(UsageError, match=words):
            compiled.linear(layout, x, [(tensors, bias, shape)])

    refused("in_features = 70", x=x[:, :69])
    refused("bf16, fp16 or fp32", x=x.double())
    refused("is needed", x=x[0, 0])
    refused("tensor 0", x=x.float())
    refused("tensor 1", tensors=[values, bitmap[:-1], offsets])
    refused("tensor 1", tensors=[values, bitmap.to(torch.int16), offsets])
    refused("tensor 2", tensors=[values, bitmap, offsets[1:]])
    refused("row_offsets must ascend", tensors=[values[:-1], bitmap, offsets])
    refused("3 tensors", tensors=[values, bitmap])
    refused("bias", bias=torch.zeros(9, dtype=torch.bfloat16))
    refused("bias", bias=torch.zeros(8))
    packed = make_case("nm_pairs", torch.bfloat16, 2, 8, 70)
    cast = [packed.tensors[0].float(), packed.tensors[1]]
    refused("swap the layer again", x=x.float(), tensors=cast, layout="nm_pairs")
    windows = make_case("bitmap_windows", torch.bfloat16, 2, 8, 70).tensors
    refused("tensor 0", tensors=[windows[0][:-1], *windows[1:]], layout="bitmap_windows")
    refused("tensor 1", tensors=[windows[0], windows[1].flatten()[:-1], *windows[2:]], layout="bitmap_windows")
    refused("the blocks' first steps", tensors=[*windows[:2], windows[2] + 1, windows[3]], layout="bitmap_windows")
    refused("the blocks' first steps", tensors=[*windows[:2], windows[2] * 0, windows[3]], layout="bitmap_windows")
    refused("4 tensors", tensors=windows[:3], layout="bitmap_windows")
    refused("4 tensors", layout="bitmap_windows")
    with pytest.raises(UsageError, match="no variant 'sse'"):
        compiled.Bound("bitmap", case.tensors, None, shape, torch.bfloat16, variant="sse")
    with pytest.raises(UsageError, match="int8"):
        compiled.decompress("nm", [torch.zeros(8, 4, dtype=torch.int8), torch.zeros(8, 1, dtype=torch.uint8)], (8, 8))


OFFSETS = {  # of 8 rows with 70 columns, whose last offset is the number of values
    "far away": lambda offsets: offsets.index_fill_(0, torch.tensor(1), 10**9),
    "before the first": lambda offsets: offsets.index_fill_(0, torch.tensor(0), -(10**9)),
    "overflowing": lambda offsets: offsets.index_fill_(0, torch.tensor(3), -(2**63)),
    "descending": lambda offsets: offsets[1:-1].copy_(offsets[1:-1].flip(0)),
    "longer than a row": lambda offsets: offsets[1:].fill_(int(offsets[-1])),
    "not from 0": lambda offsets: offsets[0].fill_(1),
}


@pytest.mark.parametrize("damage", OFFSETS)
def test_offsets_that_lead_outside_the_values_are_refused(use_variant, damage: str):
    case = make_case("bitmap", torch.bfloat16, 1, 8, 70)
    values, bitmap, offsets = (tensor.clone() for tensor in case.tensors)
    OFFSETS[damage](offsets)
    for name in VARIANTS:
        use_variant(name)
        with dispatch.only("cpu"), pytest.raises(UsageError, match="row_offsets must ascend from 0"):
            bitmap_linear(case.x, [values, bitmap, offsets], None, 8, 70)


def test_a_bitmap_that_does_not_follow_its_offsets_leads_nowhere(use_variant):
    """The values are followed by others in memory, which no result may show."""
    values = torch.full((1000,), float("inf"))[:70].fill_(1.0)
    bitmap, offsets = torch.full((8, 9), 0xFF, dtype=torch.uint8), torch.tensor([0, *[0] * 7, 70])
    x = torch.ones(1, 70)
    for name in VARIANTS:
        use_variant(name)
        out = compiled.linear("bitmap", x, [([values, bitmap, offsets], None, (8, 70))])
        assert out is not None and out[0].isfinite().all()
        for layout, tensors in (("bitmap", [values, bitmap, offsets]), ("nm", illegal_positions())):
            rows = torch.full((8 * 70 + 64,), -1.0)
            compiled.decompress_into(
                rows[: 8 * 70].view(8, 70), compiled.Bound(layout, tensors, None, (8, 70), x.dtype), 0
            )
            assert bool((rows[8 * 70 :] == -1).all())


def illegal_positions() -> list[torch.Tensor]:
    """A 2:4 weight of 8 rows and 70 columns: every value claims the last column of its group, the ragged one too."""
    return [torch.ones(8, 36), torch.full((8, 9), 0xFF, dtype=torch.uint8)]


def test_the_module_refuses_ranges_and_variants_by_itself():
    plain = dict(_cpu.variants())["plain"]

    def bound(rows: int = 4, columns: int = 4, variant=plain, layout=_cpu.Format.dense):
        return _cpu.Bound(variant, layout, _cpu.Type.fp32, 1, 0, 0, 0, rows, columns)

    with pytest.raises(ValueError, match="rows"):
        _cpu.decompress(bound(), 2, 5, 1, False, 1)
    with pytest.raises(ValueError, match="one row"):
        bound(rows=0)
    with pytest.raises(ValueError, match="share"):
        _cpu.linear([bound(), bound(columns=5)], 1, 1, [1, 1], 1)
    with pytest.raises(ValueError, match="an output for each"):
        _cpu.linear([bound()], 1, 1, [1, 1], 1)
    for _, variant in _cpu.variants():
        for layout in _cpu.Format.__members__.values():
            if not _cpu.has_kernel(variant, layout, _cpu.Type.fp32):
                with pytest.raises(ValueError, match="no kernel"):
                    _cpu.linear([bound(variant=variant, layout=layout)], 1, 1, [1], 1)
    here = [*VARIANTS, *(["amx"] if _cpu.has_amx() else [])]
    missing = [value for name, value in _cpu.Variant.__members__.items() if name not in here]
    for variant in missing:
        with pytest.raises(ValueError, match="cannot run"):
            bound(variant=variant)


def test_torch_s_threads_do_the_work_where_it_has_openmp():
    assert _cpu.parallel_backend() == ("openmp" if "USE_OPENMP=ON" in torch.__config__.show() else "own")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 11),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 2**31),
)
def test_pairs_layout_is_inverted_exactly(rows: int, columns: int, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator).to(dtype) * two_four_mask(rows, columns, generator)
    weight = NMWeight.compress(dense)
    layout = LAYOUTS["nm_pairs"]
    tensors = layout.pack(weight)
    back = layout.unpack(tensors, (rows, columns), weight.pattern)
    assert torch.equal(back.values.view(torch.uint8), weight.values.view(torch.uint8))
    assert torch.equal(back.indices, weight.indices)
    assert torch.equal(layout.decompress(tensors, (rows, columns), weight.pattern), weight.decompress())
    wide = compiled.decompress("nm_pairs", tensors, (rows, columns), rows // 2, rows, torch.float32)
    assert torch.equal(wide, weight.decompress()[rows // 2 :].float())


def test_all_six_nibbles_in_every_place(use_variant):
    pairs = list(itertools.combinations(range(4), 2))
    dense = torch.zeros(36, 64)
    for row, (first, second) in enumerate(itertools.product(pairs, pairs)):
        for group in range(16):
            for i, column in enumerate(first if group % 2 else second):
                dense[row, 4 * group + column] = 1 + row + 100 * i + group / 16
    weight = NMWeight.compress(dense)
    assert {nibble for byte in weight.indices.unique().tolist() for nibble in (byte & 15, byte >> 4)} == {
        4, 8, 12, 9, 13, 14,
    }  # fmt: skip
    for variant, layout in PAIRS:
        if layout in ("nm", "nm_pairs"):
            use_variant(variant)
            out = compiled.linear(layout, torch.eye(64), [(LAYOUTS[layout].pack(weight), None, (36, 64))])
            assert out is not None and torch.equal(out[0], dense.T)


def test_packed_bytes_are_nine_sixteenths():
    weight = NMWeight.compress(torch.randn(64, 512).to(torch.bfloat16) * two_four_mask(64, 512, torch.Generator()))
    assert sum(tensor.nbytes for tensor in LAYOUTS["nm_pairs"].pack(weight)) * 16 == weight.dense_nbytes * 9


@pytest.mark.parametrize("layout", ["dense", cpu.NM_LAYOUT])
def test_more_elements_than_31_bits(layout: str):
    """4.3 GB of zeros that are never written, so they take no memory; only the last row holds something."""
    if layout == "nm":
        pytest.skip("the derived layout of AVX2 is meant")
    columns = 1 << 16
    rows = (1 << 31) // columns * (1 if layout == "dense" else 2) + 4
    size = rows * columns // (1 if layout == "dense" else 2)
    assert size > 1 << 31
    values = torch.from_numpy(np.zeros(size, dtype=np.int16)).view(torch.bfloat16)
    values[-1] = 3.0
    if layout == "dense":
        tensors = [values.view(rows, columns)]
    else:
        words = torch.from_numpy(np.zeros(rows // 4 * (columns // 128) * 16, dtype=np.int32))
        tensors = [values.view(rows // 4, columns // 16, 2, 8, 2), words]
    x = torch.ones(1, columns, dtype=torch.bfloat16)
    out = compiled.linear(layout, x, [(tensors, None, (rows, columns))])
    assert out is not None
    assert out[0][0, -1] == 3.0 and out[0][0, :-1].abs().max() == 0


def problem(**changes) -> Problem:
    fields = dict(
        operator="nm_linear", tokens=1, out_features=8, in_features=8, pattern="2:4", density_bucket=50,
        dtype=torch.bfloat16, device="cpu", threads=1,
    )  # fmt: skip
    return Problem(**(fields | changes))


def test_supports_says_why_not():
    assert cpu.NM.supports(problem()) is None
    assert cpu.BITMAP.supports(problem(operator="bitmap_linear", pattern="unstructured")) is None
    assert cpu.DENSE.supports(problem(operator="linear", pattern="dense")) is None
    assert cpu.DENSE.supports(problem()) is None
    for backend in (cpu.NM, cpu.CpuStrips(cpu.NM)):
        assert "4:8" in backend.supports(problem(pattern="4:8"))
        assert "cuda" in backend.supports(problem(device="cuda:0"))
        assert "float64" in backend.supports(problem(dtype=torch.float64))
        assert "bitmap_linear" in backend.supports(problem(operator="bitmap_linear", pattern="unstructured"))


def test_the_environment_forces_a_variant(monkeypatch):
    monkeypatch.setenv(compiled.VARIABLE, "plain")
    assert compiled.choose_variant() == "plain"
    monkeypatch.setenv(compiled.VARIABLE, "mmx")
    with pytest.raises(UsageError, match="mmx"):
        compiled.choose_variant()
    monkeypatch.delenv(compiled.VARIABLE)
    assert compiled.choose_variant() == VARIANTS[0]


def test_without_the_module_one_warning_and_the_reference():
    script = (
        "import sys, warnings, torch; sys.modules['wandapp_kernels._cpu'] = None\n"
        "warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from wandapp_kernels import backends, dispatch\n"
        "    from wandapp_kernels.sparsity import NMWeight\n"
        "    from wandapp_kernels.ops.nm_linear import nm_linear\n"
        "    w = NMWeight.compress(torch.eye(8))\n"
        "    for _ in range(2):\n"
        "        y = nm_linear(torch.ones(1, 8), [w.values, w.indices], None, 8, 8)\n"
        "    assert torch.equal(y, torch.ones(1, 8))\n"
        "    assert 'cpu' in backends.UNAVAILABLE\n"
        "messages = [str(one.message) for one in seen if 'CPU kernels' in str(one.message)]\n"
        "assert len(messages) == 1 and 'compiler' in messages[0], messages\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
def test_the_avx512_kernels_were_compiled_to_the_instructions_meant():
    if not _cpu.HAS_AVX512:
        pytest.skip("the compiler that built the module does not know AVX-512")
    text = subprocess.run(["objdump", "-d", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    for instruction in (
        r"vperm[ti]2w\s.*%zmm",
        r"vpmultishiftqb\s.*%zmm",
        r"vdpbf16ps\s.*%zmm",
        r"vpermilps\s.*%ymm",
        r"vpexpandw\s.*%zmm",
    ):
        assert re.search(instruction, text), instruction
