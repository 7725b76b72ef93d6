"""Figures and pictures into the README: `python -m examples.pictograms.page FIGURES.json SHEETS`.

The table stands between two markers of README.md and is written by nothing else. The contact sheet, contact-sheet.png, has
only pictures whose licence asks for no more than a notice (see the README).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from vlv.errors import DataError, VLVError
from vlv.progress import say
from vlv.storage import Json, write_text

HERE = Path(__file__).parent
README = HERE / "README.md"
SHEET = HERE / "contact-sheet.png"
START, END = "<!-- figures: written by `page.py` -->", "<!-- end of figures -->"
FLOORS = {
    "style: name right at 1": (0.55, 0.75),
    "concepts: reconstruction finds its original": (0.6, 0.85),
    "style: reconstruction finds its original": (0.35, 0.6),
    "style: captions that end by themselves": (0.99, 1.0),
    "concepts: blend has both parents among the ten nearest": (0.3, 0.6),
}
"""Floor and goal of the figures that have one."""


def table(figures: Mapping[str, Json]) -> str:
    """The figures as a table of Markdown."""
    rows = ["| figure | floor | goal | measured | 95 % interval | n |", "|---|---|---|---|---|---|"]
    for name, figure in figures.items():
        floor, goal = FLOORS.get(name, (None, None))
        unit = f" {figure['unit']}" if figure["unit"] not in ("share", "cosine") else ""
        value = f"{figure['value']:.3g}{unit}"
        if floor is not None:
            value += ", below the floor" if figure["value"] < floor else ""
        ends = f"{figure['low']:.3g} to {figure['high']:.3g}"
        limits = ["" if x is None else f"{x:g}" for x in (floor, goal)]
        rows.append(f"| {name} | {limits[0]} | {limits[1]} | {value} | {ends} | {figure['n']} |")
    return "\n".join(rows)


def captions(found: Mapping[str, Sequence[Sequence[str]]], count: int = 12) -> str:
    """The first captions of each set beside the labels, right and wrong as they come."""
    rows = ["| set | label | caption |", "|---|---|---|"]
    for name, pairs in found.items():
        rows += [f"| {name} | {label} | {caption} |" for label, caption in pairs[:count]]
    return "\n".join(rows)


def runs(found: Mapping[str, Json]) -> str:
    """What was trained, and how long it took."""
    rows = ["| run | steps | minutes |", "|---|---|---|"]
    rows += [f"| {name} | {run['steps']} | {run['minutes']:g} |" for name, run in found.items()]
    return "\n".join(rows)


def write_page(figures: Path, readme: Path = README) -> None:
    """Put figures and captions between the markers.

    Raises:
        DataError: The figures are missing or damaged, or the README has no markers.
    """
    try:
        found = json.loads(figures.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{figures} cannot be read ({error}); run measure.py") from error
    text = readme.read_text("utf-8")
    if START not in text or END not in text:
        raise DataError(f"{readme} has lost the markers of its figures; put them back")
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    parts = [f"Settings: {settings}.", table(found["figures"])]
    parts += [captions(found["captions"]), runs(found["runs"])]
    before, after = text.split(START)[0], text.split(END)[1]
    write_text(readme, before + START + "\n" + "\n\n".join(parts) + "\n" + END + after)


def write_sheet(sheets: Path, rows: Sequence[str], columns: int, out: Path = SHEET) -> None:
    """Stack the first pictures of several strips.

    Raises:
        DataError: A strip is missing.
    """
    strips = []
    for name in rows:
        path = sheets / f"{name}.png"
        if not path.is_file():
            raise DataError(f"{path} is missing; run measure.py with --sheets {sheets}")
        strip = Image.open(path).convert("RGB")
        strips.append(strip.crop((0, 0, min(strip.width, columns * strip.height), strip.height)))
    gap = 4
    page = Image.new(
        "RGB", (max(s.width for s in strips), sum(s.height + gap for s in strips)), "white"
    )
    top = 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height + gap
    page.save(out)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("figures", type=Path)
    parser.add_argument("sheets", type=Path)
    given = parser.parse_args(argv)
    names = ("original", "rebuilt", "generated")
    rows = [f"concepts-{name}" for name in names]
    rows += [f"concepts-{name}" for name in ("first", "second", "blend")]
    try:
        write_page(given.figures)
        write_sheet(given.sheets, rows, columns=16)
    except VLVError as error:
        say(f"page: {error}")
        return 1
    say(f"{README} and {SHEET} are written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
