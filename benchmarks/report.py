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


def _line(row: dict[str, Any], more: list[str]) -> str:
    seconds, ratio = (statistics.median(row[key]) for key in ("seconds", "ratios"))
    figures = [f"{seconds:.3f}", f"{ratio:.2f}"]
    figures += [f"{bound(row['ratios']):.2f}" for bound in (min, max)]
    figures += [f"{row['notes'][name]:.3g}" for name in more]
    return f"| {row['name']} | {' | '.join(figures)} |"


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
