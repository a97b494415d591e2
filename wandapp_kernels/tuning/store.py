"""What was measured, kept in one JSON file per device, versions and CPU kernels.

``cache_dir()/dispatch/DIGEST.json``::

    {"format": 1, "fingerprint": {"device": …, "torch": …, …},
     "problems": {"nm_linear 2:4 50% 4096x4096 m1 bfloat16 threads2":
                  {"times_us": {"dense": 812.0, …}, "left_out": {"triton-nm": "…"}}}}
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from filelock import FileLock

from wandapp_kernels.backends.problem import Problem, token_bucket
from wandapp_kernels.cache import cache_dir
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.errors import CheckpointError
from wandapp_kernels.sparsity.pattern import UNSTRUCTURED
from wandapp_kernels.tuning.device import fingerprint

FORMAT = 1

# A measurement stands for token counts up to this many doublings away from its own.
REACH = 2

# Nothing is measured at more tokens than 1 << this.
_LARGEST = 30


@dataclass(frozen=True)
class Measurement:
    """Candidates of one problem.

    Attributes:
        times_us: backend -> median time of a call in microseconds.
        left_out: backend -> why it was not measured, in a sentence.
    """

    times_us: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


class Store:
    """The measurements of one device. Reading happens once; a file that cannot be used is ignored with one warning."""

    def __init__(self, device: str):
        self.fingerprint = fingerprint(device)
        digest = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_dir() / "dispatch" / f"{digest}.json"
        self._problems = self._read(warn=True)

    def nearest(self, problem: Problem) -> tuple[Measurement | None, int]:
        """What was measured for the nearest token count within ``REACH`` doublings, and that count.

        Of two that are equally near the one with more tokens is taken. Where nothing was measured at an unstructured
        problem's density, its neighbours' times stand for it.
        """
        wanted, density = token_bucket(problem.tokens), problem.density_bucket
        densities = (density, density + 10, density - 10) if problem.pattern == UNSTRUCTURED else (density,)
        for density in densities:
            for distance in range(REACH + 1):
                for bucket in (wanted << distance, wanted >> distance):
                    found = self._problems.get(key(replace(problem, tokens=bucket, density_bucket=density)))
                    if found is not None:
                        return found, bucket
        return None, 0

    def exact(self, problem: Problem) -> Measurement | None:
        """What was measured for this very bucket of tokens."""
        return self._problems.get(key(problem))

    def counts(self, problem: Problem) -> dict[Problem, Measurement]:
        """What was measured for this problem at any number of tokens, fewest first: exactly it, no neighbour."""
        asked = (replace(problem, tokens=1 << power) for power in range(_LARGEST + 1))
        return {each: found for each in asked if (found := self.exact(each)) is not None}

    def put(self, measured: Mapping[Problem, Measurement]) -> None:
        """Remember, and add to what the file holds by now; a file that cannot be written costs one warning."""
        new = {key(problem): measurement for problem, measurement in measured.items()}
        self._problems |= new
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(self.path.name + ".lock")):
                # Another process may have written meanwhile.
                self._problems = self._problems | self._read(warn=False) | new
                held = {name: asdict(measurement) for name, measurement in sorted(self._problems.items())}
                content = {"format": FORMAT, "fingerprint": self.fingerprint, "problems": held}
                write_text_atomic(self.path, json.dumps(content, indent=1) + "\n")
        except (OSError, CheckpointError) as error:
            warnings.warn(f"the measurements cannot be kept in {self.path}: {error}", stacklevel=3)

    def _read(self, *, warn: bool) -> dict[str, Measurement]:
        try:
            content = json.loads(self.path.read_text("utf-8"))
            if content["format"] != FORMAT or content["fingerprint"] != self.fingerprint:
                raise ValueError("it is of another device or version")
            return {str(name): _measurement(entry) for name, entry in content["problems"].items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Exception as error:  # whatever can be wrong with a file that others can write
            if warn:
                what = f"{type(error).__name__}: {error}"
                warnings.warn(f"the measurements in {self.path} are ignored ({what}); delete the file", stacklevel=4)
            return {}


def key(problem: Problem) -> str:
    """How a problem is called in the file; the device is the file's."""
    kind = str(problem.dtype).removeprefix("torch.")
    return (
        f"{problem.operator} {problem.pattern} {problem.density_bucket}% {problem.out_features}x{problem.in_features} "
        f"m{token_bucket(problem.tokens)} {kind} threads{problem.threads}"
    )


def _measurement(entry: Any) -> Measurement:
    times = {str(name): float(time) for name, time in entry["times_us"].items()}
    if not times or not all(math.isfinite(time) and time > 0 for time in times.values()):
        raise ValueError("a time is missing or is no positive number")
    return Measurement(times, {str(name): str(reason) for name, reason in entry["left_out"].items()})
