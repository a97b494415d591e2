"""The pruned blocks of a run in a work folder: a killed run, started again, goes on after the last of them.

The result is the same, bit for bit: a block is stored as the model holds it, with the state of the random generator
after it, and the streams of activations are made again by running the blocks that are there.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wandapp_kernels.checkpoint.work_folder import WorkFolder
from wandapp_kernels.errors import CheckpointError, UsageError
from wandapp_kernels.pruning.reports import BlockReport, LayerReport, PruneReport

_WRITTEN, _GENERATOR, _PARAMETER = "written", "generator", "parameter."


@dataclass(frozen=True)
class Times:
    """Seconds on the clock, and of this process on all its threads."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def now(cls) -> Times:
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: Times) -> Times:
        return Times(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def __sub__(self, other: Times) -> Times:
        return Times(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)


@dataclass(frozen=True)
class Finished:
    """A finished block.

    Attributes:
        parameters: those of the model's block, by their names in it.
        generator: state of the generator that draws the regional optimiser's samples, after the block.
        dense: checksum of the block before it was pruned.
        times: of the run until then.
    """

    parameters: dict[str, torch.Tensor]
    generator: torch.Tensor
    dense: int
    report: BlockReport
    times: Times

    def restore(self, block: nn.Module, generator: torch.Generator, name: str) -> None:
        """Give the dense block its pruned weights. Raises UsageError when it is not the block that was pruned."""
        if checksum(block.parameters()) != self.dense:
            raise UsageError(
                f"{name} is not the block that was pruned before: load the model anew, or name another work folder"
            )
        own = dict(block.named_parameters())
        if {key: p.shape for key, p in own.items()} != {key: p.shape for key, p in self.parameters.items()}:
            raise CheckpointError(f"the work folder holds other parameters for {name}; name another one")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(self.parameters[key])
        generator.set_state(self.generator)


class FinishedBlocks:
    """Those of the run that ``report`` has been begun for.

    Raises:
        CheckpointError, UsageError: see `WorkFolder`.
    """

    def __init__(self, path: str | Path, report: PruneReport, model: nn.Module, blocks: nn.ModuleList):
        # With another kernel, library or number of threads the rest would not be what the first run would have made.
        facts = ("method", "sparsity", "settings", "text_hash", "samples", "seqlen", "versions", "device")
        types = sorted({str(p.dtype) for p in blocks.parameters()})
        described = {name: getattr(report, name) for name in facts}
        inside = {id(p) for p in blocks.parameters()}
        outside = checksum(p for p in model.parameters() if id(p) not in inside)
        described |= {"blocks": len(blocks), "types": types, "checksum of embeddings and head": outside}
        self._folder = WorkFolder(path, described)
        self._blocks = blocks

    def written(self) -> torch.Tensor | None:
        """Samples that the dense model wrote, if they were stored."""
        part = self._folder.load(_WRITTEN)
        return None if part is None else part.tensors[_WRITTEN]

    def store_written(self, token_ids: torch.Tensor) -> None:
        self._folder.store(_WRITTEN, {_WRITTEN: token_ids}, {})

    def load(self, index: int) -> Finished | None:
        """Block ``index``, if it was stored."""
        part = self._folder.load(_name(index))
        if part is None:
            return None
        try:
            generator = part.tensors.pop(_GENERATOR)
            parameters = {key.removeprefix(_PARAMETER): tensor for key, tensor in part.tensors.items()}
            report, times = _report(part.facts["report"]), Times(**part.facts["times"])
            return Finished(parameters, generator, part.facts["dense"], report, times)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._folder.path / _name(index)}.safetensors does not hold a finished block; delete it and start "
                "again"
            ) from error

    def store(self, index: int, dense: int, report: BlockReport, generator: torch.Generator, times: Times) -> None:
        """Keep block ``index`` as the model holds it now."""
        tensors: dict[str, torch.Tensor] = {_PARAMETER + key: p for key, p in self._blocks[index].named_parameters()}
        tensors[_GENERATOR] = generator.get_state()
        facts = {"dense": dense, "report": asdict(report), "times": asdict(times)}
        self._folder.store(_name(index), tensors, facts)


def checksum(parameters: Iterable[nn.Parameter]) -> int:
    """CRC-32 of the values, one parameter after the other."""
    total = 0
    for parameter in parameters:
        data = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total = zlib.crc32(data.numpy().data, total)
    return total


def _name(index: int) -> str:
    return f"block-{index:04}"


def _report(stored: dict[str, Any]) -> BlockReport:
    layers = [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in stored["layers"]]
    return BlockReport(**{**stored, "layers": layers})
