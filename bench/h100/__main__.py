"""``python -m bench.h100 --out bench/results/h100``: see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.h100 import make_importable
from bench.h100.clock import Clock, Section

LIMIT = 540.0  # of ten minutes; the rest is for starting, for a case that is longer than those before, and for writing

# Seconds of each section. What one does not need, the next one gets.
SECONDS = {
    **{"numerics": 150.0, "swiglu": 10.0, "micro": 180.0},
    **{"scoring": 20.0, "pruning": 50.0, "generation": 120.0},
}


class WrongResult(Exception):
    """A kernel computes something else than the reference, or was not compared with it."""


def run_sections(
    sections: Mapping[str, Callable[[Section], None]],
    clock: Clock,
    done: Callable[[dict[str, Any]], None],
    save: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Run the sections within their boxes.

    After each case ``save`` gets everything so far, after each section ``done``. A section that fails is entered with
    its error, and the next one runs; WrongResult ends the run.
    """
    found: dict[str, Any] = {}
    deadline = 0.0
    for name, run in sections.items():
        deadline += SECONDS[name]
        section = Section(name, deadline - clock.spent, clock, lambda now: save({**found, now.name: now.to_dict()}))
        if clock.left <= 0:
            section.leave_out(name, "no time was left")
        else:
            try:
                run(section)
            except WrongResult:
                found[name] = section.to_dict()
                done(found)
                raise
            except Exception as error:
                section.leave_out(f"the rest of {name}", f"{type(error).__name__}: {error}")
        found[name] = section.to_dict()
        done(found)
    return found


def check_numerics(section: Section) -> None:
    """All checks; raises WrongResult with every failure, each in a sentence. A check left out is one."""
    from bench.h100 import numerics, scoring

    def failures() -> Iterator[str]:
        for check in (numerics.check_linears, numerics.check_swiglu, numerics.check_graph, scoring.check):
            try:
                yield from check(section)
            except Exception as error:
                yield f"{check.__name__}: {type(error).__name__}: {error}"
        if section.no_time:
            yield f"{section.no_time} shapes were not checked: no time was left"

    if wrong := list(failures()):
        raise WrongResult("; ".join(wrong))


def machine() -> dict[str, Any]:
    """What the results depend on."""
    import numpy
    import transformers

    import wandapp_kernels
    from bench.h100.timing import CACHE_MULTIPLE, copy_bandwidth

    properties = torch.cuda.get_device_properties(0)
    versions = {"wandapp_kernels": wandapp_kernels.__version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "numpy": numpy.__version__, "CUDA": str(torch.version.cuda)}
    for name in ("triton", "cupy"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = "not installed"
    return {
        "gpu": torch.cuda.get_device_name(0),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "bandwidth": copy_bandwidth(),
        "cache_multiple": CACHE_MULTIPLE,
        "versions": versions,
    }


def write_results(folder: Path, report: dict[str, Any]) -> None:
    """``results.json``, replaced as a whole."""
    from wandapp_kernels.checkpoint.atomic import write_text_atomic
    from wandapp_kernels.checkpoint.save import to_json

    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "results.json", to_json(report))


def write(folder: Path, report: dict[str, Any]) -> None:
    """``results.json``, ``table.md`` and the plots."""
    from bench.h100.tables import page, plots
    from wandapp_kernels.checkpoint.atomic import write_text_atomic

    write_results(folder, report)
    write_text_atomic(folder / "table.md", page(report))
    for name, svg in plots(report["sections"].get("micro", {"rows": []})["rows"]).items():
        write_text_atomic(folder / name, svg)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.h100", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/h100"))
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of the whole run")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("bench.h100 measures an NVIDIA GPU, and this torch sees none: run it on a machine that has one.")
        return 2
    clock = Clock(chosen.seconds)
    make_importable()
    from bench.h100 import micro, models, scoring, swiglu

    report: dict[str, Any] = {"machine": machine(), "sections": {}}
    bandwidth, cache = report["machine"]["bandwidth"], report["machine"]["l2_bytes"]
    sections: dict[str, Callable[[Section], None]] = {
        "numerics": check_numerics,
        "swiglu": lambda section: swiglu.measure(section, cache),
        "micro": lambda section: micro.measure(section, bandwidth, cache),
        "scoring": lambda section: scoring.measure(section, bandwidth),
        "pruning": models.measure_pruning,
        "generation": models.measure_generation,
    }

    def save(found: dict[str, Any]) -> None:
        report["sections"] = found
        write_results(chosen.out, report)

    def done(found: dict[str, Any]) -> None:
        report["sections"] = found
        write(chosen.out, report)
        print(f"{list(found)[-1]}: {len(found[list(found)[-1]]['rows'])} rows, {clock.left:.0f} s left", flush=True)

    try:
        run_sections(sections, clock, done, save)
    except WrongResult as error:
        print(f"A kernel is wrong or was not checked, so nothing was timed: {error}")
        return 1
    print(f"{chosen.out / 'table.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
