"""Time boxes: a section stops when its own seconds or those of the whole run are spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

Case = TypeVar("Case")


@dataclass
class Clock:
    """Counts down.

    Attributes:
        limit: seconds of the whole run.
        now: seconds since any moment.
    """

    limit: float
    now: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.now()

    @property
    def left(self) -> float:
        return self.limit - (self.now() - self.start)


class Section:
    """One section of the report: rows, what was left out and why, and the seconds it took."""

    def __init__(self, name: str, seconds: float, clock: Clock):
        self.name, self.clock = name, clock
        self.began = clock.now()
        self.end = min(self.began + seconds, self.began + clock.left)
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []

    def cases(self, wanted: Iterable[Case], describe: Callable[[Case], str] = str) -> Iterator[Case]:
        """The cases there is time for, in order; the others are entered as left out."""
        for case in wanted:
            if self.clock.now() >= self.end:
                self.leave_out(describe(case), "no time was left")
            else:
                yield case

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append({"what": what, "why": " ".join(why.split())[:300]})

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "left_out": self.left_out, "seconds": self.clock.now() - self.began}
