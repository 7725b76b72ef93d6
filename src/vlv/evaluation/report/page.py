"""One HTML page of several runs: tables, plots and pictures inside it, no scripts, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlv.data.images import load_image
from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments import mixes, reconstruction
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.report.claims import Result, findings
from vlv.evaluation.report.document import about_run, format_cell, paper
from vlv.evaluation.results import format_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

NUM_EXAMPLES = 8
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 1rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .15rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } .theirs { background: #f6f3ea; padding: .3rem .8rem; }
.note { background: #fff6d6; padding: .3rem .7rem; } .soft { color: #666; } img { max-width: 100%; }
.holds { color: #16713a; } .fails { color: #a32020; } .scroll { overflow-x: auto; }
"""


def make_page(results: Mapping[str, Result], folders: Mapping[str, Path]) -> str:
    """Write the page.

    Args:
        results: By name, of experiments and of `vlv eval toyworld`.
        folders: Of those that are runs, for their pictures.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    body = ["<h1>Measured</h1>", _claims(results)]
    for name, result in results.items():
        body.append(_result(name, result, folders.get(name)))
    body.append(_paper({str(result.get("experiment", "")) for result in results.values()}))
    content = "\n".join(body)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>vlv: results</title><style>{_STYLE}</style></head><body>{content}</body></html>\n"
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells that begin with a digit or a sign are set as numbers."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    lines = ["".join(_cell(cell) for cell in row) for row in rows]
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _cell(text: str) -> str:
    kind = ' class="number"' if text[:1].isdigit() or text[:1] == "-" else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _claims(results: Mapping[str, Result]) -> str:
    kinds = {"holds": "holds", "does not hold": "fails"}
    rows = []
    for claim, found in findings(results):
        cells = (claim.source, claim.text, found.verdict, claim.criterion, found.evidence)
        tds = [f"<td>{html.escape(cell)}</td>" for cell in cells]
        tds[2] = (
            f'<td class="{kinds.get(found.verdict, "soft")}"><b>{html.escape(found.verdict)}</b></td>'
        )
        rows.append("".join(tds))
    head = "".join(f"<th>{c}</th>" for c in ("paper", "claim", "by our figures", "when it holds", "figures"))  # fmt: skip
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<h2>The paper\'s claims</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _result(name: str, result: Result, folder: Path | None) -> str:
    if "sections" in result:
        sections = [s for s in result["sections"].values() if "figures" in s]
        inner = [f"<h3>{html.escape(s['title'])}</h3>{_figures(s['figures'])}" for s in sections]
        return f"<h2>{html.escape(name)}</h2>{''.join(inner)}"
    parts = [f"<h2>{html.escape(name)}: {html.escape(result['title'])}</h2>"]
    parts.append(f'<p class="soft">{html.escape(about_run(result))}</p>')
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in result["notes"]]
    if folder is not None:
        parts.append(_pictures(Run.open(folder)))
    parts.append(_plot(result["figures"]))
    if str(result.get("experiment", "")).startswith("ablation"):
        parts.append(
            image_tag(ablation_plot(result["figures"]), "Every variant, with 95 % intervals")
        )
    parts.append(_figures(result["figures"]))
    if result["comparisons"]:
        rows = [
            (
                c["label"],
                *(format_cell(c[k]) for k in ("difference", "low", "high", "p")),
                str(c["n"]),
            )
            for c in result["comparisons"].values()
        ]
        columns = ("against the baseline", "difference", "low", "high", "p", "n")
        parts.append(html_table(columns, rows))
    for one in result["tables"]:
        if one["rows"]:
            rows = [tuple(format_cell(v) for v in row.values()) for row in one["rows"]]
            parts.append(
                f"<p>{html.escape(one['title'].capitalize())}:</p>{html_table(list(one['rows'][0]), rows)}"
            )
    return "".join(parts)


def _figures(figures: Mapping[str, Any]) -> str:
    rows = []
    for figure in figures.values():
        value, low, high = (
            "" if figure[k] is None else format_value(figure[k], figure["unit"])
            for k in ("value", "low", "high")
        )
        rows.append((figure["label"], value, f"{low} to {high}" if low else "", str(figure["n"])))
    return html_table(("figure", "value", "95 % interval", "n"), rows)


def _paper(experiments: set[str]) -> str:
    content = paper()
    parts = [
        f"<h2>The paper's own figures</h2><p>Of {html.escape(content['citation'])}. <b>Not ours, and of another data set.</b></p>"
    ]
    for one in content["tables"]:
        if one["experiment"] in experiments or one["experiment"] in ("boxes", "ablations"):
            rows = [
                [f"{v:g}" if isinstance(v, float) else str(v) for v in row] for row in one["rows"]
            ]
            table = html_table(one["columns"], rows)
            parts.append(f'<div class="theirs"><p>{html.escape(one["title"])}</p>{table}</div>')
    return "".join(parts)


# --- pictures ------------------------------------------------------------------------------------------


def image_tag(image: Image.Image, text: str) -> str:
    """A picture inside the page."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    words = html.escape(text)
    return f'<figure><img alt="{words}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'


