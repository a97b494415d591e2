"""Two charts as inline SVG: horizontal bars against a reference line, and lines over the blocks of a model.

Colours come from the style of the page that holds the chart, so that they follow its light or dark theme: classes
``s0`` to ``s7`` (series), ``line``, ``axis``, ``grid``, ``label``, ``value`` and ``reference``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeGuard

from wandapp_kernels.report.tables import number

COLOURS = 8

# Above this ratio of the largest to the smallest value a linear scale hides the small ones.
_LOG_RATIO = 8

_WIDTH = 760
_BAR, _BAR_STEP = 18, 28
_LINE_HEIGHT = 280
_DASHES = ("", "6 3", "2 3")


@dataclass(frozen=True)
class Scale:
    """Values to pixels: ``position(low) = start`` and ``position(high) = end``, linear or logarithmic."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def position(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def scale_for(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale for ``values`` (finite, not negative): from 0, or logarithmic where the positive ones span over 8:1."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > _LOG_RATIO:
        low, high = min(positive), max(positive)
        # The smallest value stays visible as a bar.
        return Scale(low / (high / low) ** 0.08, high, True, start, end)
    return Scale(0.0, max([*positive, 0.0]) or 1.0, False, start, end)


def bar_chart(title: str, values: Mapping[str, float | None], reference: tuple[str, float | None]) -> str:
    """Horizontal bars from the top, one per entry, with the value beside it; ``reference`` is a dashed vertical line.

    A value that is None, NaN, infinite or negative has no bar, only a text.
    """
    name, base = reference
    left = 16 + 7.6 * min(max(map(len, values), default=0), 28)
    top = 30
    bottom = top + _BAR_STEP * len(values)
    scale = scale_for([value for value in (*values.values(), base) if _drawable(value)], left, _WIDTH - 70)
    parts = _vertical_grid(scale, top, bottom)
    for row, (label, value) in enumerate(values.items()):
        y = top + _BAR_STEP * row + (_BAR_STEP - _BAR) / 2
        middle = y + _BAR / 2 + 4
        parts.append(_text(left - 8, middle, _shortened(label, 28), "end"))
        if not _drawable(value):
            parts.append(_text(left + 8, middle, _undrawn(value)))
            continue
        end = scale.position(value) if value > 0 else left
        parts.append(
            f'<rect class="s{row % COLOURS}" x="{left:.1f}" y="{y:.1f}" width="{end - left:.1f}" height="{_BAR}" '
            f'rx="2"><title>{escape(label)}: {number(value)}</title></rect>'
        )
        parts.append(_text(end + 6, middle, number(value), kind="value"))
    if _drawable(base) and (base > 0 or not scale.log):
        x = scale.position(base)
        parts.append(f'<line class="reference" x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(_text(x, top - 11, f"{name} {number(base)}", _anchor(x, left)))
    return _svg(title, bottom + 26 + 14 * scale.log, parts, _log_note(scale, bottom + 34, left))


def line_chart(title: str, series: Mapping[str, Sequence[tuple[str, float | None]]], x_label: str) -> str:
    """One line per series over its points ``(name, value)``, numbered from 0; what is not finite leaves a gap."""
    values = [value for points in series.values() for _, value in points if _drawable(value)]
    left, right, top = 62, _WIDTH - 16, 14
    bottom = top + _LINE_HEIGHT
    scale = scale_for(values, bottom, top)
    count = max([len(points) for points in series.values()], default=0)
    across = Scale(0, max(count - 1, 1), False, left + 8, right - 8)
    parts = []
    for tick in scale.ticks():
        y = scale.position(tick)
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, _tick(tick), "end"))
    for tick in across.ticks():
        if tick == int(tick) and tick < count:
            parts.append(_text(across.position(tick), bottom + 16, f"{tick:.0f}", "middle"))
    parts.append(f'<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(_text((left + right) / 2, bottom + 34, x_label, "middle"))
    for index, (label, points) in enumerate(series.items()):
        parts += _line(index, label, points, scale, across)
    legend, height = _legend(list(series), left, bottom + 54)
    note = _log_note(scale, bottom + 34, left)
    return _svg(title, height, parts + legend, note)


def _line(index: int, label: str, points: Sequence[tuple[str, float | None]], scale: Scale, across: Scale) -> list[str]:
    path, dots, drawing = [], [], False
    for position, (name, value) in enumerate(points):
        if not _drawable(value) or (scale.log and value <= 0):
            drawing = False
            continue
        x, y = across.position(position), scale.position(value)
        path.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        drawing = True
        dots.append(
            f'<circle class="s{index % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
            f"<title>{escape(label)}, {escape(name)}: {number(value)}</title></circle>"
        )
    if not path:
        return []
    return [f'<path class="line s{index % COLOURS}"{_dash(index)} d="{" ".join(path)}"/>', *dots]


def _legend(labels: Sequence[str], left: float, y: float) -> tuple[list[str], float]:
    """Swatches and names from left to right, wrapped; with the height that the chart has then."""
    parts, x = [], left
    for index, label in enumerate(labels):
        shown = _shortened(label, 40)
        size = 34 + 7.2 * len(shown)
        if x > left and x + size > _WIDTH - 16:
            x, y = left, y + 20
        parts.append(
            f'<path class="line s{index % COLOURS}"{_dash(index)} d="M{x:.1f} {y - 4:.1f} h20"/>'
            + _text(x + 26, y, shown)
        )
        x += size + 10
    return parts, y + 14


def _vertical_grid(scale: Scale, top: float, bottom: float) -> list[str]:
    parts = []
    for tick in scale.ticks():
        x = scale.position(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 16, _tick(tick), "middle"))
    x = scale.start
    return [*parts, f'<line class="axis" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}"/>']


def _svg(title: str, height: float, parts: Sequence[str], note: str) -> str:
    name = escape(title)
    head = f'<svg role="img" viewBox="0 0 {_WIDTH} {height:.0f}" aria-label="{name}"><title>{name}</title>'
    return f"{head}{''.join(parts)}{note}</svg>"


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "label") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _log_note(scale: Scale, y: float, x: float) -> str:
    return _text(x + 8, y, "log scale") if scale.log else ""


def _dash(index: int) -> str:
    dash = _DASHES[index // COLOURS % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _anchor(x: float, left: float) -> str:
    if x < left + 60:
        return "start"
    return "end" if x > _WIDTH - 70 else "middle"


def _shortened(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "…"


def _drawable(value: float | None) -> TypeGuard[float]:
    """Beyond these bounds the arithmetic of the scales overflows."""
    return value is not None and (value == 0 or 1e-100 < value < 1e100)


def _undrawn(value: float | None) -> str:
    if value is None:
        return "not measured"
    return number(value) if math.isfinite(value) else "not finite"


def _tick(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:g}"


def _linear_ticks(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten."""
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    # Rounded, so that 3 * 0.1 reads 0.3.
    return [float(f"{i * step:.10g}") for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten inside; with more than three powers only these, or every second, third, ..."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1,) if last - first > 3 else (1, 2, 5)
    powers = range(first, last + 1, max(1, math.ceil((last - first) / 9)))
    ticks = [float(f"{factor}e{power}") for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
