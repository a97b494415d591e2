"""Which layout a layer is held in: the one whose kernel is fastest at decode."""

from __future__ import annotations

from wandapp_kernels import dispatch
from wandapp_kernels.backends import BACKENDS, DENSE, UNSTRUCTURED, backends_of, layouts_of
from wandapp_kernels.checkpoint.format import pattern_of
from wandapp_kernels.ops.layouts import CANONICAL, CompressedWeight, get_layout

# One measurement stands for token counts up to two doublings away: decode, small batches, prefill.
TUNED_TOKENS = (1, 16, 256)


def fastest_layout(weight: CompressedWeight, *, tune: bool = False) -> str:
    """Name of the layout for ``weight`` on its device; ``"dense"`` only when ``tune`` found the dense product fastest.

    Args:
        tune: measure this shape first, unless the cache knows it.
    """
    pattern = pattern_of(weight)
    rows, columns = weight.shape
    density = weight.values.numel() / max(rows * columns, 1)
    problems = [
        dispatch.problem_for(rows, columns, pattern, tokens, weight.values.dtype, weight.values.device, density)
        for tokens in TUNED_TOKENS
    ]
    if tune:
        dispatch.tune(problems)
    operator = "bitmap_linear" if pattern == UNSTRUCTURED else "nm_linear"
    chosen = dispatch.choose_layout(problems[0])
    if chosen == DENSE and not tune:
        chosen = next(
            (
                name
                for name in layouts_of(operator)
                for backend in backends_of(name)
                if backend.name in BACKENDS and backend.supports(problems[0]) is None
            ),
            CANONICAL[operator],
        )
    if chosen != DENSE and get_layout(chosen).supports(weight) is not None:
        chosen = CANONICAL[operator]
    return chosen
