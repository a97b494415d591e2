"""Choosing modules by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import UsageError

_REGEX = "re:"


def as_patterns(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern, or any number of them, as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether a dotted module name is chosen by any of the patterns.

    A pattern is one of
    - the whole name: ``model.layers.0.mlp.down_proj``
    - its last components: ``down_proj`` or ``mlp.down_proj`` (``proj`` alone is no component of that name)
    - ``re:`` and a regular expression found anywhere in the name: ``re:.*lm_head``, ``re:layers\\.[01]\\.``

    Args:
        name: dotted module name.
        patterns: one pattern, or any number of them; none at all choose nothing.

    Raises:
        UsageError: a pattern is empty or its regular expression is not valid.
    """
    return any(
        [_matches(name, pattern) for pattern in as_patterns(patterns)]
    )  # a list: a wrong pattern is always reported


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith(_REGEX) and len(pattern) > len(_REGEX):
        expression = pattern[len(_REGEX) :]
        try:
            return re.search(expression, name) is not None
        except re.error as error:
            raise UsageError(
                f"the pattern {pattern!r} is not a valid regular expression ({error}); correct it"
            ) from error
    if not pattern or pattern == _REGEX:
        raise UsageError(f"the module pattern {pattern!r} is empty; give a name, its last part, or re:EXPRESSION")
    return name == pattern or name.endswith("." + pattern)
