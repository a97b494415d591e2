"""The hidden states that flow from block to block during the walk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


class Stream:
    """Hidden states of the calibration samples, each ``[1, tokens, hidden]``.

    They live on the compute device when they fit into the given share of its free memory, else on the CPU, from where
    batches are copied when needed.
    """

    def __init__(self, samples: Sequence[torch.Tensor], device: torch.device, copies: int = 3):
        size = sum(sample.numel() * sample.element_size() for sample in samples)
        self.device = device
        self._home = device if _fits(size * copies, device) else torch.device("cpu")
        self._samples = [sample.to(self._home) for sample in samples]
        self.dtype = self._samples[0].dtype

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def tokens_per_sample(self) -> int:
        return self._samples[0].shape[1]

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """``[len(indices), tokens, hidden]`` on the compute device, fp32."""
        picked = [self._samples[i] for i in indices]
        joined = picked[0] if len(picked) == 1 else torch.cat(picked)
        return joined.to(self.device, torch.float32)

    def put(self, indices: Sequence[int], values: torch.Tensor) -> None:
        """Store ``values [len(indices), tokens, hidden]`` in place of the samples ``indices``."""
        for position, index in enumerate(indices):
            self._samples[index] = values[position : position + 1].to(self._home, self.dtype)

    def empty_like(self) -> Stream:
        """A stream of the same size and home, in fp32, whose samples are still to be put."""
        other = object.__new__(Stream)
        other.device, other._home, other._samples = self.device, self._home, list(self._samples)
        other.dtype = torch.float32
        return other


def batches(count: int, size: int) -> Iterator[list[int]]:
    """``[0..size), [size..2·size), …`` up to ``count``."""
    for start in range(0, count, size):
        yield list(range(start, min(start + size, count)))


def _fits(size: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    free, _total = torch.cuda.mem_get_info(device)
    return size < 0.5 * free
