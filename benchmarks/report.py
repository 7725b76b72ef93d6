"""Puts the figures of benchmarks/results/*.json into docs/performance.md.

    python benchmarks/report.py

Each block between `<!-- figures: NAME -->` and `<!-- end -->` becomes the table of NAME.json, with the plot of that name if
there is one, or says that it was not measured. A test checks that the page agrees with the files.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(file: Path) -> str:
    """The figures of a file as Markdown."""
    if not file.is_file():
        return f"Not measured yet: `benchmarks/results/{file.name}` does not exist.\n"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if "results" in found:
        return full_size(found)
    if "figures" in found:
        return plain(found)
    lines = []
    for contest in found["contests"]:
        more = [name for name in contest["rows"][0]["notes"] if name != "loss"]
        head = ["", "seconds", "times as fast", "least", "most", *more]
        lines += [
            f"**{contest['title']}** ({contest['unit']})",
            "",
            f"| {' | '.join(head)} |".replace("|  |", "| |"),
            f"|---|{'---:|' * (len(head) - 1)}",
        ]
        lines += [_line(row, more) for row in contest["rows"]]
        lines.append("")
    versions = found["versions"]
    models = f"{found['models']} weights, " if found["models"] else ""
    lines.append(
        f"{models}{found['threads']} threads, {versions['device']}, torch {versions['torch']}."
    )
    return "\n".join(lines) + "\n"


def plain(found: dict[str, Any]) -> str:
    """Figures that nothing is compared with."""
    lines = [f"| {label} | {value:,.0f} |" for label, value in found["figures"].items()]
    where = f"{found['images']:,} images, {found['model']}, torch {found['versions']['torch']}."
    return "\n".join(["| | |", "|---|---:|", *lines, "", where]) + "\n"


def full_size(found: dict[str, Any]) -> str:
    """The figures of full_size.py as Markdown."""
    head = ["images", "images/s", "GFLOP each", "TFLOP/s", "MFU", "of 790", "GB", "GB predicted"]
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    notes = []
    for row in found["results"]:
        name = " ".join([row["use"], *(f"`{text}`" for text in row["settings"])])
        lines.append(f"| {name} | {' | '.join(_full_size_line(row))} |")
        if row["parts"]:
            parts = sorted(row["parts"].items(), key=lambda part: -part[1])
            shares = ", ".join(f"{part} {seconds / row['seconds']:.1%}" for part, seconds in parts)
            notes += [f"{name}, {row['seconds']:.3f} s a step: {shares}.", ""]
    product, versions = found.get("product_flops"), found["versions"]
    reached = f" A product of 8192 x 8192 matrices reached {product / 1e12:.0f}." if product else ""
    peak = f"MFU is of {found['peak_flops'] / 1e12:.1f} TFLOP/s, the data sheet's."
    where = f"{found['device']}, torch {versions['torch']}, `python {versions['command']}`."
    return "\n".join([*lines, "", *notes, f"{peak}{reached} {where}"]) + "\n"


def _full_size_line(row: dict[str, Any]) -> list[str]:
    flops = row["flops_per_image"]
    rate = flops and flops * row["images_per_second"]
    figures = [
        (row["batch_size"], "{}"),
        (row["images_per_second"], "{:.1f}"),
        (flops and flops / 1e9, "{:.0f}"),
        (rate and rate / 1e12, "{:.0f}"),
        (row["mfu"], "{:.1%}"),
        (rate and rate / 790e12, "{:.1%}"),
        (row["peak_bytes"] and row["peak_bytes"] / 1e9, "{:.1f}"),
        (row["predicted_bytes"] and row["predicted_bytes"] / 1e9, "{:.1f}"),
    ]
    return ["-" if value is None else form.format(value) for value, form in figures]


def _line(row: dict[str, Any], more: list[str]) -> str:
    seconds, ratio = (statistics.median(row[key]) for key in ("seconds", "ratios"))
    figures = [f"{seconds:.3f}", f"{ratio:.2f}"]
    figures += [f"{bound(row['ratios']):.2f}" for bound in (min, max)]
    figures += [_short(row["notes"][name]) for name in more]
    return f"| {row['name']} | {' | '.join(figures)} |"


def _short(value: float) -> str:
    """Three digits, and all of a whole number's."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def page(text: str) -> str:
    """The page with every block filled in."""
    return BLOCK.sub(lambda m: f"{m[1]}{plot(m[2])}{table(RESULTS / f'{m[2]}.json')}{m[3]}", text)


def plot(name: str) -> str:
    """The plot of some figures as Markdown: docs/images/scaling.png is that of scaling-cpu."""
    file = f"images/{name.removesuffix('-cpu')}.png"
    return f"![Seconds per step]({file})\n\n" if (PAGE.parent / file).is_file() else ""


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
