"""Puts the figures of benchmarks/results/*.json into docs/performance.md.

    python benchmarks/report.py

Each block between `<!-- figures: NAME -->` and `<!-- end -->` becomes the table of NAME.json, or says that it was not
measured. A test checks that the page agrees with the files.
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
        lines += [
            f"**{contest['title']}** ({contest['unit']})",
            "",
            "| | seconds | times as fast | least | most |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in contest["rows"]:
            seconds, ratio = (statistics.median(row[key]) for key in ("seconds", "ratios"))
            low, high = min(row["ratios"]), max(row["ratios"])
            lines.append(
                f"| {row['name']} | {seconds:.3f} | {ratio:.2f} | {low:.2f} | {high:.2f} |"
            )
        lines.append("")
    versions = found["versions"]
    lines.append(
        f"{found['models']} weights, {found['threads']} threads, {versions['device']}, torch {versions['torch']}."
    )
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with every block filled in."""
    return BLOCK.sub(lambda m: f"{m[1]}{table(RESULTS / f'{m[2]}.json')}{m[3]}", text)


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
