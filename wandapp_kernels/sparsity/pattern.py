"""The sparsity pattern: n:m inside groups of m consecutive input channels, or a ratio of each output row."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from wandapp_kernels.errors import UsageError

# What forms and problems of a free pattern are called; n:m ones by their pattern.
UNSTRUCTURED = "unstructured"

MAX_GROUP = 16
_NM = re.compile(r"(\d+):(\d+)")
_RATIO = re.compile(r"(\d*\.?\d+)\s*(%?)")


@dataclass(frozen=True)
class Pattern:
    """Which weights of a matrix ``[out, in]`` may be kept.

    n:m (``n`` and ``m`` set): of every ``m`` consecutive input channels of one row, ``n`` are **kept**. A ragged
    tail of ``t < m`` channels keeps ``min(t, n)``: padding the row with zeros to a multiple of ``m`` gives a valid
    n:m row.

    Unstructured (``m`` is 0): ``floor(ratio * in)`` weights are removed from every row (Wanda, section 3: the
    comparison group is the output row).

    Attributes:
        ratio: the fraction of weights removed, in (0, 1); ``1 - n/m`` for n:m.
    """

    ratio: float
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str | float | Pattern) -> Pattern:
        """Read ``"2:4"``, ``"50%"``, ``"0.5"`` or ``0.5``. Raises UsageError for anything that is not a sparsity."""
        if isinstance(text, Pattern):
            return text
        cleaned = str(text).strip()
        if match := _NM.fullmatch(cleaned):
            n, m = int(match[1]), int(match[2])
            if not 0 < n < m <= MAX_GROUP:
                raise UsageError(
                    f"sparsity {cleaned!r} is not possible: n:m keeps n of every m weights, "
                    f"with 0 < n < m <= {MAX_GROUP}"
                )
            return cls(ratio=1 - n / m, n=n, m=m)
        if match := _RATIO.fullmatch(cleaned):
            ratio = float(match[1]) / (100 if match[2] else 1)
            if 0 < ratio < 1:
                return cls(ratio=ratio)
        raise UsageError(
            f"sparsity {cleaned!r} is not understood: give n:m such as 2:4, or the fraction to remove between 0 and 1 "
            "such as 0.5 or 50%"
        )

    @property
    def is_nm(self) -> bool:
        return self.m > 0

    def removed_per_row(self, columns: int) -> int:
        """How many of a row's ``columns`` weights are removed.

        A product within rounding of an integer is that integer: 0.29 * 100 is 28.999999999999996 in binary.
        """
        if self.is_nm:
            full, tail = divmod(columns, self.m)
            return full * (self.m - self.n) + max(tail - self.n, 0)
        exact = self.ratio * columns
        nearest = round(exact)
        return nearest if math.isclose(exact, nearest, rel_tol=1e-12) else int(exact)

    def __str__(self) -> str:
        # 14 digits, not 6: what is recorded is read again, and a ratio that was rounded up asks for more zeros.
        return f"{self.n}:{self.m}" if self.is_nm else f"{100 * self.ratio:.14g}%"