def _pictures(run: Run) -> str:
    """The first samples as columns, what was made of them as rows."""
    samples = run.data.samples()[:NUM_EXAMPLES]
    if run.experiment == reconstruction.NAME:
        pairs = reconstruction.pairs(run)
        files = {
            f"{source}, guidance {g:g}": [
                reconstruction.picture_path(run, source, g, s.id) for s in samples
            ]
            for source, g in pairs
        }
    elif run.experiment == mixes.NAME:
        names = mixes.drawn_mixes(run)
        files = {name: [mixes.picture_path(run, name, s.id) for s in samples] for name in names}
    else:
        return ""
    rows: list[list[Image.Image]] = []
    labels: list[str] = []
    side = 0
    for label, paths in files.items():
        try:
            row = [load_image(path) for path in paths]
        except DataError:
            continue  # a picture of the first samples is missing; the counts say so
        side = row[0].width
        rows.append(row)
        labels.append(label)
    if not rows:
        return ""
    originals = [sample.square(side) for sample in samples]
    text = "From above: originals; " + "; ".join(labels)
    return image_tag(grid([originals, *rows]), text)


def grid(rows: Sequence[Sequence[Image.Image]], gap: int = 3) -> Image.Image:
    """Pictures of one size in rows; small ones are doubled, pixel by pixel."""
    width, height = rows[0][0].size
    scale = 2 if width <= 96 else 1
    page = Image.new("RGB", (len(rows[0]) * (width * scale + gap), len(rows) * (height * scale + gap)), "white")  # fmt: skip
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            large = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            page.paste(large, (x * (width * scale + gap), y * (height * scale + gap)))
    return page


# --- plots ---------------------------------------------------------------------------------------------


def new_plot(width: float = 7.0, height: float = 3.2) -> Plot:
    """An empty figure of matplotlib that needs no screen.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('plots need matplotlib: pip install "vlv[eval]"') from None
    figure: Plot = Figure(figsize=(width, height), layout="constrained")
    return figure


def _plot(figures: Mapping[str, Any]) -> str:
    """Distances by guidance where there are several, and a bar for every other figure of a source."""
    curves: dict[str, dict[str, list[tuple[float, Any]]]] = {}
    for key, figure in figures.items():
        parts = key.split(".")
        if (
            len(parts) == 4
            and parts[1].startswith("g")
            and parts[3] in ("fid", "kid", "claims", "cosine")
        ):
            guidance = float(parts[1][1:])
            curves.setdefault(f"{parts[3]} ({parts[2]})", {}).setdefault(parts[0], []).append((guidance, figure))  # fmt: skip
    return "".join(_curve(title, lines) for title, lines in curves.items())


def _curve(title: str, lines: Mapping[str, Sequence[tuple[float, Any]]]) -> str:
    plot = new_plot()
    axes = plot.subplots()
    for source, points in lines.items():
        ordered = sorted(points, key=lambda point: point[0])
        x = [guidance for guidance, _ in ordered]
        y = [figure["value"] for _, figure in ordered]
        down = [max(0.0, f["value"] - f["low"]) for _, f in ordered]
        up = [max(0.0, f["high"] - f["value"]) for _, f in ordered]
        axes.errorbar(x, y, yerr=[down, up], marker="o", capsize=3, label=source)
    axes.set_xlabel("guidance")
    axes.set_ylabel(title)
    axes.legend()
    return image_tag(_as_image(plot), f"{title} by guidance, with 95 % intervals")


def ablation_plot(figures: Mapping[str, Any]) -> Image.Image:
    """One panel for each measure of an ablation, with a point for each variant."""
    panels: dict[str, list[tuple[str, Any]]] = {}
    for key, figure in figures.items():
        _, variant, measure = key.split(".")
        if " over " not in variant and figure["value"] is not None:
            panels.setdefault(measure, []).append((variant, figure))
    plot = new_plot(3.4 * max(1, len(panels)))
    all_axes = plot.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, (measure, points) in zip(all_axes, panels.items(), strict=False):
        _points(axes, points)
        axes.set_title(measure)
    return _as_image(plot)


def _points(axes: Any, points: Sequence[tuple[str, Any]]) -> None:
    """Values by name with their intervals."""
    y = [figure["value"] for _, figure in points]
    ends = [(figure["low"], figure["high"]) for _, figure in points]
    down = [0.0 if low is None else max(0.0, v - low) for v, (low, _) in zip(y, ends, strict=True)]
    up = [0.0 if high is None else max(0.0, high - v) for v, (_, high) in zip(y, ends, strict=True)]
    axes.errorbar(range(len(y)), y, yerr=[down, up], fmt="o", capsize=4)
    axes.set_xticks(range(len(y)), [name for name, _ in points])
    axes.margins(x=0.2)


def _as_image(plot: Plot) -> Image.Image:
    buffer = io.BytesIO()
    plot.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer)
