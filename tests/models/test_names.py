from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wandapp_kernels.errors import UsageError
from wandapp_kernels.models.names import as_patterns, matches

NAME = "model.layers.10.mlp.experts.3.down_proj"
parts = st.lists(st.from_regex(r"[a-z0-9_]{1,6}", fullmatch=True), min_size=1, max_size=5)


@pytest.mark.parametrize(
    "pattern",
    [
        NAME,
        "down_proj",
        "3.down_proj",
        "experts.3.down_proj",
        "re:.*down_proj",
        r"re:layers\.1\d\.",
        r"re:^model\.layers\.10\.mlp",
        "re:_proj$",
    ],
)
def test_patterns_that_choose(pattern: str) -> None:
    assert matches(NAME, [pattern])
    assert matches(NAME, ["lm_head", pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        "proj",  # not a whole component
        "own_proj",
        "model.layers.10",  # a prefix is no suffix
        "layers.1.mlp.experts.3.down_proj",
        "mlp",
        "down_proj.",
        ".down_proj",
        "DOWN_PROJ",
        "re:up_proj",
        "re:^down_proj",
        "model.layers.10.mlp.experts.3.down_pro.",  # no wildcards outside re:
    ],
)
def test_patterns_that_do_not_choose(pattern: str) -> None:
    assert not matches(NAME, [pattern])


def test_no_patterns_choose_nothing() -> None:
    assert not matches(NAME, [])


def test_one_pattern_needs_no_list() -> None:
    assert as_patterns("down_proj") == ("down_proj",) and as_patterns(["a", "b"]) == ("a", "b")
    assert matches("mlp.down_proj", "down_proj") and not matches("mlp.down_proj", "d")


@pytest.mark.parametrize("patterns", [["re:("], ["down_proj", "re:[z"], ["re:*"]])
def test_wrong_regular_expression_is_a_usage_error_even_after_a_match(patterns: list[str]) -> None:
    with pytest.raises(UsageError, match="not a valid regular expression"):
        matches(NAME, patterns)


@pytest.mark.parametrize("pattern", ["", "re:"])
def test_empty_pattern_is_a_usage_error(pattern: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        matches(NAME, [pattern])


@given(parts, st.data())
def test_every_suffix_of_components_chooses_and_a_regex_agrees(components: list[str], data: st.DataObject) -> None:
    name = ".".join(components)
    start = data.draw(st.integers(0, len(components) - 1))
    suffix = ".".join(components[start:])
    assert matches(name, [suffix])
    assert matches(name, [f"re:(^|\\.){re.escape(suffix)}$"])
    assert not matches(name + "x", [name])
    assert not matches(name, ["x." + name])
