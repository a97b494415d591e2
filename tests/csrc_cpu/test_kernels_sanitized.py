"""All kernel sources, AVX-512 and AMX emulated, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import hashlib
import itertools
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")
import wandapp_kernels.backends.cpu  # noqa: F401  registers the layout nm_pairs
from tests.csrc_cpu.cpu_cases import FORMATS, TYPES, make_case, write_cases

ROOT = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

FLAGS = ["-std=c++17", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
HAVE = ["-DWANDAPP_HAVE_AVX512", "-DWANDAPP_HAVE_AMX", *(["-DWANDAPP_HAVE_AVX2"] if X86 else [])]

PLAIN = ("kernels_plain", "cpu_features", "tile_permission", "parallel", "thread_pool", "linear", "windows_packing")
AVX512 = ROOT / "cpu/kernels_avx512.cpp"


def avx512_flags(kernel: str, bf16_dot: int, expand_words: int) -> list[str]:
    macros = (f"WANDAPP_AVX512_KERNEL={kernel}", f"WANDAPP_BF16_DOT={bf16_dot}", f"WANDAPP_EXPAND_WORDS={expand_words}")
    return ["-DWANDAPP_EMULATE_AVX512", *(f"-D{macro}" for macro in macros)]


FILES = [
    (AVX512, avx512_flags("avx512_kernel", bf16_dot=0, expand_words=0)),
    (AVX512, avx512_flags("avx512_bf16_kernel", bf16_dot=1, expand_words=0)),
    (AVX512, avx512_flags("avx512_vbmi2_kernel", bf16_dot=1, expand_words=1)),
    # Tiles are multiplied number by number: without optimization most of the time would go there.
    (ROOT / "cpu/kernels_amx.cpp", ["-DWANDAPP_EMULATE_AVX512", "-O1"]),
    *([(ROOT / "cpu/kernels_avx2.cpp", AVX2)] if X86 else []),
    *((ROOT / f"cpu/{name}.cpp", HAVE) for name in PLAIN),
    (ROOT / "cpu/pieces.cpp", ["-DWANDAPP_PIECE_BYTES=200"]),  # so that small weights are cut too
    (Path(__file__).with_name("driver.cpp"), HAVE),
]


@pytest.fixture(scope="module")
def driver(request: pytest.FixtureRequest) -> Path:
    """The driver; objects are kept in pytest's cache until a source or a flag changes."""
    folder = Path(request.config.cache.mkdir("csrc_cpu"))
    headers = b"".join(path.read_bytes() for path in sorted([*ROOT.glob("cpu/*.h"), *ROOT.glob("emulation/a*.h")]))

    def compile_file(task: tuple[Path, list[str]]) -> str:
        source, flags = task
        command = [str(COMPILER), *FLAGS, *flags, "-I", str(ROOT / "cpu")]
        digest = hashlib.sha256(source.read_bytes() + headers + repr(command).encode()).hexdigest()[:20]
        output = folder / f"{source.stem}-{digest}.o"
        if not output.exists():
            partial = output.with_suffix(".partial.o")
            subprocess.run([*command, "-c", str(source), "-o", str(partial)], check=True)
            partial.rename(output)
        return str(output)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_file, FILES))
    program = folder / ("driver-" + hashlib.sha256(repr(objects).encode()).hexdigest()[:20])
    if not program.exists():
        subprocess.run([str(COMPILER), *FLAGS, *objects, "-o", str(program)], check=True)
    return program


