"""The page of `vlv eval report`: several results with their tables, charts and images, beside the paper's claims."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from vlv.data.images import load_image
from vlv.errors import DataError
from vlv.evaluation.experiments import mixes, reconstruction
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.toyworld_scores import ROWS
from vlv.evaluation.experiments.viewing import image_path, pairs
from vlv.evaluation.report.claims import Figures, Result, findings
from vlv.evaluation.report.document import Table, about_run, paper, paper_tables, tables_of
from vlv.evaluation.results import StoredFigure
from vlv.pages import charts, image_uri, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_EXAMPLES = 8
NUM_SHEET = 12
_BY_GUIDANCE = ("fid", "kid", "claims", "cosine")


class Block(NamedTuple):
    """What the page shows of one result."""

    title: str
    about: str = ""
    notes: Sequence[str] = ()
    samples: tuple[str, str] | None = None
    """An image as a data URI, and its caption."""
    charts: Sequence[tuple[str, str]] = ()
    """Captions and SVG elements."""
    tables: Sequence[Table] = ()


def make_page(results: Mapping[str, Result], folders: Mapping[str, Path]) -> str:
    """Write the page.

    Args:
        results: Results by name, of experiments and of `vlv eval toyworld`.
        folders: Run folders by name, for their images.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    return render(
        "report.html.jinja",
        title="vlv: results",
        findings=findings(results),
        results=[_block(name, result, folders.get(name)) for name, result in results.items()],
        citation=paper()["citation"],
        theirs=paper_tables(
            {"boxes", "ablations", *(str(r.get("experiment", "")) for r in results.values())}
        ),
    )


def _block(name: str, result: Result, folder: Path | None) -> Block:
    tables = tables_of(result)
    if "sections" in result:
        return Block(name, tables=tables)
    plots = list(_guidance_charts(result["figures"]))
    if str(result.get("experiment", "")).startswith("ablation"):
        chart = charts.svg(ablation_chart(result["figures"]))
        plots.append(("Every variant, with 95 % intervals", chart))
    return Block(
        title=f"{name}: {result['title']}",
        about=about_run(result),
        notes=result["notes"],
        samples=None if folder is None else _samples(Run.open(folder)),
        charts=plots,
        tables=tables,
    )


# --- images --------------------------------------------------------------------------------------------


def _samples(run: Run) -> tuple[str, str] | None:
    """The first samples as columns, what was made of them as rows."""
    samples = run.data.samples()[:NUM_EXAMPLES]
    if run.experiment == mixes.NAME:
        made = {name: (name, run.settings["guidance"]) for name in mixes.generated_mixes(run)}
    elif run.experiment == reconstruction.NAME:
        made = {f"{source}, guidance {g:g}": (source, g) for source, g in pairs(run)}
    else:
        return None
    rows: dict[str, list[Image.Image]] = {}
    for label, pair in made.items():
        try:
            rows[label] = [load_image(image_path(run, *pair, sample.id)) for sample in samples]
        except DataError:
            continue  # an image of the first samples is missing; the counts say so
    if not rows:
        return None
    side = next(iter(rows.values()))[0].width
    originals = [sample.square(side) for sample in samples]
    text = "From above: originals; " + "; ".join(rows)
    return image_uri(grid([originals, *rows.values()])), text


def example_sheet(run: Run) -> Image.Image:
    """The first scenes of a run of the toy world as columns: the original above, what was made of it below."""
    samples = run.data.samples()[:NUM_SHEET]
    side, (guidance,) = run.settings["image_size"], run.settings["guidances"]
    made = [
        [load_image(image_path(run, source, guidance, sample.id)) for sample in samples]
        for source in ROWS.values()
        if source in run.settings["images"]
    ]
    return grid([[sample.square(side) for sample in samples], *made], gap=0)


def grid(rows: Sequence[Sequence[Image.Image]], gap: int = 3) -> Image.Image:
    """Images of one size in rows; small ones are doubled, pixel by pixel."""
    scale = 2 if rows[0][0].width <= 96 else 1
    width, height = (scale * side for side in rows[0][0].size)
    size = (len(rows[0]) * (width + gap), len(rows) * (height + gap))
    page = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            large = image.resize((width, height), Image.Resampling.NEAREST)
            page.paste(large, (x * (width + gap), y * (height + gap)))
    return page


# --- charts --------------------------------------------------------------------------------------------


def _guidance_charts(figures: Figures) -> Iterator[tuple[str, str]]:
    """Distances and claims over guidance, a line for each source."""
    curves: dict[str, dict[str, list[tuple[float, StoredFigure]]]] = {}
    for key, figure in figures.items():
        match key.split("."):
            case [source, guidance, judge, measure] if (
                guidance.startswith("g") and measure in _BY_GUIDANCE
            ):
                lines = curves.setdefault(f"{measure} ({judge})", {})
                lines.setdefault(source, []).append((float(guidance[1:]), figure))
    for title, lines in curves.items():
        plot, (axes,) = charts.new_chart()
        for source, points in lines.items():
            ordered = sorted(points, key=lambda point: point[0])
            x = [guidance for guidance, _ in ordered]
            charts.error_bars(axes, x, [f for _, f in ordered], source)
        axes.set(xlabel="guidance", ylabel=title)
        charts.add_legend(plot)
        yield f"{title} by guidance, with 95 % intervals", charts.svg(plot)


def ablation_chart(figures: Figures) -> Figure:
    """One panel for each measure of an ablation, with a point for each variant."""
    panels: dict[str, dict[str, StoredFigure]] = {}
    for key, figure in figures.items():
        _, variant, measure = key.split(".")
        if " over " not in variant and figure["value"] is not None:
            panels.setdefault(measure, {})[variant] = figure
    columns = max(1, len(panels))
    plot, all_axes = charts.new_chart(3.4 * columns, 3.0, columns=columns)
    for axes, (measure, points) in zip(all_axes, panels.items(), strict=False):
        charts.error_bars(axes, range(len(points)), list(points.values()))
        axes.set_xticks(range(len(points)), list(points), rotation=20)
        axes.margins(x=0.2)
        axes.set_title(measure)
    return plot
