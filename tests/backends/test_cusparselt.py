"""torch's semi-structured kernels as backends: padding, search, refusals; the libraries themselves are stood in for."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import fake_cusparselt
import pytest
import torch
from fake_cupy import Gpu, install
from fake_cusparselt import DIES, FOUND, FULL, HANGS, PRINTS, RAISES, WRONG, FakeLibrary

from wandapp_kernels import dispatch
from wandapp_kernels.backends import cusparselt, cusparselt_algorithms, cusparselt_products, cusparselt_search
from wandapp_kernels.backends.base import Problem, UnusableError, epoch
from wandapp_kernels.backends.child import Child
from wandapp_kernels.backends.cusparselt import CuSparseLtBackend, CuSparseLtLayout, CutlassBackend, CutlassLayout
from wandapp_kernels.backends.cusparselt_algorithms import Algorithms, algorithms
from wandapp_kernels.backends.cusparselt_products import DEFAULT, pad_tokens
from wandapp_kernels.errors import KernelError, UsageError
from wandapp_kernels.ops.nm_linear import nm_linear
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.pattern import Pattern

PATTERN = Pattern.parse("2:4")
PROBLEM = Problem("nm_linear", 512, 64, 128, "2:4", 50, torch.bfloat16, "cuda:0", 0)
BF16 = torch.bfloat16


class Here:
    """The searching process without the process: who asks whom, not how."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.answers: dict[str, dict] = {}

    def ask(self, question):
        self.asked.append(dict(question))
        if question["job"] in self.answers:
            return self.answers[question["job"]]
        return cusparselt_search.answer({**question, "device": "cpu"})

    def jobs(self) -> list[tuple]:
        return [(one["job"], one["rows"], one["tokens"], one["bias"]) for one in self.asked]


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator[Gpu]:
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(cusparselt._SemiStructuredLayout, "_dense", lambda self, weight: weight.decompress())
    algorithms.cache_clear()
    yield install(monkeypatch)
    algorithms.cache_clear()


@pytest.fixture
def library(gpu, monkeypatch) -> FakeLibrary:
    fake = FakeLibrary()
    fake.put(monkeypatch.setattr)
    return fake


@pytest.fixture
def here(library, monkeypatch) -> Here:
    """Searches answer at once, in this process, FOUND."""
    one = Here()
    monkeypatch.setattr(cusparselt_algorithms, "SEARCHER", one)
    search = types.SimpleNamespace(mm_search=lambda *given: (*FOUND, 40))
    monkeypatch.setattr(torch._C, "_cusparselt", search, raising=False)
    return one


def weight(rows=64, columns=128, dtype=torch.bfloat16) -> NMWeight:
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense.view(rows, -1, 4)[..., ::2] = 0
    dense[:, :8] = 0
    dense[0, 2] = -0.0
    dense[1, 5] = 1.0
    return NMWeight.compress(dense, pattern="2:4")


CASES = [(CuSparseLtBackend(), CuSparseLtLayout()), (CutlassBackend(), CutlassLayout())]


@pytest.mark.parametrize(("backend", "layout"), CASES, ids=["cusparselt", "cutlass"])
@pytest.mark.parametrize("tokens", [1, 7, 8, 65])
@pytest.mark.parametrize("with_bias", [False, True])
def test_product(here, backend, layout, tokens, with_bias):
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias = torch.randn(64).bfloat16() if with_bias else None
    out = backend.run(x, layout.pack(weight()), bias, (64, 128), PATTERN)
    reference = torch.nn.functional.linear(
        x.double(), weight().decompress().double(), None if bias is None else bias.double()
    )
    assert out.shape == (tokens, 64)
    torch.testing.assert_close(out.double(), reference, rtol=2.0**-6, atol=2.0**-5)


