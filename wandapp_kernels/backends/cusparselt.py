"""2:4 for many tokens on an NVIDIA GPU, by torch's own libraries: cuSPARSELt (searched per shape) and CUTLASS.

Both take a multiple of 8 tokens, so tokens are padded, and weights whose rows and columns are multiples of (16, 16) and
(32, 64). cuSPARSELt's default algorithm can be several times slower than its best: the best one is searched once per
shape and bucket of tokens, and kept in ``cache_dir()/dispatch``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from filelock import FileLock
from torch.nn import functional

from wandapp_kernels.backends.base import Backend, Problem, register_backend, token_bucket
from wandapp_kernels.cache import cache_dir
from wandapp_kernels.checkpoint.atomic import write_text_atomic
from wandapp_kernels.errors import CheckpointError, UsageError
from wandapp_kernels.ops.layouts import CompressedWeight, Layout, register_layout
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.pattern import Pattern
from wandapp_kernels.tuning.device import fingerprint

DTYPES = (torch.float16, torch.bfloat16)
TOKEN_MULTIPLE = 8
# Below this no published measurement has either of them ahead of the dense product.
LEAST_TOKENS = 64
_TILE = 1024  # columns that come back at once from cuSPARSELt's layout


class _SemiStructuredLayout(Layout):
    """What both layouts share: 2:4, 16 bit, whole tiles."""

    operator = "nm_linear"
    multiples: tuple[int, int]

    def supports(self, weight: CompressedWeight) -> str | None:
        if not isinstance(weight, NMWeight) or (weight.pattern.n, weight.pattern.m) != (2, 4):
            return f"layout {self.name!r} holds 2:4 weights only"
        if weight.values.dtype not in DTYPES:
            return f"layout {self.name!r} holds float16 or bfloat16, not {weight.values.dtype}"
        if weight.values.device.type != "cuda":
            return f"layout {self.name!r} is made on a GPU, and the weight is on {weight.values.device}"
        return shape_refusal(weight.shape, self.multiples)

    def _dense(self, weight: CompressedWeight) -> torch.Tensor:
        if (reason := self.supports(weight)) is not None:
            raise UsageError(reason)
        return weight.decompress()

    def unpack(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None) -> NMWeight:
        """The canonical weight. A group with fewer than two non-zeros keeps its values, but may list other zeros."""
        return NMWeight.compress(self.decompress(tensors, shape, pattern), pattern="2:4")


def shape_refusal(shape: tuple[int, int], multiples: tuple[int, int]) -> str | None:
    """None when rows and columns are positive multiples of ``multiples``, else the reason."""
    if any(size <= 0 or size % multiple for size, multiple in zip(shape, multiples, strict=True)):
        return f"rows and columns must be multiples of {multiples[0]} and {multiples[1]}, and the weight is {shape}"
    return None


class CuSparseLtLayout(_SemiStructuredLayout):
    """``[blob]``: values and metadata as cuSPARSELt arranges them."""

    name = "nm-cusparselt"
    multiples = (16, 16)

    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        return [torch._cslt_compress(self._dense(weight))]

    def decompress(
        self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None
    ) -> torch.Tensor:
        """``W I``, a slice of columns at a time: exact, since every sum has one non-zero term."""
        (blob,) = tensors
        identity = torch.eye(shape[1], dtype=blob.dtype, device=blob.device)
        pieces = [torch._cslt_sparse_mm(blob, piece.contiguous()) for piece in identity.split(_TILE, dim=1)]
        return torch.cat(pieces, dim=1)


class CutlassLayout(_SemiStructuredLayout):
    """``[values, metadata]`` as torch's CUTLASS kernels read them."""

    name = "nm-cutlass"
    multiples = (32, 64)

    def pack(self, weight: CompressedWeight) -> list[torch.Tensor]:
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

        return list(sparse_semi_structured_from_dense_cutlass(self._dense(weight)))

    def decompress(
        self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], pattern: Pattern | None
    ) -> torch.Tensor:
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

        return sparse_semi_structured_to_dense_cutlass(*tensors)


def pad_tokens(x: torch.Tensor) -> torch.Tensor:
    """``x [M, K]`` with zero rows added, so that M is a multiple of 8."""
    missing = -x.shape[0] % TOKEN_MULTIPLE
    return functional.pad(x, (0, 0, 0, missing)) if missing else x


