"""Few tokens times an unstructured weight on an NVIDIA GPU (csrc/cuda/bitmap_decode.cuh), and the weight made dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional

from wandapp_kernels.backends.base import Backend, Call, Held, Problem
from wandapp_kernels.backends.cuda.bitmap_layout import BitmapMmaLayout, panel_counts
from wandapp_kernels.backends.cuda.launcher import (
    ALIGNMENT,
    DTYPES,
    Prepared,
    check_tensor,
    counters,
    is_aligned,
    launch,
    multiprocessors,
    shared_memory,
    why_not,
)
from wandapp_kernels.errors import KernelError
from wandapp_kernels.sparsity.pattern import Pattern

MOST_TOKENS = 16
STAGES = 3
SLOT_BYTES = 256 + 16 * 128 * 2  # a panel in shared memory: bitmap and, at most, all values
WARPS = 8


@dataclass(frozen=True)
class BitmapPlan:
    """How one launch of the decode kernel is cut (names as in bitmap_decode.cuh).

    Attributes:
        token_tiles: tiles of 8 tokens, 1 or 2.
        slabs_per_cta: 16-row slabs of a CTA, which share their activations in L1.
        warps_per_slab: warps that split K inside a CTA.
        splits: CTAs along K.
        ctas: CTAs along the rows.
        tokens: M.
    """

    token_tiles: int
    slabs_per_cta: int
    warps_per_slab: int
    splits: int
    ctas: int
    tokens: int

    def kernel(self, dtype: torch.dtype) -> str:
        """The entry point in csrc/cuda/bitmap_decode.cu."""
        return f"bitmap_decode_{DTYPES[dtype]}_{8 * self.token_tiles}"

    @property
    def threads(self) -> int:
        return 32 * self.slabs_per_cta * self.warps_per_slab

    @property
    def shared_bytes(self) -> int:
        return STAGES * SLOT_BYTES * self.slabs_per_cta * self.warps_per_slab

    @property
    def partial_floats(self) -> int:
        return self.splits * self.ctas * self.slabs_per_cta * self.tokens * 16 if self.splits > 1 else 0


@lru_cache(maxsize=4096)
def plan_decode(tokens: int, shape: tuple[int, int], sms: int, shared_bytes: int) -> BitmapPlan:
    """Cut ``[M, K] × [N, K]ᵀ`` so that every multiprocessor is full once and a warp has two panels or more.

    With more tokens a CTA takes more slabs, since each slab of a CTA of its own would fetch the activations again.

    Args:
        tokens: M, 1 to 16.
        shape: ``(N, K)``.
        sms: multiprocessors of the GPU.
        shared_bytes: the most shared memory a CTA may have.
    """
    slabs, panels = panel_counts(shape)
    warps = WARPS if shared_bytes >= 2 * STAGES * SLOT_BYTES * WARPS else WARPS // 2
    resident = min(2 * WARPS // warps, shared_bytes // (STAGES * SLOT_BYTES * warps))
    slabs_per_cta = 1 if tokens <= 4 else 2 if tokens <= 8 else 4
    while slabs_per_cta > slabs:
        slabs_per_cta //= 2
    warps_per_slab = warps // slabs_per_cta
    ctas = -(-slabs // slabs_per_cta)
    splits = max(1, min(resident * sms // ctas, panels // (2 * warps_per_slab)))
    return BitmapPlan(1 if tokens <= 8 else 2, slabs_per_cta, warps_per_slab, splits, ctas, tokens)


def _check_weight(tensors: Sequence[torch.Tensor], shape: tuple[int, int], like: torch.Tensor) -> None:
    values, words, offsets = tensors
    slabs, panels = panel_counts(shape)
    check_tensor(values, "values", like.dtype, like)
    check_tensor(words, "bitmap", torch.int32, like)
    check_tensor(offsets, "offsets", torch.int32, like)
    if words.shape != (slabs * panels, 32, 2) or offsets.shape != (slabs * panels + 1,):
        raise KernelError(f"the weight of shape {shape} has {slabs * panels} panels, bitmap {list(words.shape)}")


def bitmap_decode(
    x: torch.Tensor, tensors: Sequence[torch.Tensor], bias: torch.Tensor | None, shape: tuple[int, int]
) -> torch.Tensor:
    """``x @ Wᵀ + bias`` for 1 to 16 tokens.

    Args:
        x: ``[M, K]`` float16 or bfloat16 on a GPU, contiguous.
        tensors: the weight in layout ``"bitmap-mma"``, values in x's type.
        bias: ``[N]`` in x's type, or None.
        shape: ``(N, K)``.

    Raises:
        KernelError: x, weight and bias do not fit together.
    """
    rows, columns = shape
    tokens = x.shape[0]
    if x.shape != (tokens, columns) or not 1 <= tokens <= MOST_TOKENS or not x.is_contiguous():
        raise KernelError(f"x is {list(x.shape)}, but this kernel takes [1 to {MOST_TOKENS}, {columns}], contiguous")
    if x.dtype not in DTYPES:
        raise KernelError(f"x is {x.dtype}, but this kernel takes float16 or bfloat16")
    _check_weight(tensors, shape, x)
    if bias is not None:
        check_tensor(bias.contiguous(), "bias", x.dtype, x, aligned=False)
        bias = bias.contiguous()
        if bias.shape != (rows,):
            raise KernelError(f"bias is {list(bias.shape)}, but the weight has {rows} rows")
    return _launch_checked(x, tokens, tensors, bias, shape, x.new_empty((tokens, rows)))


def _launch_checked(
    x: torch.Tensor,
    tokens: int,
    tensors: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    shape: tuple[int, int],
    out: torch.Tensor,
) -> torch.Tensor:
    rows, columns = shape
    if columns % 8:  # rows of x must start on 16 bytes
        x = functional.pad(x.view(tokens, columns), (0, -columns % 8))
        columns = x.shape[1]
    elif not is_aligned(x):
        x = x.clone()
    device = x.device
    plan = plan_decode(tokens, shape, multiprocessors(device), shared_memory(device))
    partial = x.new_empty(plan.partial_floats, dtype=torch.float32) if plan.splits > 1 else None
    launch(
        "bitmap_decode",
        plan.kernel(x.dtype),
        (plan.ctas, plan.splits),
        plan.threads,
        plan.shared_bytes,
        (
            *(tensors[0], tensors[1], tensors[2], x, bias, out, partial),
            counters(plan.ctas, device) if plan.splits > 1 else None,
            *(tokens, rows, columns, plan.warps_per_slab),
        ),
        device,
    )
    return out


def decompress(tensors: Sequence[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight ``[N, K]`` of layout ``"bitmap-mma"``, by one kernel on the weight's GPU."""
    _check_weight(tensors, shape, tensors[0])
    out = torch.empty(shape, dtype=tensors[0].dtype, device=tensors[0].device)
    slabs, panels = panel_counts(shape)
    if slabs * panels:
        launch(
            "bitmap_decompress",
            "bitmap_decompress_16",
            (-(-slabs * panels // WARPS), 1),
            32 * WARPS,
            SLOT_BYTES * WARPS,
            (*tensors, out, *shape),
            out.device,
        )
    return out


class BitmapCall(Call):
    """A weight whose tensors were checked when it was bound: a call only launches.

    Where no workspace and no copy of x is needed, the launches for each number of tokens are kept, too.
    """

    def __init__(self, backend: Backend, shape: tuple[int, int], pattern: Pattern | None):
        super().__init__(backend, shape, pattern)
        self._prepared: dict[int, Prepared | None] = {}

    def __call__(self, x: torch.Tensor, held: Held) -> torch.Tensor:
        rows, columns = self._shape
        out, tokens, address = x.new_empty((*x.shape[:-1], rows)), x.numel() // columns, x.data_ptr()
        if tokens not in self._prepared:
            self._prepared[tokens] = self._prepare(x, tokens, held)
        prepared = self._prepared[tokens]
        if prepared is None or address % ALIGNMENT:
            return _launch_checked(x, tokens, *held, self._shape, out)
        prepared(address, out.data_ptr())
        return out

    def _prepare(self, x: torch.Tensor, tokens: int, held: Held) -> Prepared | None:
        plan = plan_decode(tokens, self._shape, multiprocessors(x.device), shared_memory(x.device))
        if plan.splits > 1 or self._shape[1] % 8:
            return None
        tensors, bias = held
        return Prepared(
            "bitmap_decode",
            plan.kernel(x.dtype),
            (plan.ctas, plan.splits),
            plan.threads,
            plan.shared_bytes,
            (*tensors, Prepared.X, bias, Prepared.OUT, None, None, tokens, *self._shape, plan.warps_per_slab),
            x.device,
        )


class CudaBitmapBackend(Backend):
    """The decode kernel for unstructured weights: up to 16 tokens, NVIDIA GPUs since compute capability 8.0."""

    name = "cuda-bitmap"
    layout = BitmapMmaLayout.name
    default_tokens = MOST_TOKENS

    def supports(self, problem: Problem) -> str | None:
        if problem.tokens > MOST_TOKENS:
            return f"the kernel takes up to {MOST_TOKENS} tokens at once"
        return why_not(problem.device, problem.dtype)

    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        return bitmap_decode(x, tensors, bias, shape)

    def bind(
        self,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> Call:
        _check_weight(tensors, shape, tensors[0])
        unfit = bias is not None and bias.shape != (shape[0],)
        return super().bind(tensors, bias, shape, pattern) if unfit else BitmapCall(self, shape, pattern)