@pytest.mark.parametrize("layout", [CuSparseLtLayout(), CutlassLayout()], ids=["cusparselt", "cutlass"])
def test_layouts_are_invertible(here, layout, monkeypatch):
    monkeypatch.setattr(cusparselt_products, "_TILE", 48)
    tensors = layout.pack(weight())
    assert torch.equal(layout.decompress(tensors, (64, 128), PATTERN), weight().decompress())
    back = layout.unpack(tensors, (64, 128), PATTERN)
    back.validate()
    assert torch.equal(back.decompress(), weight().decompress())


def run(rows: int, tokens: int, bias: bool = False, columns: int = 128) -> torch.Tensor:
    held = weight(rows, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3)).bfloat16()
    tensors = CuSparseLtLayout().pack(held)
    return CuSparseLtBackend().run(x, tensors, torch.zeros(rows).bfloat16() if bias else None, (rows, columns), PATTERN)


def test_the_algorithm_is_searched_once_per_bucket_and_kept(here, library):
    for tokens in (500, 512, 64, 3):
        library.algorithms.clear()
        assert run(64, tokens).shape == (tokens, 64)
        assert library.algorithms[-1] == FOUND
    assert here.jobs() == [("search", 64, tokens, False) for tokens in (512, 64, 8)]
    again = Algorithms("cpu")
    content = json.loads(again.path.read_text())
    assert content["found"] == {f"64x128 m{bucket} bfloat16": list(FOUND) for bucket in (512, 64, 8)}
    assert again.search((64, 128), 300, BF16, False) == FOUND
    assert len(here.asked) == 3
    assert again.search((64, 128), 300, BF16, True) == FOUND
    assert here.jobs()[3:] == [("search", 64, 512, True)]


def test_an_algorithm_that_splits_nothing_is_called_by_its_number(here, library, monkeypatch):
    monkeypatch.setattr(torch._C._cusparselt, "mm_search", lambda *given: (4, 1, 0, 40))
    run(64, 64)
    assert library.algorithms[-1] == (4,)


def test_both_ends_of_the_bucket_are_tried(here, monkeypatch):
    tried = []
    check = cusparselt_search.check

    def noting(product, weight, tokens, bias):
        tried.append(tokens)
        check(product, weight, tokens, bias)

    monkeypatch.setattr(cusparselt_search, "check", noting)
    for tokens in (8, 16, 512):
        tried.clear()
        assert algorithms("cpu").search((64, 128), tokens, BF16, False) == FOUND
        assert sorted(tried) == {8: [8], 16: [16], 512: [264, 512]}[tokens]


def test_under_capture_nothing_is_searched(here, library, gpu):
    gpu.capturing = True
    with pytest.raises(UnusableError, match="before"):
        run(64, 64)
    assert not library.algorithms and not here.asked
    gpu.capturing = False
    assert algorithms("cpu").default(BF16) == DEFAULT
    gpu.capturing = True
    library.algorithms.clear()
    run(64, 64)
    assert library.algorithms == [(0,)] and here.jobs() == [("default", 512, 64, True)]
    here.answers["default"] = {"reason": "it died", "lasting": True}
    assert algorithms("cpu").default(torch.float16) == "it died"
    gpu.capturing = False
    run(64, 64)
    gpu.capturing = True
    run(64, 64)
    assert library.algorithms[-1] == FOUND


def test_in_a_capture_a_default_that_failed_is_not_used(here, library, gpu):
    here.answers["default"] = {"reason": "it died", "lasting": True}
    algorithms("cpu").default(BF16)
    gpu.capturing = True
    with pytest.raises(UnusableError, match="it died"):
        run(64, 64)
    assert not library.algorithms


