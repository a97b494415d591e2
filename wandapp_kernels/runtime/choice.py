"""Which layout a layer is held in: the one whose kernel is fastest at decode, of close ones the best on the whole."""

from __future__ import annotations

from wandapp_kernels import dispatch
from wandapp_kernels.backends import DENSE
from wandapp_kernels.checkpoint.format import pattern_of
from wandapp_kernels.ops.layouts import CANONICAL, CompressedWeight, get_layout

# One measurement stands for token counts up to two doublings away: decode, small batches, prefill.
TUNED_TOKENS = (1, 4, 16, 256)


def fastest_layout(weight: CompressedWeight, *, tune: bool = False) -> str:
    """Name of the layout for ``weight`` on its device, by `dispatch.choose_layout`.

    A layout that cannot hold this weight, or only in more bytes than the dense one, gives way to the canonical one.

    Args:
        tune: measure this shape first, unless the cache knows it; then the name may be ``"dense"``.
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
    chosen = dispatch.choose_layout(problems[0], compressed_only=not tune)
    if chosen == DENSE:
        return chosen
    layout = get_layout(chosen)
    if layout.supports(weight) is not None or layout.least_nbytes(weight) > weight.dense_nbytes:
        return CANONICAL[problems[0].operator]
    return chosen
