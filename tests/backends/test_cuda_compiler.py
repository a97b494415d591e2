"""Compiled ahead, or by NVRTC at first use: names, cache, refusals."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from fake_cupy import Gpu, Nvrtc, install

from wandapp_kernels.backends.cuda import ahead, compiler
from wandapp_kernels.errors import KernelError


@pytest.fixture
def folder(monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "twice.cu").write_text('#include "number.cuh"\n')
    (sources / "number.cuh").write_text("// 2\n")
    for module in (ahead, compiler):
        monkeypatch.setattr(module, "source_folder", lambda: sources)
    monkeypatch.setattr(compiler, "AHEAD", tmp_path / "cubins")
    monkeypatch.setenv("WANDAPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(compiler.NO_JIT, raising=False)
    ahead.source_hash.cache_clear()
    return sources


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return install(monkeypatch)


def test_compiled_once_and_kept(folder, gpu):
    first = compiler.compiled("twice", (9, 0))
    assert first.read_bytes() == b"cubin of twice.cu"
    assert compiler.compiled("twice", (9, 0)) == first
    assert gpu.compilations == [("twice.cu", "--std=c++17", "--gpu-architecture=sm_90a")]
    assert not list(first.parent.glob(f"{first.stem}.[0-9]*"))


def test_source_header_target_and_compiler_are_in_the_name(folder, gpu):
    names = {compiler.compiled("twice", (9, 0)), compiler.compiled("twice", (8, 0))}
    gpu.nvrtc_version = (13, 1)
    names.add(compiler.compiled("twice", (8, 0)))
    (folder / "number.cuh").write_text("// 3\n")
    ahead.source_hash.cache_clear()
    names.add(compiler.compiled("twice", (8, 0)))
    (folder / "twice.cu").write_text("\n")
    ahead.source_hash.cache_clear()
    names.add(compiler.compiled("twice", (8, 0)))
    assert len(names) == len(gpu.compilations) == 5


def test_a_gpu_newer_than_the_compiler_gets_ptx(folder, gpu):
    result = compiler.compiled("twice", (13, 0))
    assert result.suffix == ".ptx"
    assert result.read_bytes() == b"ptx of twice.cu"
    assert gpu.compilations[0][2] == "--gpu-architecture=compute_100"


def test_targets():
    assert compiler.target((8, 6), [80, 86, 90]) == ("sm_86", True)
    assert compiler.target((8, 7), [80, 86, 90]) == ("compute_86", False)
    with pytest.raises(KernelError, match=r"8\.0"):
        compiler.target((8, 0), [90])


def test_what_was_compiled_ahead_is_preferred(folder, gpu):
    compiler.AHEAD.mkdir()
    fatbin = compiler.AHEAD / ahead.fatbin_name(folder, "twice")
    fatbin.write_bytes(b"")
    assert compiler.compiled("twice", (9, 0)) == fatbin
    (folder / "number.cuh").write_text("// stale now\n")
    ahead.source_hash.cache_clear()
    assert compiler.compiled("twice", (9, 0)) != fatbin


def test_compiling_can_be_forbidden(folder, gpu, monkeypatch):
    monkeypatch.setenv(compiler.NO_JIT, "1")
    with pytest.raises(KernelError, match=r"\$WANDAPP_NO_JIT forbids"):
        compiler.compiled("twice", (9, 0))
    assert not gpu.compilations


def test_a_source_that_does_not_compile_shows_the_log(folder, gpu):
    gpu.nvrtc_fails = True
    with pytest.raises(KernelError, match=r"twice\.cu: line 3: no such thing"):
        compiler.compiled("twice", (9, 0))
    assert not list((folder.parent / "cache").rglob("*.cubin"))


def test_without_cupy_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(KernelError, match=r"wandapp_kernels\[cuda13\]"):
        compiler.compiled("twice", (9, 0))


def broken(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: m.setitem(sys.modules, "cupy_backends.cuda.libs", None), r"wandapp_kernels\[cuda13\]"),
        (lambda m: m.setattr(Nvrtc, "getVersion", broken(RuntimeError("libnvrtc.so.13:\nno such file"))), "NVRTC does"),
        (lambda m: m.setattr(Nvrtc, "getSupportedArchs", broken(AttributeError("x"))), "NVRTC does not load"),
        (lambda m: m.setattr(Nvrtc, "getSupportedArchs", lambda nvrtc: (100,)), r"capability 9\.0"),
        (lambda m: m.setenv(compiler.NO_JIT, "1"), r"\$WANDAPP_NO_JIT forbids"),
    ],
)
def test_what_cannot_be_compiled_is_known_before(folder, gpu, monkeypatch, damage, words):
    assert compiler.why_not((9, 0)) is None
    damage(monkeypatch)
    reason = compiler.why_not((9, 0))
    assert re.search(words, reason) and "\n" not in reason
    compiler.AHEAD.mkdir()
    (compiler.AHEAD / ahead.fatbin_name(folder, "twice")).write_bytes(b"")
    assert compiler.why_not((9, 0)) is None
    assert not gpu.compilations


def test_nvcc_compiles_what_changed_and_drops_what_is_stale(folder, monkeypatch, tmp_path):
    ran = []

    def run(command):
        ran.append(command)
        (tmp_path / command[-1]).write_bytes(b"fat")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ahead.shutil, "which", lambda name: "/cuda/bin/nvcc")
    monkeypatch.setattr(ahead.subprocess, "run", run)
    package = tmp_path / "package"
    (first,) = ahead.build(package)
    assert (package / "sources" / "number.cuh").exists()
    assert [option for option in ran[0] if "code=" in option] == list(ahead.TARGETS)
    assert ahead.build(package) == [first]
    assert len(ran) == 1
    (folder / "twice.cu").write_text("// changed\n")
    ahead.source_hash.cache_clear()
    (second,) = ahead.build(package)
    assert second != first
    assert not first.exists()


def test_without_nvcc_or_with_one_that_fails_nothing_is_made(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert ahead.build(tmp_path / "package") == []
    monkeypatch.setattr(shutil, "which", lambda name: "/cuda/bin/nvcc")
    monkeypatch.setattr(ahead.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 1))
    assert ahead.build(tmp_path / "package") == []


def test_every_source_is_self_contained():
    folder = ahead.source_folder()
    assert {"bitmap_decode", "bitmap_decompress", "nm_decode"} <= set(ahead.sources(folder))
    known = set(ahead.headers(folder))
    for path in [*folder.glob("*.cu"), *folder.glob("*.cuh")]:
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                name = line.split('"')[1]
                assert name in known or name.startswith("../emulation/"), f"{path.name} includes {name}"
