"""Which layout a weight is held in, of the times that each one's fastest backend took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from wandapp_kernels.backends.base import DENSE

# Layouts this close to the fastest are told apart by what they cost at other token counts: one layout serves them all.
CLOSE = 1.1


def best_layout(asked: Mapping[str, float], measured: Iterable[Mapping[str, float]]) -> str:
    """The fastest layout at the asked token count; of several that are close there, the fastest on the whole.

    On the whole: by the geometric mean of the times over the token counts at which all of those layouts were measured.
    The dense layout is only ever chosen as the fastest, and none that is slower than it is compared.

    Args:
        asked: layout -> its best time at the asked token count, in order of preference; not empty.
        measured: the same for every token count that was measured.
    """
    fastest = min(asked, key=asked.__getitem__)
    most = min(CLOSE * asked[fastest], asked.get(DENSE, math.inf))
    close = [layout for layout, time in asked.items() if layout != DENSE and time <= most]
    if fastest == DENSE or len(close) == 1:
        return fastest
    counts = [times for times in measured if all(layout in times for layout in close)]

    def on_the_whole(layout: str) -> tuple[float, float]:
        # Sums of logarithms order as geometric means over the same counts do.
        return math.fsum(math.log(times[layout]) for times in counts), asked[layout]

    return min(close, key=on_the_whole)