def test_a_problem_that_cannot_be_searched_is_refused_from_then_on(here, library, gpu):
    here.answers["search"] = {"reason": "the process died (signal 6)", "lasting": True}
    backend, before = CuSparseLtBackend(), epoch()
    assert backend.supports(PROBLEM) is None
    for _ in range(2):
        with pytest.raises(UnusableError, match=r"signal 6"):
            run(64, 512)
    assert epoch() > before and here.jobs()[1:] == [("search", 64, 512, False)]
    # What is known of the CPU, where this weight is, is not what is known of the GPU.
    algorithms("cuda:0").search((64, 128), 512, BF16, True)
    assert backend.supports(PROBLEM) == "it fails on this GPU: the process died (signal 6)"
    assert backend.supports(replace(PROBLEM, tokens=64)) is None
    assert Algorithms("cpu").search((64, 128), 512, BF16, False) == "the process died (signal 6)"
    assert here.jobs().count(("search", 64, 512, False)) == 1


def test_a_layer_whose_problem_proves_unusable_is_decompressed(here, library, monkeypatch):
    here.answers["search"] = {"reason": "the process died", "lasting": True}
    tensors, x = CuSparseLtLayout().pack(weight()), torch.randn(3, 70, 128).bfloat16()
    expected = torch.nn.functional.linear(x, weight().decompress())
    call = CuSparseLtBackend().bind(tensors, None, (64, 128), PATTERN)
    torch.testing.assert_close(call(x, (tensors, None)), expected)
    monkeypatch.setattr(dispatch, "_decide", lambda *given: CuSparseLtBackend())
    rows = x.view(-1, 128)
    for _ in range(2):
        got = nm_linear(rows, tensors, None, 64, 128, layout="nm-cusparselt")
        torch.testing.assert_close(got, expected.view(-1, 64))
    assert here.jobs().count(("search", 64, 256, False)) == 1


def test_memory_that_was_missing_is_no_lasting_reason(here, monkeypatch):
    here.answers["search"] = {"reason": "CUDA out of memory", "lasting": False}
    first = algorithms("cpu")
    for _ in range(2):
        assert first.search((64, 128), 64, BF16, False) == "CUDA out of memory"
    assert len(here.asked) == 1 and not first.path.exists()
    here.answers.clear()
    assert Algorithms("cpu").search((64, 128), 64, BF16, False) == FOUND


def test_a_layout_whose_way_back_fails_says_so(here):
    here.answers["default"] = {"reason": "the process died", "lasting": True}
    layout = CuSparseLtLayout()
    with pytest.raises(KernelError, match="the process died"):
        layout.decompress(layout.pack(weight()), (64, 128), PATTERN)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 9}', '{"format": 2, "fingerprint": FINGERPRINT, "found": {"a": null}}'],
)
def test_a_file_that_is_damaged_or_of_another_gpu_is_ignored(library, content):
    first = Algorithms("cpu")
    first.path.parent.mkdir(parents=True, exist_ok=True)
    first.path.write_text(content.replace("FINGERPRINT", json.dumps(first.fingerprint)))
    assert Algorithms("cpu")._found == {}


def test_supports(here, gpu):
    gpu.capability = (8, 6)
    for backend, _ in CASES:
        assert backend.supports(PROBLEM) is None
        assert "2:4 only" in backend.supports(replace(PROBLEM, pattern="4:8"))
        assert "float16 and bfloat16" in backend.supports(replace(PROBLEM, dtype=torch.float32))
        assert "below 64" in backend.supports(replace(PROBLEM, tokens=32))
        assert "multiples" in backend.supports(replace(PROBLEM, in_features=100))
        assert "NVIDIA GPU" in backend.supports(replace(PROBLEM, device="cpu"))
    assert CuSparseLtBackend().supports(replace(PROBLEM, out_features=16, in_features=48)) is None
    assert CutlassBackend().supports(replace(PROBLEM, out_features=16)) is not None
    # Asked once per type, and about nothing that is refused anyway.
    assert [one["job"] for one in here.asked] == ["default", "cutlass"]


def test_gpus_that_are_known_to_fail_are_not_tried(here, gpu):
    gpu.capability = (9, 0)
    assert "8.x, and this GPU has 9.0" in CutlassBackend().supports(PROBLEM)
    gpu.capability = (7, 5)
    assert "8.0, and this GPU has 7.5" in CuSparseLtBackend().supports(PROBLEM)
    assert not here.asked


