"""Packaging: the library is wandapp_kernels/; kernels/ is installed as wandapp_kernels.kernels; csrc/cpu is compiled,
and csrc/cuda where there is an nvcc.

The C++ module is optional: where it cannot be built, the package installs without it and says so.
"""

from __future__ import annotations

import platform
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARY = find_packages(include=["wandapp_kernels", "wandapp_kernels.*"])
CPU = Path("csrc/cpu")
CUDA = Path("wandapp_kernels/backends/cuda")

FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
# GCC 12 takes the undefined registers inside its own intrinsics for mistakes.
AVX512 = [
    *AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512vbmi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
AMX = [*AVX512, "-mavx512vbmi2", "-mamx-tile", "-mamx-bf16"]


def avx512_macros(kernel: str, bf16_dot: int, expand_words: int) -> list[tuple[str, str]]:
    """What tells the compilations of kernels_avx512.cpp apart."""
    flags = {"WANDAPP_BF16_DOT": bf16_dot, "WANDAPP_EXPAND_WORDS": expand_words}
    return [("WANDAPP_AVX512_KERNEL", kernel), *((name, str(value)) for name, value in flags.items())]


# Files for one instruction set: name of the macro that announces them, and what is compiled with which flags.
VARIANTS = {
    "WANDAPP_HAVE_AVX2": [("kernels_avx2.cpp", AVX2, [])],
    "WANDAPP_HAVE_AVX512": [
        (
            "kernels_avx512.cpp",
            AVX512,
            avx512_macros("avx512_kernel", bf16_dot=0, expand_words=0),
        ),
        (
            "kernels_avx512.cpp",
            [*AVX512, "-mavx512bf16"],
            avx512_macros("avx512_bf16_kernel", bf16_dot=1, expand_words=0),
        ),
        (
            "kernels_avx512.cpp",
            [*AVX512, "-mavx512bf16", "-mavx512vbmi2"],
            avx512_macros("avx512_vbmi2_kernel", bf16_dot=1, expand_words=1),
        ),
    ],
    "WANDAPP_HAVE_AMX": [("kernels_amx.cpp", AMX, [])],
}
LIBRARIES = ["-ldl"] if platform.system() == "Linux" else []  # dlsym, before glibc 2.34
PLAIN = [
    "cpu_features.cpp",
    "tile_permission.cpp",
    "parallel.cpp",
    "thread_pool.cpp",
    "linear.cpp",
    "pieces.cpp",
    "windows_packing.cpp",
    "module.cpp",
]


class BuildKernels(build_ext):
    """Compiles every file with its own flags. An instruction set the compiler does not know is left out."""

    def run(self) -> None:
        super().run()
        root = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        runpy.run_path(str(CUDA / "ahead.py"))["build"](root / CUDA)

    def build_extension(self, extension: Extension) -> None:
        try:
            self.build_kernels(extension)
        except Exception as error:  # the only kind that an optional extension may fail with
            raise CompileError(f"the CPU kernels are left out, sparse layers will run slowly: {error}") from error

    def build_kernels(self, extension: Extension) -> None:
        import pybind11

        folder = Path(self.build_temp)
        x86 = platform.machine().lower() in ("x86_64", "amd64")

        def compile_file(task: tuple[str, list[str], list[tuple[str, str]]]) -> list[str]:
            name, flags, macros = task
            # One folder for each set of flags: kernels_avx512.cpp is compiled three times.
            output = folder / f"{Path(name).stem}-{len(flags)}"
            return self.compiler.compile(
                [str(CPU / name)],
                output_dir=str(output),
                macros=macros,
                include_dirs=[pybind11.get_include(), *self.include_dirs],
                extra_postargs=[*FLAGS, *flags],
                depends=extension.depends,
            )

        def compile_variant(files: list[tuple[str, list[str], list[tuple[str, str]]]]) -> list[str] | None:
            try:
                return [item for file in files for item in compile_file(file)]
            except Exception as error:
                self.warn(f"{files[0][0]} is left out: {error}")
                return None

        # First, so that without a compiler there is one message.
        objects = compile_file(("kernels_plain.cpp", [], []))
        with ThreadPoolExecutor(2) as pool:
            built = dict(zip(VARIANTS, pool.map(compile_variant, VARIANTS.values()), strict=True)) if x86 else {}
            found = [(macro, "1") for macro, files in built.items() if files]
            objects += [item for files in built.values() for item in files or ()]
            for more in pool.map(compile_file, [(name, [], found) for name in PLAIN]):
                objects += more
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            extra_postargs=["-pthread", *LIBRARIES],
            target_lang="c++",
        )


setup(
    packages=[*LIBRARY, "wandapp_kernels.kernels"],
    package_dir={"wandapp_kernels": "wandapp_kernels", "wandapp_kernels.kernels": "kernels"},
    package_data={"wandapp_kernels": ["py.typed"]},
    ext_modules=[
        Extension(
            "wandapp_kernels._cpu",
            sources=sorted(str(path) for path in CPU.glob("*.cpp")),
            depends=sorted(str(path) for path in CPU.glob("*.h")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
