"""The CPU kernels in a process that was forked from one that uses them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("wandapp_kernels._cpu", reason="the compiled CPU kernels are missing")

from cpu_runs import run

from tests.csrc_cpu.cpu_cases import make_case


def in_a_forked_child(passes: Callable[[], bool]) -> int:
    """The exit status of a child: 0 where ``passes()`` is true there. A child that hangs is ended by an alarm."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if passes() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_computes_too(two_threads):
    torch.set_num_threads(2)
    case = make_case("bitmap", torch.float32, 1, 900, 576)
    want = run(case)
    assert in_a_forked_child(lambda: torch.equal(run(case), want)) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_ends_whatever_happens_in_it():
    def fails() -> bool:
        raise RuntimeError("in the child")

    assert in_a_forked_child(lambda: False) == in_a_forked_child(fails) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_forked_before_the_kernels_are_loaded_leaves_openmp_alone():
    script = (
        "import os, signal, torch, wandapp_kernels\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(4000, 1000).sum(0)  # the parent's OpenMP has threads\n"
        "x, weight = torch.ones(1, 1024), torch.eye(1024)  # in the child torch itself would hang\n"
        "child = os.fork()\n"
        "if child:\n"
        "    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "signal.alarm(60)\n"
        "from wandapp_kernels.backends.cpu import compiled\n"
        "assert compiled._cpu.parallel_backend() == 'own'\n"
        "outputs = compiled.linear('dense', x, [([weight], None, (1024, 1024))])\n"
        "assert torch.equal(outputs[0], x)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