def test_a_gpu_that_cannot_be_asked_is_a_reason(here, monkeypatch):
    def fail(device):
        raise AssertionError("Invalid device id")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert "Invalid device id" in CuSparseLtBackend().supports(PROBLEM)


def test_a_library_that_fails_at_run_time_is_a_reason(here, library, gpu, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no such kernel\nmore")

    gpu.capability = (8, 0)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", refuse)
    assert CutlassBackend().supports(PROBLEM) == "it fails on this GPU: no such kernel more"
    monkeypatch.setattr(torch, "_cslt_sparse_mm", refuse)
    assert CuSparseLtBackend().supports(PROBLEM) == "it fails on this GPU: no such kernel more"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in CuSparseLtBackend().supports(PROBLEM)


@pytest.fixture
def process(library, monkeypatch) -> Iterator[Child]:
    """A real process with the fake library, which leaves when nobody has asked for a second."""
    command = [sys.executable, fake_cusparselt.__file__, "1"]
    child = Child(command, 60)
    monkeypatch.setattr(cusparselt_algorithms, "SEARCHER", child)
    yield child
    child.close()


def question(rows: int) -> dict:
    sizes = {"rows": rows, "columns": 64, "tokens": 8, "bias": False}
    return {"job": "search", "device": "cpu", "dtype": "bfloat16", **sizes}


def test_a_process_searches_for_many_problems_and_outlives_none_that_fails(process):
    first = process.ask(question(16))
    assert first["algorithm"] == list(FOUND)
    assert process.ask(question(PRINTS))["process"] == process.ask(question(32))["process"] == first["process"]
    for rows, words in ((RAISES, "illegal instruction was encountered more"), (WRONG, "not the dense one")):
        found = process.ask(question(rows))
        assert words in found["reason"] and found["lasting"]
        later = process.ask(question(16))
        assert later["algorithm"] == list(FOUND) and later["process"] != found["process"]
    assert process.ask(question(FULL))["lasting"] is False


def test_what_ends_the_process_is_recorded_and_the_next_search_has_a_new_one(process):
    known = algorithms("cpu")
    assert known.search((16, 64), 8, BF16, False) == FOUND
    reason = known.search((DIES, 64), 8, BF16, False)
    assert reason == "the process died (signal 6): internal error when calling cusparseLtMatmulSearch"
    process._seconds = 3
    assert known.search((HANGS, 64), 8, BF16, False) == "no answer within 3 seconds"
    process._seconds = 60
    assert known.search((32, 64), 8, BF16, False) == FOUND
    found = json.loads(known.path.read_text())["found"]
    assert found == {
        "16x64 m8 bfloat16": list(FOUND),
        "32x64 m8 bfloat16": list(FOUND),
        f"{DIES}x64 m8 bfloat16": reason,
        f"{HANGS}x64 m8 bfloat16": "no answer within 3 seconds",
    }


def test_a_process_that_nobody_asks_ends(process):
    process.ask(question(16))
    assert process._process.wait(30) == 0
    assert process.ask(question(16))["algorithm"] == list(FOUND)


def test_layouts_refuse_what_they_cannot_hold(monkeypatch):
    for layout in (CuSparseLtLayout(), CutlassLayout()):
        assert "on a GPU" in layout.supports(weight())
        assert "float32" in layout.supports(weight(dtype=torch.float32))
        four_of_eight = NMWeight.compress(torch.zeros(8, 8), torch.arange(8).expand(8, 8) < 4, "4:8")
        assert "2:4 weights only" in layout.supports(four_of_eight)
        with pytest.raises(UsageError):
            layout.pack(four_of_eight)


def test_tokens_are_padded_to_eights():
    assert [pad_tokens(torch.ones(tokens, 4)).shape[0] for tokens in (1, 8, 9)] == [8, 8, 16]
    assert pad_tokens(torch.ones(3, 4)).sum() == 12
