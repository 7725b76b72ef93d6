"""The figures of a collection as one HTML page that needs nothing else: plots and images lie inside."""

from __future__ import annotations

import base64
import io
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from vlv.curation.caption_stats import PAPER_MEAN, PAPER_RANGE
from vlv.curation.stats import RATIO_STEPS, SIDE_STEP
from vlv.errors import OutputError
from vlv.storage import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vlv.curation.stats import Stats

_COLOURS = ("#4a6fa5", "#c8553d", "#3b7d4f", "#8a5fa0")
_BINS = 60


def make_page(stats: Stats, inputs: Sequence[str], title: str = "Image collection") -> str:
    """The page as text.

    Raises:
        OutputError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib.figure  # noqa: F401 - complain now
    except ImportError:
        raise OutputError('the page needs jinja2 and matplotlib; pip install "vlv[data]"') from None
    figures = stats.to_dict()
    template = (resources.files("vlv.curation") / "stats.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        title=title,
        inputs=inputs,
        facts=_facts(figures),
        lengths=figures["lengths"] if figures["captions"] else {},
        low=PAPER_RANGE[0],
        high=PAPER_RANGE[1],
        paper=figures["paper"],
        words=figures["commonest_words"],
        openings=figures["commonest_openings"],
        plots={"lengths": _lengths(stats) if figures["captions"] else "", "sizes": _sizes(stats)},
        samples=stats.samples,
    )


def _facts(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """What the page says first: names and values in words."""
    images = max(figures["images"], 1)
    facts = [
        ("images", f"{figures['images']:,}"),
        ("megabytes", f"{figures['bytes'] / 1e6:,.1f}"),
        ("formats", ", ".join(f"{name} {count:,}" for name, count in figures["formats"].items())),
        ("median of the shorter side", f"{figures['short_side_median']} pixels"),
        ("shorter side above 512", _percent(figures["share_short_side_above_512"])),
        ("aspect ratio 0.5 to 2", _percent(figures["share_aspect_ratio_0.5_to_2"])),
    ]
    for kind, count in figures["not_readable"].items():
        facts.append((kind.replace("_", " "), f"{count:,}"))
    if figures["captions"]:
        facts += [
            (
                "captions",
                f"{figures['captions']:,} ({_percent(figures['captions'] / images)} of the images)",
            ),
            (
                "different words",
                f"{figures['vocabulary']:,}, of which once {figures['words_seen_once']:,}",
            ),
            ("captions that occur again", f"{figures['captions_that_occur_again']:,}"),
            ("captions that repeat a sentence", f"{figures['captions_that_repeat_a_sentence']:,}"),
            ("4-grams repeated within a caption", _percent(figures["share_of_repeated_4grams"])),
        ]
    return facts


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _lengths(stats: Stats) -> str:
    """Histogram of the lengths in every tokenizer, with the paper's mean and range."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lengths = stats.captions.lengths
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.add_subplot()
    longest = max((max(counts, default=0) for counts in lengths.values()), default=0)
    edges = np.linspace(0, max(longest, PAPER_RANGE[1]) + 1, _BINS).tolist()
    for (name, counts), colour in zip(lengths.items(), _COLOURS * len(lengths), strict=False):
        axes.hist(
            list(counts),
            edges,
            weights=list(counts.values()),
            histtype="step",
            color=colour,
            label=name,
            linewidth=1.6,
        )
    axes.axvspan(*PAPER_RANGE, color="#dde4ee", zorder=0, label="most of the paper's")
    axes.axvline(
        PAPER_MEAN, color="#5c6675", linestyle="--", label=f"the paper's mean, {PAPER_MEAN}"
    )
    axes.set_xlabel("tokens of a caption")
    axes.set_ylabel("captions")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _png(figure)


def _sizes(stats: Stats) -> str:
    """Width against height, and the aspect ratios."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = np.array([*stats.sides], float).reshape(-1, 2) + SIDE_STEP / 2
    counts = np.array([*stats.sides.values()], float)
    if len(counts):
        left.scatter(
            *points.T, s=8 + 240 * counts / counts.max(), color=_COLOURS[0], alpha=0.6, linewidths=0
        )
    most = max(points.max(initial=0) * 1.1, 600)
    left.plot([0, most / 2, most / 2], [0, most, most], color="#aab4c2", linewidth=1)
    left.plot([0, most], [0, most / 2], color="#aab4c2", linewidth=1, label="2 : 1")
    left.plot(
        [512, 512, most], [most, 512, 512], color=_COLOURS[1], linewidth=1, label="shorter side 512"
    )
    left.set(
        xlim=(0, most), ylim=(0, most), xlabel="width in pixels", ylabel="height", aspect="equal"
    )
    left.legend(frameon=False, loc="upper left")
    steps = [*stats.ratios]
    right.bar(steps, [stats.ratios[step] for step in steps], color=_COLOURS[0])
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    ticks = [RATIO_STEPS * power for power in range(-3, 4)]
    right.set_xticks(ticks, ["1:8", "1:4", "1:2", "1:1", "2:1", "4:1", "8:1"])
    right.set(xlabel="width : height", ylabel="images", xlim=(ticks[0], ticks[-1]))
    return _png(figure)


def _png(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def check_path(path: Path) -> None:
    """Refuse a name that is no page's, before anything is counted.

    Raises:
        OutputError: It does not end in .html.
    """
    if path.suffix != ".html":
        raise OutputError(f"{path} must end in .html")


def save(path: Path, page: str, figures: str) -> None:
    """Write the page, and the figures beside it as FILE.json.

    Raises:
        OutputError: A file cannot be written.
    """
    check_path(path)
    try:
        write_text(path.with_suffix(".json"), figures)
        write_text(path, page)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
