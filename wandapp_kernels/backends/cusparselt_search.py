"""Tries the vendor's 2:4 products in a process of its own: ``python -m wandapp_kernels.backends.cusparselt_search``.

cuSPARSELt's search runs every algorithm it has, and one that the GPU cannot run leaves the process without its CUDA
context. So it happens here, on a random weight of the shape, and nothing is answered that was not compared with the
dense product. One line of JSON in, one out::

    {"job": "search", "device": "cuda:0", "dtype": "bfloat16",
     "rows": 4096, "columns": 14336, "tokens": 64, "bias": false}          (in one line)
    {"algorithm": [3, 1, -1]}        or        {"reason": "…", "lasting": true, "ends": true}

``"default"`` tries the default algorithm and the way back from the blob, ``"cutlass"`` CUTLASS's product. The process
ends after a reason, since its context may be lost.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from wandapp_kernels.backends.cusparselt_products import (
    DEFAULT,
    TOKEN_MULTIPLE,
    Algorithm,
    cusparselt_decompress,
    cusparselt_linear,
    cutlass_linear,
)

# A process that waits holds a CUDA context, some 500 MB.
IDLE_SECONDS = 60.0
_EPSILON = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# The positions kept in a group of four.
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


class Wrong(Exception):
    """A product is not the dense one."""


def random_weight(rows: int, columns: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A 2:4 weight whose product with normal activations is about normal."""
    kept = torch.zeros(len(_PAIRS), 4, dtype=dtype)
    for row, pair in enumerate(_PAIRS):
        kept[row, list(pair)] = (2 / columns) ** 0.5
    groups = torch.randint(len(_PAIRS), (rows, columns // 4), device=device)
    # In fp32: drawn at 16 bit, some are zero.
    values = torch.randn(rows, columns, device=device).to(dtype)
    return values * kept.to(device)[groups].view(rows, columns)


def check(
    product: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    weight: torch.Tensor,
    tokens: int,
    bias: torch.Tensor | None,
) -> None:
    """Raise Wrong unless every element of the product is the dense one's but for rounding."""
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    got, expected = product(x, bias).float(), functional.linear(x, weight, bias).float()
    allowed = 4 * _EPSILON[weight.dtype] * (1 + expected.abs())
    # Not "any above": NaN is above nothing.
    if got.shape != expected.shape or not bool(((got - expected).abs() <= allowed).all()):
        raise Wrong(f"its result with {tokens} tokens is not the dense one")


def search(blob: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> Algorithm:
    """cuSPARSELt's fastest algorithm for ``x Wᵀ + bias``."""
    # The older name warns where the newer one exists, and knows nothing of splitting K.
    newer = getattr(torch._C, "_cusparselt", None)
    if newer is not None and hasattr(newer, "mm_search"):
        try:
            number, split_k, split_k_mode, *_ = newer.mm_search(blob, x.t(), bias, None, None, True)
            return Algorithm(int(number), int(split_k), int(split_k_mode))
        except (TypeError, ValueError):  # it is private: its arguments are another release's
            pass
    return Algorithm(int(torch._cslt_sparse_mm_search(blob, x.t(), bias=bias, transpose_result=True)))


def _search(weight: torch.Tensor, tokens: int, bias: torch.Tensor | None) -> Algorithm:
    blob = torch._cslt_compress(weight)
    x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
    found = search(blob, x, bias)
    # Used for the whole bucket, so tried at both its ends; the lower one leaves a rest in every larger tile.
    for size in {tokens, min(tokens, tokens // 2 + TOKEN_MULTIPLE)}:
        check(lambda x, bias: cusparselt_linear(blob, x, bias, found), weight, size, bias)
    return found


def _default(weight: torch.Tensor, tokens: int, bias: torch.Tensor | None) -> Algorithm:
    blob = torch._cslt_compress(weight)
    if not torch.equal(cusparselt_decompress(blob, weight.shape[1]), weight):
        raise Wrong("its layout does not give the weight back")
    for one in (None, bias):
        check(lambda x, bias: cusparselt_linear(blob, x, bias, DEFAULT), weight, tokens, one)
    return DEFAULT


def _cutlass(weight: torch.Tensor, tokens: int, bias: torch.Tensor | None) -> Algorithm:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    for one in (None, bias):
        check(lambda x, bias: cutlass_linear(values, metadata, x, bias), weight, tokens, one)
    return DEFAULT


_JOBS = {"search": _search, "default": _default, "cutlass": _cutlass}


# Words of errors that a fuller or busier GPU than at another time makes, whatever their class.
_PASSING = ("out of memory", "alloc_failed", "alloc failed", "busy or unavailable", "resource")


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """What :func:`main` answers. A reason lasts if the product is at fault, and not the GPU's state at this moment."""
    tried = False
    try:
        dtype = getattr(torch, question["dtype"])
        if question["device"].startswith("cuda"):
            torch.cuda.set_device(question["device"])
        weight = random_weight(question["rows"], question["columns"], dtype, question["device"])
        bias = torch.randn(weight.shape[0], dtype=dtype, device=weight.device) if question["bias"] else None
        tried = True
        found = _JOBS[question["job"]](weight, question["tokens"], bias)
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
            del weight, bias
            torch.cuda.empty_cache()  # between questions the memory is the other process's
        return {"algorithm": list(found)}
    except Exception as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        passing = not tried or isinstance(error, torch.OutOfMemoryError) or any(w in words.lower() for w in _PASSING)
        return {"reason": words, "lasting": not passing, "ends": True}


def main(idle_seconds: float = IDLE_SECONDS) -> None:
    """Answer lines of the input until it ends, nothing is asked for a while, or a question went wrong."""
    # Libraries print to the output too: that goes with the errors, and only answers go where they are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # The dense product that all is compared with sums in fp32 to the end.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    while True:
        idle = threading.Timer(idle_seconds, os._exit, (0,))
        idle.daemon = True
        idle.start()
        line = sys.stdin.readline()
        idle.cancel()
        if not line:
            return
        found = answer(json.loads(line))
        print(json.dumps(found), file=answers, flush=True)
        if "ends" in found:
            return


if __name__ == "__main__":
    main()
