"""What the searching process does with one question: weights, searches, and no answer that was not compared."""

from __future__ import annotations

import json
import subprocess
import types

import pytest
import torch
from fake_cusparselt import FakeLibrary, mm_search

from wandapp_kernels.backends import cusparselt_products, cusparselt_search
from wandapp_kernels.backends.child import module_command
from wandapp_kernels.backends.cusparselt_products import Algorithm

SIZES = {"rows": 64, "columns": 128, "tokens": 64, "bias": True}


def test_the_older_search_serves_where_the_newer_is_missing(monkeypatch):
    monkeypatch.delattr(torch._C, "_cusparselt", raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", lambda blob, x, bias=None, transpose_result=False: 9)
    held = torch.ones(16, 16, dtype=torch.bfloat16)
    assert cusparselt_search.search(held, held, None) == Algorithm(9)


@pytest.mark.parametrize("job", ["search", "default", "cutlass"])
@pytest.mark.parametrize("wrong", ["nan", "one element", "bias"])
def test_a_wrong_product_is_never_answered(job, wrong, monkeypatch):
    FakeLibrary().put(monkeypatch.setattr)
    monkeypatch.setattr(torch._C, "_cusparselt", types.SimpleNamespace(mm_search=mm_search), raising=False)

    def spoil(linear):
        def spoilt(*given):
            out = linear(*given).clone()
            if wrong != "bias":
                out[-1, -1] = float("nan") if wrong == "nan" else out[-1, -1] + 0.2
            return out if wrong != "bias" or given[-1 if job == "cutlass" else 2] is None else out + 0.2

        return spoilt

    name = "cutlass_linear" if job == "cutlass" else "cusparselt_linear"
    monkeypatch.setattr(cusparselt_search, name, spoil(getattr(cusparselt_products, name)))
    found = cusparselt_search.answer({"job": job, "device": "cpu", "dtype": "bfloat16", **SIZES})
    assert "not the dense one" in found["reason"] and found["ends"]


def test_the_random_weight_is_two_of_four_in_every_place():
    kept = cusparselt_search.random_weight(64, 256, torch.float16, "cpu").view(-1, 4) != 0
    assert bool((kept.sum(1) == 2).all()) and len(kept.unique(dim=0)) == 6


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        ("CUDA error: out of memory", False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", False),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", False),
        ("CUDA error: an illegal instruction was encountered", True),
    ],
)
def test_the_state_of_the_gpu_is_no_lasting_reason(monkeypatch, error, lasting):
    def fail(*_):
        raise RuntimeError(error)

    asked = {"job": "search", "device": "cpu", "dtype": "bfloat16", **SIZES}
    monkeypatch.setitem(cusparselt_search._JOBS, "search", fail)
    assert cusparselt_search.answer(asked) == {"reason": error, "lasting": lasting, "ends": True}
    monkeypatch.setattr(cusparselt_search, "random_weight", fail)  # nothing was tried yet
    assert cusparselt_search.answer(asked)["lasting"] is False


def test_the_module_answers_as_a_program():
    asked = json.dumps({"job": "cutlass", "device": "cpu", "dtype": "float16", **SIZES}) + "\n"
    command = module_command("wandapp_kernels.backends.cusparselt_search")
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    # There is no such library for a CPU: that is the answer.
    assert json.loads(done.stdout)["lasting"] and done.stdout.count("\n") == 1
