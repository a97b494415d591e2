"""Time boxes: a section starts no case that, as far as is known, will not end within its seconds and the run's."""

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
    def spent(self) -> float:
        return self.now() - self.start

    @property
    def left(self) -> float:
        return self.limit - self.spent


class Section:
    """One section of the report: rows, what was left out and why, and the seconds it took.

    Attributes:
        longest: seconds of the longest case so far; a case is started when that much is left.
        no_time: how many cases were left out since there was not.
    """

    def __init__(self, name: str, seconds: float, clock: Clock, save: Callable[[Section], None] | None = None):
        """``save`` is called after every case."""
        self.name, self.clock, self.save = name, clock, save
        self.began = clock.now()
        self.end = min(self.began + seconds, self.began + clock.left)
        self.longest, self.no_time = 0.0, 0
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, str]] = []

    def cases(self, wanted: Iterable[Case], describe: Callable[[Case], str] = str) -> Iterator[Case]:
        """The cases there is time for, in order; the others are entered as left out. Not to be nested."""
        for case in wanted:
            started = self.clock.now()
            if started >= self.end or started + self.longest > self.end:
                self.no_time += 1
                self.leave_out(describe(case), "no time was left")
                continue
            yield case
            self.longest = max(self.longest, self.clock.now() - started)
            if self.save is not None:
                self.save(self)

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append({"what": what, "why": " ".join(why.split())[:300]})

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "left_out": self.left_out, "seconds": self.clock.now() - self.began}
