"""torch's 2:4 libraries on the CPU: a blob is the dense weight. As a script: the searching process over them.

What goes wrong is chosen by the number of rows of the weight.
"""

from __future__ import annotations

import os
import sys
import time
import types

import torch

DIES, HANGS, RAISES, WRONG, FULL, PRINTS = 48, 80, 112, 144, 176, 208
FOUND = (7, 2, 1)


class FakeLibrary:
    """Stands in for the operators of torch; undone by ``put``'s caller.

    Attributes:
        algorithms: of every cuSPARSELt product run.
    """

    def __init__(self):
        self.algorithms: list[tuple[int, ...]] = []

    def put(self, set_attribute) -> None:
        """Install it through ``set_attribute(object, name, value)``."""
        set_attribute(torch, "_cslt_compress", lambda dense: dense.clone())
        set_attribute(torch, "_cslt_sparse_mm", self.multiply)
        set_attribute(torch, "_sparse_semi_structured_mm", self.cutlass)
        set_attribute(
            torch, "_sparse_semi_structured_addmm", lambda bias, w, meta, x: self.cutlass(w, meta, x) + bias[:, None]
        )

    def multiply(self, blob, x, bias=None, alpha=None, out_dtype=None, transpose_result=False, alg_id=0, *split):
        assert x.shape[1] % 8 == 0 and x.shape[0] == blob.shape[1]
        self.algorithms.append((alg_id, *split))
        out = blob.float() @ x.float()
        out = out if bias is None else out + bias.float()[:, None]
        if blob.shape[0] == WRONG:
            out[0, 0] = float("nan")
        return (out.t() if transpose_result else out).contiguous().to(blob.dtype)

    def cutlass(self, values, metadata, x):
        from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

        assert x.shape[1] % 8 == 0
        dense = sparse_semi_structured_to_dense_cutlass(values, metadata)
        return (dense.float() @ x.float()).to(values.dtype)


def mm_search(blob, x, bias, alpha, out_dtype, transpose_result):
    """The search: it answers FOUND, or does what the number of rows says."""
    assert transpose_result
    rows = blob.shape[0]
    if rows == DIES:
        os.write(2, b"internal error when calling cusparseLtMatmulSearch\n")
        os.abort()
    if rows == HANGS:
        time.sleep(60)
    if rows == RAISES:
        raise RuntimeError("CUDA error: an illegal instruction was encountered\nmore")
    if rows == FULL:
        raise torch.OutOfMemoryError("CUDA out of memory")
    if rows == PRINTS:
        os.write(1, b"a library says something\n")
    return (*FOUND, 40)


def main(idle_seconds: float) -> None:
    from wandapp_kernels.backends import cusparselt_search

    FakeLibrary().put(setattr)
    torch._C._cusparselt = types.SimpleNamespace(mm_search=mm_search)
    # Who asks must be able to tell one process from the next.
    answer = cusparselt_search.answer
    cusparselt_search.answer = lambda question: {**answer(question), "process": os.getpid()}
    cusparselt_search.main(idle_seconds)


if __name__ == "__main__":
    main(float(sys.argv[1]))
