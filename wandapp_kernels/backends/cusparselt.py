"""2:4 for many tokens on an NVIDIA GPU, by torch's own libraries: cuSPARSELt (searched per shape) and CUTLASS.

Both take a multiple of 8 tokens, so tokens are padded, and weights whose rows and columns are multiples of (16, 16) and
(32, 64). cuSPARSELt's default algorithm can be several times slower than its best: the best one is searched once per
shape and bucket of tokens. Searching and trying out happen in a process of their own (``cusparselt_search``): on some
problems they end it. What came out is kept in ``cache_dir()/dispatch``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from wandapp_kernels.backends.base import Backend, Problem, UnusableError, register_backend
from wandapp_kernels.backends.cusparselt_algorithms import algorithms
from wandapp_kernels.backends.cusparselt_products import (
    TOKEN_MULTIPLE,
    Algorithm,
    cusparselt_decompress,
    cusparselt_linear,
    cutlass_linear,
    pad_tokens,
)
from wandapp_kernels.errors import KernelError
from wandapp_kernels.ops.layouts import CompressedWeight, Layout, register_layout
from wandapp_kernels.sparsity.nm_weight import NMWeight
from wandapp_kernels.sparsity.pattern import Pattern

DTYPES = (torch.float16, torch.bfloat16)
# Below this no published measurement has either of them ahead of the dense product.
LEAST_TOKENS = 64


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
        self.require(weight)
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
        """Exact: every sum of the product with the identity has one non-zero term.

        Raises:
            KernelError: the default algorithm, which does it, fails on this GPU.
        """
        (blob,) = tensors
        tried = algorithms(str(blob.device)).default(blob.dtype)
        if isinstance(tried, str):
            raise KernelError(f"a weight cannot be had back from layout {self.name!r}: {tried}")
        return cusparselt_decompress(blob, shape[1])


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


class _SemiStructuredBackend(Backend):
    """Reasons both backends share. Chosen after a measurement only."""

    default_tokens = 0
    multiples: tuple[int, int]

    def supports(self, problem: Problem) -> str | None:
        if problem.pattern != "2:4":
            return f"sparse tensor cores know 2:4 only, not {problem.pattern}"
        if problem.dtype not in DTYPES:
            return f"it computes in float16 and bfloat16, not {problem.dtype}"
        if problem.tokens < LEAST_TOKENS:
            return f"it pads to {TOKEN_MULTIPLE} tokens and is not worth trying below {LEAST_TOKENS}"
        if (reason := shape_refusal((problem.out_features, problem.in_features), self.multiples)) is not None:
            return reason
        if problem.device_type != "cuda" or torch.version.cuda is None:
            return "it needs an NVIDIA GPU and a torch built for CUDA"
        if not torch.cuda.is_available():
            return "this torch sees no GPU"
        try:
            capability = torch.cuda.get_device_capability(problem.device)
            return self._capability_refusal(capability) or self._tried(problem)
        except Exception as error:
            return f"this GPU cannot be asked: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    @abstractmethod
    def _capability_refusal(self, capability: tuple[int, int]) -> str | None:
        """Why GPUs of this compute capability are left out without trying."""

    @abstractmethod
    def _tried(self, problem: Problem) -> str | None:
        """Why it does not work, found out in another process if it is not known yet."""


class CuSparseLtBackend(_SemiStructuredBackend):
    """``torch._cslt_sparse_mm`` with the algorithm that was fastest for the shape."""

    name = "cusparselt-nm"
    layout = CuSparseLtLayout.name
    multiples = CuSparseLtLayout.multiples

    def supports(self, problem: Problem) -> str | None:
        if not torch.backends.cusparselt.is_available():
            return "this torch is built without cuSPARSELt"
        return super().supports(problem)

    def _capability_refusal(self, capability: tuple[int, int]) -> str | None:
        if capability < (8, 0):
            return f"sparse tensor cores begin with compute capability 8.0, and this GPU has {_dotted(capability)}"
        return None

    def _tried(self, problem: Problem) -> str | None:
        known = algorithms(problem.device)
        shape = (problem.out_features, problem.in_features)
        found = [known.default(problem.dtype)]
        found += [known.known(shape, problem.tokens, problem.dtype, bias) or found[0] for bias in (False, True)]
        return next((f"it fails on this GPU: {one}" for one in found if isinstance(one, str)), None)

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        """See Backend. The first call of a problem searches, which takes seconds.

        Raises:
            UnusableError: there is no algorithm for the problem.
        """
        algorithm = _algorithm(x, bias is not None, shape)
        return cusparselt_linear(tensors[0], pad_tokens(x), bias, algorithm)[: x.shape[0]]


def _algorithm(x: torch.Tensor, bias: bool, shape: tuple[int, int]) -> Algorithm:
    known = algorithms(str(x.device))
    found = known.known(shape, x.shape[0], x.dtype, bias)
    if found is None and torch.cuda.is_current_stream_capturing():
        found = known.known_default(x.dtype) or "nothing is searched in a capture: call the layer once before it"
    elif found is None:
        found = known.search(shape, x.shape[0], x.dtype, bias)
    if isinstance(found, str):
        raise UnusableError(f"cuSPARSELt cannot run {x.shape[0]} tokens of {shape[0]}x{shape[1]} {x.dtype}: {found}")
    return found


class CutlassBackend(_SemiStructuredBackend):
    """torch's CUTLASS kernels for 2:4."""

    name = "cutlass-nm"
    layout = CutlassLayout.name
    multiples = CutlassLayout.multiples

    def _capability_refusal(self, capability: tuple[int, int]) -> str | None:
        if capability[0] != 8:
            return f"torch's CUTLASS kernels run on compute capability 8.x, and this GPU has {_dotted(capability)}"
        return None

    def _tried(self, problem: Problem) -> str | None:
        found = algorithms(problem.device).cutlass(problem.dtype)
        return f"it fails on this GPU: {found}" if isinstance(found, str) else None

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        values, metadata = tensors
        return cutlass_linear(values, metadata, pad_tokens(x), bias)[: x.shape[0]].contiguous()


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


register_layout(CuSparseLtLayout())
register_layout(CutlassLayout())
register_backend(CuSparseLtBackend())
register_backend(CutlassBackend())
