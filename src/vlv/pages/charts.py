"""Charts for the pages: matplotlib figures as inline SVG that reads on a light and on a dark page."""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING, Any

from vlv.errors import ConfigError
from vlv.storage import Json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]

COLOURS = ("#4a7fd6", "#d9692f", "#2a9d6f", "#a55bb5", "#b58a00", "#75808c")
_INK, _LINE = "#7d8590", "#7d859055"
_MAX_POINTS = 300
_STYLE: Json = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vlv",  # the same figure gives the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(["axes.edgecolor", "axes.labelcolor", "axes.titlecolor"], _INK),
    **dict.fromkeys(["xtick.color", "ytick.color", "text.color"], _INK),
}


def new_chart(
    width: float = 4.6, height: float = 2.6, *, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """An empty figure and its axes, side by side; the default size stays readable on a phone.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('charts need matplotlib: pip install "vlv[train]"') from None
    with style.context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for one in axes:
        one.patch.set_alpha(0)
        one.set_prop_cycle(color=COLOURS)
        one.grid(axis="y", color=_LINE, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def add_legend(figure: Figure) -> None:
    """Name the series above the axes."""
    figure.legend(loc="outside upper left", ncols=2, fontsize=8, frameon=False, labelcolor=_INK)


def has_charts() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def svg(figure: Figure, *, alone: bool = False) -> str:
    """Encode a figure as an SVG element to stand within a page, or alone in a file."""
    from matplotlib import style

    buffer = io.StringIO()
    with style.context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    element = buffer.getvalue()
    element = re.sub(r"<metadata>.*?</metadata>", "", element[element.index("<svg") :], flags=re.S)
    # HTML knows the name spaces
    return element if alone else re.sub(r' (xmlns(:\w+)?)="[^"]*"', "", element)


def line_chart(series: Mapping[str, Points], *, percent: bool = False) -> str:
    """Draw lines over steps.

    Args:
        series: Points (step, value) by name; values that are not finite are left out.
        percent: Write the values as percentages.

    Returns:
        The SVG element, or an empty text where there is nothing to draw.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    drawn = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    drawn = {name: _thinned(points) for name, points in drawn.items() if points}
    if not drawn:
        return ""
    figure, (axes,) = new_chart()
    for name, points in drawn.items():
        steps, values = zip(*points, strict=True)
        label = f"{name} {values[-1]:.1%}" if percent else f"{name} {values[-1]:.4g}"
        axes.plot(steps, values, linewidth=1.4, label=label, marker="" if len(points) > 1 else "o")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("step")
    if len(drawn) > 1:
        add_legend(figure)
    return svg(figure)


def error_bars(
    axes: Axes, x: Sequence[float], figures: Sequence[Mapping[str, Any]], label: str = ""
) -> None:
    """Plot figures with their 95 % intervals, where they have any; those with a label as a line."""
    values = [figure["value"] for figure in figures]
    ends = [(figure["low"], figure["high"]) for figure in figures]
    down = [0.0 if a is None else max(0.0, v - a) for v, (a, _) in zip(values, ends, strict=True)]
    up = [0.0 if b is None else max(0.0, b - v) for v, (_, b) in zip(values, ends, strict=True)]
    line = "o-" if label else "o"
    axes.errorbar(x, values, yerr=[down, up], capsize=3, fmt=line, label=label)


def _thinned(points: Points) -> Points:
    """At most `_MAX_POINTS` points: means of runs of neighbours."""
    if len(points) <= _MAX_POINTS:
        return points
    size = -(-len(points) // _MAX_POINTS)
    runs = (points[start : start + size] for start in range(0, len(points), size))
    return [(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs]
