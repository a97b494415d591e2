"""What a backend is: something that can run a sparse linear operator, says when it can, and how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import torch

from wandapp_kernels.backends.problem import Problem as Problem
from wandapp_kernels.errors import KernelError, UsageError
from wandapp_kernels.ops.layouts import DENSE as DENSE
from wandapp_kernels.sparsity.pattern import Pattern

# Of ``Backend.default_tokens``: any number.
UNLIMITED = 1 << 40


class UnusableError(KernelError):
    """A backend found out at the first call that it cannot run a problem that it had said it takes.

    From then on :meth:`Backend.supports` says so; until the choice is made again, the weight is decompressed.
    """


class Backend(ABC):
    """Runs a linear on weights of one layout.

    Attributes:
        name: unique; what caches and tables call it. Backends of one family share the part before ``-``:
            ``"cpu-nm"``, ``"cpu-bitmap"``, ``"cpu-dense"``.
        layout: the layout it reads. ``"dense"`` is the plain weight ``[N, K]`` as the only tensor.
        default_tokens: up to this many tokens it is chosen without a measurement (:meth:`is_default`).
    """

    name: str
    layout: str
    default_tokens: int = 16

    @abstractmethod
    def supports(self, problem: Problem) -> str | None:
        """None when :meth:`run` takes this problem, else the reason in one sentence (an absent library is a reason).

        It is asked once per problem, never on the hot path, and must not raise. ``problem.tokens`` is the upper end of
        a bucket of token counts (:func:`token_bucket`): the answer must hold for every smaller count too.
        """

    def is_default(self, problem: Problem) -> bool:
        """Whether it may be chosen without a measurement, of the backends that read its layout the first that says so.

        Asked about problems that :meth:`supports` takes; ``problem.tokens`` is the upper end of a bucket here too.
        """
        return problem.tokens <= self.default_tokens

    @abstractmethod
    def run(
        self,
        x: torch.Tensor,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> torch.Tensor:
        """``x @ Wᵀ + bias``.

        Args:
            x: ``[M, K]``, contiguous, M ≥ 1.
            tensors: the weight in the backend's layout, values in x's type, on x's device.
            bias: ``[N]`` in x's type, or None.
            shape: ``(N, K)``, both ≥ 1.
            pattern: n:m, or None for an unstructured or dense weight.

        Returns:
            ``[M, N]`` in x's type, accumulated in at least float32.
        """

    def bind(
        self,
        tensors: Sequence[torch.Tensor],
        bias: torch.Tensor | None,
        shape: tuple[int, int],
        pattern: Pattern | None,
    ) -> Call:
        """:meth:`run` prepared for one weight.

        It is good while address, shape, strides, type and device of the tensors and of the bias, all of them
        contiguous, stay as they are.
        """
        return Call(self, shape, pattern)


# A weight's tensors and its bias.
Held = tuple[Sequence[torch.Tensor], torch.Tensor | None]


class Call:
    """What a backend prepared for one weight; it keeps none of its tensors. Backends that look up much have a subclass.

    Attributes:
        backend: who runs it.
        kind: calls of one kind can run together on one input (`run_together`); None: this one runs alone.
    """

    kind: Hashable = None

    def __init__(self, backend: Backend, shape: tuple[int, int], pattern: Pattern | None):
        self.backend = backend
        self._shape, self._pattern = shape, pattern

    def __call__(self, x: torch.Tensor, held: Held) -> torch.Tensor:
        """``x @ Wᵀ + bias``, ``[..., N]``; x ``[..., K]`` contiguous, with one row or more.

        Where the backend raises `UnusableError`, the weight is decompressed.
        """
        rows, columns = self._shape
        flat = x.view(-1, columns)
        try:
            y = self.backend.run(flat, *held, self._shape, self._pattern)
        except UnusableError:
            from wandapp_kernels.backends.dense import DecompressBackend, DenseBackend  # they need this module

            instead = DenseBackend() if self.backend.layout == DENSE else DecompressBackend(self.backend.layout)
            y = instead.run(flat, *held, self._shape, self._pattern)
        return y.view(*x.shape[:-1], rows)

    def run_together(self, x: torch.Tensor, others: Sequence[tuple[Call, Held]], held: Held) -> list[torch.Tensor]:
        """What this one and the others, all of its kind, make of x."""
        return [self(x, held), *(call(x, of_it) for call, of_it in others)]


def marks_of(held: Held) -> list[Hashable]:
    """What a call depends on: two lists are equal only if every tensor lies where it lay, as it lay.

    Calls are only made for contiguous tensors, and an address belongs to one device.
    """
    tensors, bias = held
    marks: list[Hashable] = [(t.data_ptr(), t.shape, t.dtype, t.is_contiguous()) for t in tensors]
    if bias is not None:
        marks.append((bias.data_ptr(), bias.shape, bias.dtype, bias.is_contiguous()))
    return marks


_epoch = 0


def epoch() -> int:
    """A number that changes whenever the choice of a backend may: measured, restricted, another variant."""
    return _epoch


def choices_changed() -> None:
    """Make everybody who keeps a choice ask again."""
    global _epoch
    _epoch += 1


BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make ``backend`` known under its name. Registering the same class again does nothing.

    Backends that read the same layout are preferred in the order of registration until a measurement says otherwise.

    Raises:
        UsageError: another backend has the name.
    """
    known = BACKENDS.get(backend.name)
    if known is not None and type(known) is not type(backend):
        raise UsageError(f"a backend named {backend.name!r} exists already: choose another name")
    BACKENDS.setdefault(backend.name, backend)