def run(driver: Path, path: Path) -> str:
    done = subprocess.run([str(driver), str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_variant_matches_float64(driver: Path, tmp_path: Path, dtype: torch.dtype):
    cases = []
    for layout in FORMATS:
        cases += [make_case(layout, dtype, tokens, 6, 36) for tokens in range(1, 18)]
        cases += [make_case(layout, dtype, 1, 3, columns) for columns in (1, 2, 3, 4, 6, 33, 341, 576, 1000, 4100)]
        cases += [make_case(layout, dtype, 5, rows, 70, bias=False) for rows in (1, 2, 3, 17, 33)]
        cases += [make_case(layout, dtype, 3, 4, columns) for columns in (127, 128, 129, 250)]
        # Rows that are far apart go together.
        cases += [make_case(layout, dtype, 1, rows, 70) for rows in (7, 8, 9, 23)]
        cases += [make_case(layout, dtype, tokens, 35, 2100) for tokens in (1, 2)]
        cases.append(make_case(layout, dtype, 64, 5, 70))
        cases.append(make_case(layout, dtype, 20, 70, 600))  # tokens side by side: several strips and sets of blocks
    for layout, density in itertools.product(("bitmap", "bitmap_windows"), (0, 0.05, 0.95, 1)):
        cases += [make_case(layout, dtype, tokens, rows, 200, density) for tokens, rows in ((1, 5), (5, 5), (1, 17))]
    # Windows that move far, end with the row or are longer than it; blocks that are missing rows, and several at once.
    cases += [make_case("bitmap_windows", dtype, 1, rows, 3000, 0.002) for rows in (1, 16, 19)]
    cases += [make_case("bitmap_windows", dtype, 2, 18, columns) for columns in (1, 15, 16, 17, 31)]
    cases += [make_case("bitmap_windows", dtype, tokens, 100, 130) for tokens in (1, 2, 3, 4, 5, 7, 12, 13)]
    cases += [make_case("bitmap_windows", dtype, tokens, 3, 65536, 0.0003) for tokens in (1, 13)]
    write_cases(tmp_path / "cases", cases)
    output = run(driver, tmp_path / "cases")
    assert output.endswith(" 0 failures\n")
    # Three thread counts for each case, at least plain and the three emulated variants for most, and every row of each
    # weight decompressed by all four.
    rows = sum(case.shape[0] for case in cases)
    assert int(output.rsplit("\n", 2)[-2].split()[0]) >= 3 * 3 * len(cases) + 4 * rows


def test_tiles_match_float64_at_awkward_shapes(driver: Path, tmp_path: Path):
    cases = []
    for layout in ("dense", "nm", "bitmap"):

        def add(tokens: int, rows: int, columns: int, layout: str = layout, **changes: object) -> None:
            cases.append(make_case(layout, torch.bfloat16, tokens, rows, columns, **changes))

        for rows in (1, 15, 16, 17, 31, 32, 33, 50, 64):
            add(3, rows, 70, bias=rows % 2 == 0)
        for columns in (1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 510, 511, 512, 513, 514, 515, 516, 577, 1024, 1030):
            add(2, 17, columns)
        for tokens in (15, 16, 17, 31, 32, 33, 48, 64, 65, 100):
            add(tokens, 18, 70)
        add(33, 33, 545)  # several blocks of columns, a pair of token groups and a single one
        add(2, 36, 3000)
    cases.append(make_case("nm", torch.bfloat16, 33, 1, 26_000))  # passes of fewer tokens
    for density in (0, 0.05, 0.95, 1):
        cases += [make_case("bitmap", torch.bfloat16, tokens, 19, 1030, density) for tokens in (1, 20)]
    write_cases(tmp_path / "cases", cases)
    assert run(driver, tmp_path / "cases").endswith(" 0 failures\n")


def test_tiles_match_float64_with_many_tokens(driver: Path, tmp_path: Path):
    # With few the driver runs this kernel as well: the cases above are its too.
    cases = []
    for layout in ("dense", "nm", "bitmap"):
        shapes = [
            (65, 33, 70),  # the fewest that it is chosen for, and a group that is the only one of its pair
            (96, 2, 40),
            (290, 3, 40),  # several passes
            (3, 270, 10),  # more rows
            (18, 40, 1030),  # rows and columns in several blocks
        ]
        cases += [make_case(layout, torch.bfloat16, *shape, bias=shape[0] % 2 == 0) for shape in shapes]
    cases.append(make_case("dense", torch.bfloat16, 256, 256, 4))  # as many as are multiplied at once
    for value in (float("nan"), float("-inf")):
        for layout in ("nm", "bitmap"):
            case = make_case(layout, torch.bfloat16, 70, 3, 40)
            case.x[69, 39] = value
            cases.append(case)
    write_cases(tmp_path / "cases", cases)
    assert run(driver, tmp_path / "cases").endswith(" 0 failures\n")


def test_tokens_that_are_too_many_to_prepare_at_once(driver: Path, tmp_path: Path):
    late = make_case("nm", torch.float32, 15, 1, 290_000)
    late.x[14, -1] = float("nan")
    write_cases(tmp_path / "cases", [make_case("dense", torch.float32, 15, 1, 290_000), late])
    assert run(driver, tmp_path / "cases").endswith(" 0 failures\n")


def test_an_infinite_weight_stays_in_its_row(driver: Path, tmp_path: Path):
    cases = []
    for layout, columns in itertools.product(("nm", "dense"), (34, 70, 516)):
        case = make_case(layout, torch.bfloat16, 2, 3, columns)
        # Of the 2:4 weight the row in the middle keeps nothing, so that its first value stands for column 0.
        values = case.tensors[0].view(-1)
        values[values.numel() // 3] = case.dense[1, 0] = float("inf")
        cases.append(case)
    write_cases(tmp_path / "cases", cases)
    run(driver, tmp_path / "cases")


@pytest.mark.parametrize("columns", [1, 17, 65, 66, 67, 128, 200, 577])
def test_damaged_weights_read_and_write_nothing_outside(driver: Path, tmp_path: Path, columns: int):
    """Columns that are not there, bits without a value, values without a bit (wrong offsets are refused in Python)."""
    cases = []
    for dtype, tokens in itertools.product(TYPES, (1, 3, 6)):
        for layout in ("nm", "nm_pairs"):
            case = make_case(layout, dtype, tokens, 5, columns)
            case.tensors[1].fill_(255 if layout == "nm" else -1)
            cases.append(case)
        for byte, density in itertools.product((0, 0xFF, 0xA5), (0, 0.1, 0.9, 1)):
            case = make_case("bitmap", dtype, tokens, 5, columns, density)
            case.tensors[1].fill_(byte)
            cases.append(case)
        for row in range(5):  # one row has all the values
            case = make_case("bitmap", dtype, tokens, 5, columns)
            offsets = torch.where(torch.arange(6) > row, columns, 0)
            values = torch.ones(columns, dtype=dtype)
            cases.append(replace(case, tensors=[values, case.tensors[1], offsets]))
    # As many rows as are read at once: where they keep so little, all of them are copied.
    for dtype, tokens, byte in itertools.product(TYPES, (1, 2), (0, 0xFF, 0xA5)):
        case = make_case("bitmap", dtype, tokens, 17, columns, 0.01)
        case.tensors[1].fill_(byte)
        cases.append(case)
    write_cases(tmp_path / "cases", [replace(case, damaged=True) for case in cases])
    assert run(driver, tmp_path / "cases").endswith(" 0 failures\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_found(driver: Path, tmp_path: Path, value: float):
    cases = []
    for layout in FORMATS[1:]:
        for dtype in TYPES:
            for column in (0, 17, 69):
                case = make_case(layout, dtype, 2, 3, 70)
                case.x[1, column] = value
                cases.append(case)
    write_cases(tmp_path / "cases", cases)
    run(driver, tmp_path / "cases")


def test_the_driver_notices_a_wrong_result(driver: Path, tmp_path: Path):
    case = make_case("nm", torch.float32, 2, 3, 20)
    case.dense[1, 1] += 1.0
    write_cases(tmp_path / "cases", [case])
    done = subprocess.run([str(driver), str(tmp_path / "cases")], capture_output=True, text=True)
    assert done.returncode != 0 and "plain" in done.stdout and "avx512_vbmi2" in done.stdout
    assert "decompressing 3 x 20" in done.stdout


def test_the_driver_notices_a_read_outside(driver: Path, tmp_path: Path):
    case = make_case("dense", torch.float32, 1, 3, 20)
    write_cases(tmp_path / "cases", [case])
    data = bytearray((tmp_path / "cases").read_bytes())
    data[8 + 24 : 8 + 32] = (9).to_bytes(8, "little")  # more rows than the weight has
    (tmp_path / "cases").write_bytes(data)
    done = subprocess.run([str(driver), str(tmp_path / "cases")], capture_output=True, text=True)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr
