"""The H100 command without an H100: time boxes, cases, tables, JSON, and the model code on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.h100 import __main__ as command
from bench.h100 import cases, numerics, scoring, tables
from bench.h100.clock import Clock, Section
from bench.h100.micro import row
from bench.h100.timing import Timing, copies_for, summary
from wandapp_kernels.backends import Backend

ROOT = Path(__file__).parents[2]


def test_a_section_stops_at_its_own_box(now):
    section = Section("micro", 10, Clock(100, now))
    seen = []
    for case in section.cases(range(5)):
        seen.append(case)
        now.seconds += 4
    assert seen == [0, 1]  # at 8 seconds a third would end at 12
    assert [item["what"] for item in section.left_out] == ["2", "3", "4"]
    assert section.no_time == 3
    assert section.to_dict()["seconds"] == 8


def test_a_shorter_case_does_not_let_a_longer_one_start(now):
    section = Section("micro", 10, Clock(100, now))
    seen = []
    for case in section.cases([4, 1, 1, 1, 1]):
        now.seconds += case
        seen.append(case)
    assert (seen, section.longest, section.no_time) == ([4, 1, 1, 1], 4, 1)


def test_rows_are_saved_after_every_case(now):
    saved = []
    section = Section("micro", 10, Clock(100, now), lambda section: saved.append(list(section.rows)))
    for case in section.cases("ab"):
        section.rows.append({"case": case})
        now.seconds += 1
    assert saved == [[{"case": "a"}], [{"case": "a"}, {"case": "b"}]]


def test_a_section_stops_when_the_run_is_over(now):
    clock = Clock(100, now)
    now.seconds += 95
    section = Section("micro", 50, clock)
    now.seconds += 6
    assert list(section.cases([1])) == []
    assert clock.left == -1


def test_sections_run_in_order_and_write_after_each(now):
    written = []

    def good(section: Section) -> None:
        section.rows.append({"kernel": section.name})
        now.seconds += 300

    def bad(section: Section) -> None:
        raise RuntimeError("out of\nmemory")

    sections = {"numerics": good, "micro": bad, "scoring": good, "pruning": good}
    found = command.run_sections(sections, Clock(570, now), lambda so_far: written.append(list(so_far)))
    assert written == [list(sections)[: count + 1] for count in range(4)]
    assert found["micro"]["left_out"] == [{"what": "the rest of micro", "why": "RuntimeError: out of memory"}]
    assert found["scoring"]["rows"]
    assert found["pruning"]["left_out"] == [{"what": "pruning", "why": "no time was left"}]


def test_saved_is_what_is_done_and_what_is_running(now):
    saved = []

    def run(section: Section) -> None:
        for case in section.cases([1, 2]):
            section.rows.append({"case": case})

    def save(found: dict) -> None:
        saved.append({name: len(section["rows"]) for name, section in found.items()})

    command.run_sections({"numerics": run, "micro": run}, Clock(540, now), lambda found: None, save)
    assert saved == [{"numerics": 1}, {"numerics": 2}, {"numerics": 2, "micro": 1}, {"numerics": 2, "micro": 2}]


def test_what_a_section_does_not_need_the_next_one_gets(now):
    ends = []

    def run(section: Section) -> None:
        ends.append(section.end - 1000.0)
        now.seconds += 10

    command.run_sections({"numerics": run, "micro": run}, Clock(540, now), lambda found: None)
    assert ends == [command.SECONDS["numerics"], command.SECONDS["numerics"] + command.SECONDS["micro"]]


@pytest.mark.parametrize("left_out", [0, 2])
def test_numerics_that_were_left_out_are_a_failure(now, monkeypatch, left_out):
    def linears(section: Section):
        section.leave_out("cutlass-nm 17x200", "it wants other shapes")
        for _ in section.cases(range(1 + left_out)):
            now.seconds += 100
        return iter(())

    monkeypatch.setattr(numerics, "check_linears", linears)
    for module, name in ((numerics, "check_swiglu"), (numerics, "check_graph"), (scoring, "check")):
        monkeypatch.setattr(module, name, lambda section: iter(()))
    section = Section("numerics", 110, Clock(540, now))
    if not left_out:
        command.check_numerics(section)
        return
    with pytest.raises(command.WrongResult, match="2 shapes were not checked"):
        command.check_numerics(section)


def test_awkward_shapes_are_checked_first():
    sizes = [rows * columns for rows, columns in numerics.SHAPES]
    assert sizes == sorted(sizes)
    assert numerics.SHAPES[0] == (17, 200)


def test_a_wrong_kernel_ends_the_run(now):
    def wrong(section: Section) -> None:
        section.rows.append({"error": 1.0})
        raise command.WrongResult("cuda-nm: off")

    written = []
    with pytest.raises(command.WrongResult):
        command.run_sections(
            {"numerics": wrong, "micro": pytest.fail}, Clock(9, now), lambda found: written.append(found)
        )
    assert written == [{"numerics": {"rows": [{"error": 1.0}], "left_out": [], "seconds": 0.0}}]


def test_boxes_fit_into_ten_minutes():
    assert sum(command.SECONDS.values()) <= command.LIMIT <= 540


def test_copies_exceed_the_cache_and_fit_the_memory():
    assert copies_for(19 << 20, 50 << 20, 80 << 30) == 1 + 8
    assert copies_for(1 << 30, 50 << 20, 80 << 30) == 2
    assert copies_for(1 << 30, 50 << 20, 3 << 30) == 1
    assert copies_for(1 << 10, 50 << 20, 80 << 30) == 256


def test_summary_is_median_and_quartiles():
    assert summary([5, 1, 2, 3, 4], True) == Timing(3, 2, 4, True)
    assert summary([5], False) == Timing(5, 5, 5, False)


def test_cases_are_the_promised_ones():
    assert cases.TOKENS == (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
    shapes = {case.shape for case in cases.weights() if case.pattern == "2:4"}
    assert {(11008, 4096), (14336, 4096), (28672, 8192)} <= shapes
    assert {case.density for case in cases.weights() if case.pattern != "2:4"} == {50, 40, 30}


def test_vendor_libraries_are_measured_with_few_tokens_too():
    asked = []

    class Vendor(Backend):
        name, layout = "cusparselt-nm", "nm-cusparselt"

        def supports(self, problem):
            asked.append(problem.tokens)

        def run(self, *arguments):
            raise NotImplementedError

    backend = Vendor()
    case = cases.weights()[0]
    assert cases.refusal(backend, cases.problem(case, 1)) is None
    cases.refusal(backend, cases.problem(case, 512))
    backend.name = "cuda-nm"
    cases.refusal(backend, cases.problem(case, 1))
    assert asked == [64, 512, 1]


def test_gpu_backends_have_no_cpu_among_them():
    names = {backend.name for operator in ("nm_linear", "bitmap_linear") for backend in cases.gpu_backends(operator)}
    assert {"cuda-nm", "cuda-bitmap", "cusparselt-nm", "cutlass-nm"} <= names
    assert not [name for name in names if name.startswith(("cpu", "reference", "dense"))]


def report() -> dict:
    case = cases.Case("LLaMA q/k/v/o", (4096, 4096), "2:4", 50)
    dense, ours = Timing(12.0, 11.0, 13.0, True), Timing(8.0, 7.0, 9.0, True)
    rows = [
        row(case, 1, "dense", dense, None, 2 * 4096 * 4096, 3e12),
        row(case, 1, "cuda-nm", ours, dense, 18_874_368, 3e12),
        row(case, 1, "cusparselt-nm", Timing(24.0, 23.0, 25.0, False), dense, 18_874_368, 3e12),
    ]
    generation = {
        "model": "LLaMA-7B",
        "form": "2:4",
        "prompt": 128,
        "batch": 1,
        "sparse_layers": 224,
        "weight_bytes": 8_000_000_000,
        "prefill_seconds": 0.025,
        "decode_seconds": 0.005,
        "eager_decode_seconds": 0.0222,
        "tokens_per_second": 200.0,
        "graph": True,
        "peak_memory_bytes": 9_000_000_000,
    }
    left_out = [{"what": "rest", "why": "no time was left"}]
    pruning = [
        {"model": "LLaMA-7B", "method": "wanda++", "pattern": "2:4", "block": f"layers.{i}", "of_blocks": 32}
        | {"seconds": seconds, "peak_memory_bytes": 2**30, "samples": [128, 2048]}
        for i, seconds in enumerate((29.0, 5.0, 7.0))
    ]
    return {
        "machine": {"gpu": "Fake H100", "bandwidth": 3e12, "cache_multiple": 3, "versions": {"torch": "2.11"}},
        "sections": {
            "micro": {"rows": rows, "left_out": left_out, "seconds": 1.0},
            "scoring": {"rows": [{"kernel": "score", "us": 12.3456}], "left_out": [], "seconds": 1.0},
            "pruning": {"rows": pruning, "left_out": [], "seconds": 1.0},
            "generation": {"rows": [generation], "left_out": [], "seconds": 1.0},
        },
    }


def test_micro_row():
    ours = report()["sections"]["micro"]["rows"][1]
    assert ours["times_dense"] == 1.5
    assert ours["gb_per_second"] == pytest.approx((18_874_368 + 2 * 8192) / 8e-6 / 1e9)
    assert ours["share_of_bandwidth"] == pytest.approx(ours["gb_per_second"] / 3000)
    assert ours["tflops"] == pytest.approx(2 * 4096 * 4096 / 8e-6 / 1e12)


def test_losing_rows_stay_and_what_is_missing_is_a_dash():
    text = tables.micro_table(report()["sections"]["micro"]["rows"])
    assert "8.0, 1.50× (79%)" in text
    assert "24.0†, 0.50× (26%)" in text  # no graph: the host is in it
    assert tables.micro_table([{**row, "graph": True} for row in report()["sections"]["micro"]["rows"]]).count("†") == 0
    assert "12.0 (93%)" in text


def test_all_blocks_are_calculated_from_those_after_the_first():
    text = tables.pruning_table(report()["sections"]["pruning"]["rows"])
    assert f"{(29 + 31 * 6) / 60:.1f}" in text
    assert "3 blocks of each were pruned; all blocks: calculated" in text
    assert "128 × 2048" in text


def test_the_fastest_sparse_backend_stands_for_a_number_of_tokens():
    text = tables.best_table(report()["sections"]["micro"]["rows"])
    assert "1.50× cuda-nm" in text
    assert "cusparselt" not in text
    assert tables.best_table([]) == "not measured yet"


def test_decompressing_is_measured_with_many_tokens_only():
    backend = next(each for each in cases.gpu_backends("nm_linear") if each.name == "decompress-nm-mma")
    case = cases.weights()[0]
    assert "32" in (cases.refusal(backend, cases.problem(case, 16)) or "")
    assert cases.refusal(backend, cases.problem(case, 32)) is None
    assert cases.refused_always(backend, case, (1, 8)) is not None
    assert cases.refused_always(backend, case, (1, 64)) is None


def test_page_plots_and_files(tmp_path):
    command.write(tmp_path, report())
    assert json.loads((tmp_path / "results.json").read_text()) == report()
    page = (tmp_path / "table.md").read_text()
    assert "Fake H100" in page
    assert "- rest: no time was left" in page
    assert "| LLaMA-7B | 2:4" in page
    assert "22.2" in page
    plot = (tmp_path / "4096x4096-2of4-50pct.svg").read_text()
    assert plot.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "cusparselt-nm" in plot


def test_readme_says_so_when_nothing_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results.json")
    assert tables.readme_table() == tables.docs_table() == tables.whole_sentence() == "not measured yet"
    assert tables.micro_table([]) == tables.model_table([]) == tables.plain_table([]) == "not measured yet"
    command.write(tmp_path, report())
    monkeypatch.setattr(tables, "README_MODEL", "LLaMA-7B")
    assert "1.50×" in tables.readme_table()
    assert "200.0" in tables.readme_table()
    assert "12.35" in tables.docs_table()  # of scoring


def test_without_a_gpu_it_is_one_sentence(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert command.main(["--out", "nowhere"]) == 2
    assert capsys.readouterr().out.count("\n") == 1
    assert not Path("nowhere").exists()


def test_kernels_are_importable_where_nothing_is_installed(tmp_path):
    for folder in ("bench", "kernels", "wandapp_kernels"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    program = (
        "import sys\n"
        "sys.meta_path = [each for each in sys.meta_path if 'editable' not in repr(each).lower()]\n"
        "from bench.h100 import make_importable\n"
        "make_importable()\n"
        "import wandapp_kernels.kernels as kernels\n"
        "assert kernels.__path__[0].endswith('kernels')\n"
        "make_importable()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env={"PYTHONPATH": "."})
