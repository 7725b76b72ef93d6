"""Line charts as SVG, for a page that must work without network and without a plotting library."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Points = list[tuple[float, float]]

_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 12, 30
_MAX_POINTS = 300
_MAX_SERIES = 6


@dataclass(frozen=True)
class Axis:
    """A range of numbers on a length of the picture."""

    low: float
    high: float
    start: float
    """Where low lies, in pixels."""
    end: float

    def place(self, value: float) -> float:
        """Pixels of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(series: Mapping[str, Points], *, percent: bool = False) -> str:
    """An SVG of lines over steps.

    Args:
        series: Points (step, value) by name, at most six; values that are not finite are left out.
        percent: Write the values as percentages.

    Returns:
        The SVG element, or an empty text where there is nothing to draw.
    """
    drawn = {
        name: _thinned([p for p in points if math.isfinite(p[1])])
        for name, points in series.items()
    }
    drawn = {name: points for name, points in list(drawn.items())[:_MAX_SERIES] if points}
    if not drawn:
        return ""
    x, y = _axes([point for points in drawn.values() for point in points])
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(", ".join(drawn))}">',
        *_grid(x, y, percent),
    ]
    for number, (name, points) in enumerate(drawn.items()):
        parts.append(_line(number, name, points, x, y, percent))
    return "".join([*parts, "</svg>", _legend(drawn, percent) if len(drawn) > 1 else ""])


def _axes(points: Points) -> tuple[Axis, Axis]:
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    floor = 0.0 if 0 <= low <= 0.35 * high else low - margin
    first, last = min(0, *steps), max(steps)
    x = Axis(first, last if last > first else first + 1, _LEFT, _WIDTH - _RIGHT)
    return x, Axis(floor, high + margin, _HEIGHT - _BOTTOM, _TOP)


def _grid(x: Axis, y: Axis, percent: bool) -> Iterator[str]:
    for value in ticks(y.low, y.high, 5):
        place = y.place(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        yield f'<text x="{_LEFT - 7}" y="{place + 4:.1f}" text-anchor="end">{number_text(value, percent)}</text>'
    for value in ticks(x.low, x.high, 6):
        yield (
            f'<text x="{x.place(value):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">'
            f"{number_text(value)}</text>"
        )


def _line(number: int, name: str, points: Points, x: Axis, y: Axis, percent: bool) -> str:
    path = " ".join(f"{x.place(step):.1f},{y.place(value):.1f}" for step, value in points)
    label = (
        f"{html.escape(name)}: {number_text(points[-1][1], percent)} at step {points[-1][0]:,.0f}"
    )
    if len(points) == 1:
        left, top = path.split(",")
        return f'<circle class="s{number}" cx="{left}" cy="{top}" r="3"><title>{label}</title></circle>'
    return f'<polyline class="s{number}" points="{path}"><title>{label}</title></polyline>'


def _legend(drawn: Mapping[str, Points], percent: bool) -> str:
    keys = "".join(
        f'<span><i class="k{number}"></i>{html.escape(name)} <b>{number_text(points[-1][1], percent)}</b></span>'
        for number, (name, points) in enumerate(drawn.items())
    )
    return f'<div class="legend">{keys}</div>'


def _thinned(points: Points) -> Points:
    """At most `_MAX_POINTS` points: means of runs of neighbours."""
    if len(points) <= _MAX_POINTS:
        return points
    size = -(-len(points) // _MAX_POINTS)
    runs = (points[start : start + size] for start in range(0, len(points), size))
    return [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high, about `count` of them.

    >>> ticks(0, 9, 5)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def number_text(value: float, percent: bool = False) -> str:
    """A number as short as it can be read.

    >>> [number_text(v) for v in (0, 0.00005, 0.123456, 3.14159, 1234.5, 200000, 1.5e7)]
    ['0', '5e-05', '0.123', '3.14', '1,234', '200k', '15M']
    >>> number_text(0.315, percent=True)
    '31.5 %'
    """
    if percent:
        return f"{round(100 * value, 1):.4g} %"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.4g}k"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}"
