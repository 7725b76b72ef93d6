"""The page of `vlv data stats`: the figures of a collection, with charts and some of its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlv.curation.caption_stats import PAPER_MEAN, PAPER_RANGE
from vlv.curation.stats import RATIO_STEPS, SIDE_STEP, Stats
from vlv.errors import OutputError
from vlv.pages import charts, render
from vlv.storage import Json, check_writable, write_text

_BINS = 60


def make_page(stats: Stats, inputs: Sequence[str], title: str = "Image collection") -> str:
    """Write the page as text.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figures = stats.to_dict()
    return render(
        "stats.html.jinja",
        title=title,
        inputs=inputs,
        facts=_facts(figures),
        lengths=_lengths(stats, figures) if figures["captions"] else None,
        words=[(word, f"{count:,}") for word, count in figures["commonest_words"].items()],
        openings=[
            (f"{text} ...", f"{count:,}") for text, count in figures["commonest_openings"].items()
        ],
        sizes=_size_chart(stats),
        ratios=_ratio_chart(stats),
        samples=stats.samples,
    )


def _facts(figures: Json) -> list[tuple[str, str]]:
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


def _lengths(stats: Stats, figures: Json) -> Json:
    """Lengths of the captions in every tokenizer beside the paper's, as a table and a chart."""
    low, high = PAPER_RANGE
    rows = [
        (
            name,
            f"{row['mean']:.1f}",
            *(str(row[key]) for key in ("median", "p5", "p95", "max")),
            _percent(row["share_170_to_280"]),
        )
        for name, row in figures["lengths"].items()
    ]
    paper = figures["paper"]
    name = "the paper's 6 million captions (its figure 8; tokenizer not stated)"
    rows.append((name, str(paper["mean"]), str(paper["median"]), "", "", "", "most"))
    share = f"in {low} to {high}"
    columns = ("tokenizer", "mean", "median", "5 %", "95 %", "longest", share)
    return {"columns": columns, "rows": rows, "chart": _length_chart(stats)}


def _length_chart(stats: Stats) -> str:
    from matplotlib.ticker import MaxNLocator

    lengths = stats.captions.lengths
    figure, (axes,) = charts.new_chart()
    longest = max((max(counts, default=0) for counts in lengths.values()), default=0)
    edges = np.linspace(0, max(longest, PAPER_RANGE[1]) + 1, _BINS).tolist()
    for number, (name, counts) in enumerate(lengths.items()):
        axes.hist(
            list(counts),
            edges,
            weights=list(counts.values()),
            histtype="step",
            color=charts.COLOURS[number % len(charts.COLOURS)],
            label=name,
            linewidth=1.6,
        )
    axes.axvspan(*PAPER_RANGE, color="#7d8590", alpha=0.2, label="most of the paper's")
    axes.axvline(PAPER_MEAN, color="#7d8590", linestyle="--", label=f"paper's mean, {PAPER_MEAN}")
    axes.set(xlabel="tokens of a caption", ylabel="captions")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    charts.add_legend(figure)
    return charts.svg(figure)


def _size_chart(stats: Stats) -> str:
    figure, (axes,) = charts.new_chart(height=3.4)
    points = np.array([*stats.sides], float).reshape(-1, 2) + SIDE_STEP / 2
    counts = np.array([*stats.sides.values()], float)
    if len(counts):
        areas = 8 + 240 * counts / counts.max()
        axes.scatter(points[:, 0], points[:, 1], areas, alpha=0.6, linewidths=0)
    most = max(points.max(initial=0) * 1.1, 600)
    axes.plot([0, most / 2, most / 2], [0, most, most], color="#7d8590", linewidth=1)
    axes.plot([0, most], [0, most / 2], color="#7d8590", linewidth=1, label="2 : 1")
    limit = charts.COLOURS[1]
    axes.plot(
        [512, 512, most], [most, 512, 512], color=limit, linewidth=1, label="shorter side 512"
    )
    axes.set(
        xlim=(0, most), ylim=(0, most), xlabel="width in pixels", ylabel="height", aspect="equal"
    )
    charts.add_legend(figure)
    return charts.svg(figure)


def _ratio_chart(stats: Stats) -> str:
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = charts.new_chart(height=3.4)
    axes.bar([*stats.ratios], [*stats.ratios.values()])
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    ticks = [RATIO_STEPS * power for power in range(-3, 4)]
    axes.set_xticks(ticks, ["1:8", "1:4", "1:2", "1:1", "2:1", "4:1", "8:1"])
    axes.set(xlabel="width : height", ylabel="images", xlim=(ticks[0], ticks[-1]))
    return charts.svg(figure)


def check_path(path: Path) -> None:
    """Refuse a name that is no page's, and a place where none can be written, before anything is counted.

    Raises:
        OutputError: It does not end in .html, or the disk refuses.
    """
    if path.suffix != ".html":
        raise OutputError(f"{path} must end in .html")
    check_writable(path)


def save(path: Path, page: str, figures: str) -> None:
    """Write the page, and the figures beside it as FILE.json.

    Raises:
        OutputError: A file cannot be written.
    """
    check_path(path)
    write_text(path.with_suffix(".json"), figures)
    write_text(path, page)