class _SemiStructuredBackend(Backend):
    """Reasons both backends share. Chosen after a measurement only."""

    default_tokens = 0
    layout_class: type[_SemiStructuredLayout]

    def supports(self, problem: Problem) -> str | None:
        if problem.pattern != "2:4":
            return f"sparse tensor cores know 2:4 only, not {problem.pattern}"
        if problem.dtype not in DTYPES:
            return f"it computes in float16 and bfloat16, not {problem.dtype}"
        if problem.tokens < LEAST_TOKENS:
            return f"it pads to {TOKEN_MULTIPLE} tokens and is not worth trying below {LEAST_TOKENS}"
        if problem.device_type != "cuda" or torch.version.cuda is None:
            return "it needs an NVIDIA GPU and a torch built for CUDA"
        if not torch.cuda.is_available():
            return "this torch sees no GPU"
        reason = shape_refusal((problem.out_features, problem.in_features), self.layout_class.multiples)
        return reason or _probe(self.name, problem.device, problem.dtype)


class CuSparseLtBackend(_SemiStructuredBackend):
    """``torch._cslt_sparse_mm`` with the algorithm that was fastest for the shape."""

    name = "cusparselt-nm"
    layout = CuSparseLtLayout.name
    layout_class = CuSparseLtLayout

    def supports(self, problem: Problem) -> str | None:
        if not torch.backends.cusparselt.is_available():
            return "this torch is built without cuSPARSELt"
        return super().supports(problem)

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        tokens = x.shape[0]
        x = pad_tokens(x)
        algorithm = algorithms(str(x.device)).best(tensors[0], x, bias, shape)
        out = torch._cslt_sparse_mm(tensors[0], x.t(), bias=bias, transpose_result=True, alg_id=algorithm)
        return out[:tokens]


class CutlassBackend(_SemiStructuredBackend):
    """torch's CUTLASS kernels for 2:4."""

    name = "cutlass-nm"
    layout = CutlassLayout.name
    layout_class = CutlassLayout

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        columns = pad_tokens(x).t()
        if bias is None:
            out = torch._sparse_semi_structured_mm(tensors[0], tensors[1], columns)
        else:
            out = torch._sparse_semi_structured_addmm(bias, tensors[0], tensors[1], columns)
        return out.t()[: x.shape[0]].contiguous()


@lru_cache(maxsize=64)
def _probe(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a small product fails on ``device`` (the libraries refuse some GPUs and torch versions at run time)."""
    backend = {CuSparseLtBackend.name: CuSparseLtBackend, CutlassBackend.name: CutlassBackend}[name]()
    try:
        dense = torch.zeros(64, 64, dtype=dtype, device=device)
        weight = NMWeight.compress(dense, pattern="2:4")
        tensors = backend.layout_class().pack(weight)
        backend.run(torch.zeros(8, 64, dtype=dtype, device=device), tensors, None, (64, 64), None)
    except Exception as error:
        return f"it fails on this GPU: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return None


class Algorithms:
    """cuSPARSELt's best algorithm for each shape, searched once and kept in a JSON file.

    ``cache_dir()/dispatch/cusparselt-DIGEST.json``::

        {"format": 1, "fingerprint": {"device": …, …}, "algorithms": {"4096x14336 m64 bfloat16 bias": 3}}
    """

    FORMAT = 1

    def __init__(self, device: str):
        self.fingerprint = {**fingerprint(device), "cusparselt": str(torch.backends.cusparselt.version())}
        digest = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_dir() / "dispatch" / f"cusparselt-{digest}.json"
        self._known = self._read()

    def best(self, blob: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, shape: tuple[int, int]) -> int:
        """The algorithm for ``x [M, K]``, searched now if it is not known; while a graph is captured, the default."""
        kind = str(x.dtype).removeprefix("torch.")
        name = f"{shape[0]}x{shape[1]} m{token_bucket(x.shape[0])} {kind}{'' if bias is None else ' bias'}"
        if name not in self._known:
            if torch.cuda.is_current_stream_capturing():
                return 0
            self._known[name] = int(torch._cslt_sparse_mm_search(blob, x.t(), bias=bias, transpose_result=True))
            self._write()
        return self._known[name]

    def _read(self) -> dict[str, int]:
        try:
            content = json.loads(self.path.read_text("utf-8"))
            if content["format"] != self.FORMAT or content["fingerprint"] != self.fingerprint:
                return {}
            return {str(name): int(algorithm) for name, algorithm in content["algorithms"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"):
                self._known = self._read() | self._known
                content: dict[str, Any] = {"format": self.FORMAT, "fingerprint": self.fingerprint}
                content["algorithms"] = dict(sorted(self._known.items()))
                write_text_atomic(self.path, json.dumps(content, indent=1) + "\n")
        except (OSError, CheckpointError) as error:
            warnings.warn(f"cuSPARSELt's algorithms cannot be kept in {self.path}: {error}", stacklevel=3)


@lru_cache(maxsize=16)
def algorithms(device: str) -> Algorithms:
    """What is known of cuSPARSELt's algorithms on ``device``."""
    return Algorithms(device)


register_layout(CuSparseLtLayout())
register_layout(CutlassLayout())
register_backend(CuSparseLtBackend())
register_backend(CutlassBackend())
