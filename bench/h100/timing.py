"""Time of a GPU call: in CUDA graphs, so that issuing costs nothing, over copies of the weight that exceed the L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FEWEST_REPLAYS, MOST_REPLAYS = 10, 200
CALLS = 20  # of one graph, or as many as take so long
ENOUGH_SECONDS = 2e-3
CACHE_MULTIPLE = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and quartiles over replays.

    Attributes:
        graph: whether the calls were captured; otherwise they were issued one by one while the GPU was kept busy.
    """

    us: float
    low_us: float
    high_us: float
    graph: bool


def copies_for(weight_bytes: int, cache_bytes: int, free_bytes: int) -> int:
    """How many copies of a weight exceed the cache ``CACHE_MULTIPLE`` times, within half of the free memory."""
    wanted = 1 + -(-CACHE_MULTIPLE * cache_bytes // max(weight_bytes, 1))
    return max(1, min(wanted, free_bytes // 2 // max(weight_bytes, 1), 256))


def summary(samples: Sequence[float], graph: bool) -> Timing:
    """Median and quartiles of microseconds."""
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], graph)
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, graph)


def time_calls(calls: Sequence[Callable[[], object]], seconds: float = 0.05) -> Timing:
    """Time one call of ``calls``, which do the same on different copies, for about ``seconds``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            start = time.monotonic()
            for call in calls:
                call()
            torch.cuda.synchronize()
        once = time.monotonic() - start
    repeated = list(calls) * max(1, min(-(-CALLS // len(calls)), int(ENOUGH_SECONDS / once)))
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in repeated:
                call()
    except Exception:
        torch.cuda.synchronize()
        return summary(_samples(lambda: [call() for call in repeated], len(repeated), seconds), False)
    return summary(_samples(graph.replay, len(repeated), seconds), True)


def _samples(run: Callable[[], object], calls: int, seconds: float) -> list[float]:
    run()
    samples: list[float] = []
    end = time.monotonic() + seconds
    while len(samples) < FEWEST_REPLAYS or (time.monotonic() < end and len(samples) < MOST_REPLAYS):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000)  # while it sleeps, the calls are issued
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        samples.append(1e3 * first.elapsed_time(last) / calls)
    return samples


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-6 * time_calls([lambda: target.copy_(source)], 0.5).us)
