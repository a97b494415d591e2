"""What is known of the vendor's 2:4 products on a GPU: found out once, in another process, and kept in a file."""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from filelock import FileLock

from wandapp_kernels.backends.base import choices_changed
from wandapp_kernels.backends.child import Child, ChildError, module_command
from wandapp_kernels.backends.cusparselt_products import TOKEN_MULTIPLE, Algorithm
from wandapp_kernels.backends.problem import token_bucket
from wandapp_kernels.cache import cache_dir
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.tuning.device import fingerprint

FORMAT = 2

# What the default algorithm and CUTLASS are tried with: every tile of theirs fits.
_TRIAL = {"rows": 512, "columns": 512, "tokens": 64, "bias": True}

SEARCHER = Child(module_command("wandapp_kernels.backends.cusparselt_search"))


class Algorithms:
    """cuSPARSELt's best algorithm for each problem, or why there is none.

    ``cache_dir()/dispatch/cusparselt-DIGEST.json``::

        {"format": 2, "fingerprint": {"device": …, …},
         "found": {"4096x14336 m64 bfloat16 bias": [3, 1, -1], "default float16": "the process died (signal 6): …"}}
    """

    def __init__(self, device: str):
        self._device = device
        self.fingerprint = {**fingerprint(device), "cusparselt": str(torch.backends.cusparselt.version())}
        digest = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_dir() / "dispatch" / f"cusparselt-{digest}.json"
        self._lock = threading.Lock()
        self._passing: dict[str, str] = {}
        self._found = self._read()

    def known(self, shape: tuple[int, int], tokens: int, dtype: torch.dtype, bias: bool) -> Algorithm | str | None:
        """The algorithm, or the reason why the problem cannot be run; None as long as nobody has searched."""
        return self._known(_name(shape, _padded(tokens), dtype, bias))

    def search(self, shape: tuple[int, int], tokens: int, dtype: torch.dtype, bias: bool) -> Algorithm | str:
        """The same, searched now if it is not known. Takes seconds then."""
        padded = _padded(tokens)
        sizes = {"rows": shape[0], "columns": shape[1], "tokens": padded, "bias": bias}
        return self._find(_name(shape, padded, dtype, bias), "search", dtype, sizes)

    def default(self, dtype: torch.dtype) -> Algorithm | str:
        """The default algorithm if it computes the right thing in this type, else the reason."""
        return self._find(f"default {_kind(dtype)}", "default", dtype, _TRIAL)

    def cutlass(self, dtype: torch.dtype) -> Algorithm | str:
        """The same for CUTLASS's product, which has one algorithm."""
        return self._find(f"cutlass {_kind(dtype)}", "cutlass", dtype, _TRIAL)

    def known_default(self, dtype: torch.dtype) -> Algorithm | str | None:
        """As :meth:`default`, None if it was never tried."""
        return self._known(f"default {_kind(dtype)}")

    def _known(self, name: str) -> Algorithm | str | None:
        return self._found.get(name, self._passing.get(name))

    def _find(self, name: str, job: str, dtype: torch.dtype, sizes: Mapping[str, Any]) -> Algorithm | str:
        with self._lock:
            if (known := self._known(name)) is not None:
                return known
            found, lasting = self._ask({"job": job, "device": self._device, "dtype": _kind(dtype), **sizes})
            if lasting:
                self._found[name] = found
                self._write()
            else:  # in the next process it may be otherwise
                assert isinstance(found, str)
                self._passing[name] = found
        if isinstance(found, str):
            choices_changed()
        return found

    def _ask(self, question: Mapping[str, Any]) -> tuple[Algorithm | str, bool]:
        """The answer, and whether it holds for other processes."""
        try:
            answer = SEARCHER.ask(question)
        except ChildError as error:
            return str(error), error.lasting
        if "algorithm" in answer:
            return Algorithm(*answer["algorithm"]), True
        return str(answer["reason"]), bool(answer["lasting"])

    def _read(self) -> dict[str, Algorithm | str]:
        try:
            content = json.loads(self.path.read_text("utf-8"))
            if content["format"] != FORMAT or content["fingerprint"] != self.fingerprint:
                return {}
            return {str(name): _entry(value) for name, value in content["found"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                self._found = self._read() | self._found
                content: dict[str, Any] = {"format": FORMAT, "fingerprint": self.fingerprint}
                content["found"] = dict(sorted(self._found.items()))
                write_text_atomic(self.path, json.dumps(content, indent=1) + "\n")
        except (OSError, CheckpointError) as error:
            warnings.warn(f"cuSPARSELt's algorithms cannot be kept in {self.path}: {error}", stacklevel=5)


@lru_cache(maxsize=16)
def algorithms(device: str) -> Algorithms:
    """What is known of the vendor's products on ``device``."""
    return Algorithms(device)


def _entry(value: Any) -> Algorithm | str:
    if isinstance(value, str):
        return value
    number, split_k, split_k_mode = value
    return Algorithm(int(number), int(split_k), int(split_k_mode))


def _padded(tokens: int) -> int:
    return max(token_bucket(tokens), TOKEN_MULTIPLE)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(shape: tuple[int, int], padded: int, dtype: torch.dtype, bias: bool) -> str:
    return f"{shape[0]}x{shape[1]} m{padded} {_kind(dtype)}{' bias' if bias else ''}"
