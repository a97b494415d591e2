"""What a pruning run tells afterwards: per layer, per block, and for the whole model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerReport:
    """One Linear.

    Attributes:
        sparsity: fraction of exact zeros in the weight as stored.
        output_error: ``‖x(W - Ŵ)ᵀ‖ / ‖xWᵀ‖`` on the first calibration tokens, both weights on the same dense input.
        dead_channels: input channels that were zero in every calibration token.
        tokens: calibration tokens that reached the layer.
        seconds: time to score, mask and repair it.
        note: why it was left dense or treated differently, else empty.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    output_error: float
    dead_channels: int
    tokens: int
    seconds: float
    peak_memory_bytes: int
    note: str = ""


@dataclass
class BlockReport:
    """One decoder block.

    Attributes:
        output_error: ``‖f̂(X) - f(X)‖ / ‖f(X)‖`` on the first calibration batch of the pruned stream.
        loss: the regional optimiser's last relative loss, None without it.
        seconds, peak_memory_bytes: the whole block, statistics to propagation.
    """

    name: str
    output_error: float
    loss: float | None
    seconds: float
    peak_memory_bytes: int
    layers: list[LayerReport]


@dataclass
class PruneReport:
    """The whole run; ``to_dict()`` is what ``wandapp.json`` holds.

    Attributes:
        samples, seqlen: the calibration text given; text_hash is of its token ids.
        written_samples: how many more the model wrote itself (self-calibration).
        achieved_sparsity: over the Linears that were to be pruned.
        seconds: on the clock. cpu_seconds: of this process on all its threads; with one thread, what the run takes on a
            machine that does nothing else.
    """

    method: str
    sparsity: str
    settings: dict[str, Any]
    seed: int
    text_hash: str
    samples: int
    seqlen: int
    versions: dict[str, str]
    device: str
    written_samples: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory_bytes: int = 0
    achieved_sparsity: float = 0.0
    blocks: list[BlockReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summarise(self) -> None:
        """Fill in the totals from the blocks: sparsity over the pruned Linears, peak memory over the blocks."""
        layers = [layer for block in self.blocks for layer in block.layers]
        weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
        zeros = sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in layers)
        self.achieved_sparsity = zeros / max(weights, 1)
        self.peak_memory_bytes = max([self.peak_memory_bytes, *(block.peak_memory_bytes for block in self.blocks)])
