"""A text file for tests that calibrate and evaluate: 900 sentences of random words, the same ones every time."""

from __future__ import annotations

import random
from pathlib import Path

_WORDS = (
    "the",
    "of",
    "a",
    "and",
    "to",
    "in",
    "king",
    "river",
    "city",
    "born",
    "built",
    "large",
    "year",
    "north",
    "war",
)


def write_text(folder: Path) -> str:
    """Write ``text.txt`` into ``folder``; about 10,000 tokens of calibration text and 3,000 to evaluate on."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(_WORDS, k=12)).capitalize() + "." for _ in range(900)]
    path = folder / "text.txt"
    path.write_text("\n\n".join(sentences), encoding="utf-8")
    return str(path)
