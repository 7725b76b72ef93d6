"""``docs/results.md``: the figures of committed result files as Markdown, and nothing that is not in them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from vlv.errors import DataError
from vlv.evaluation.report.claims import Figures, Result, findings
from vlv.evaluation.results import figure_row
from vlv.storage import Json

_HEAD = """# Results

<!-- written by `vlv eval results`; do not edit -->

Every figure here comes from a result file, in `{folder}` or shipped with vlv-tiny, and can be made again: the former with
`runs/evaluate.sh`, the latter with `runs/tiny.sh`. They are figures of vlv-tiny in the toy world, whose truth is known, each with
the number of samples behind it; the paper's stand in tables of their own, for they are of other models on other data.
"""

_DIFFERENCE = ("difference", "low", "high", "p")

_NO_ABLATIONS = """The ablations (Tables 4 and 5, and Table 7 at equal budget) and the discrete bottleneck have a command, `vlv eval ablation
NAME`, which trains their models. **They have not been run yet**: there are no figures of them here.
"""


def read_results(paths: Sequence[Path]) -> dict[str, Result]:
    """Result files by name, from files, run folders and folders of result files.

    Raises:
        DataError: There is none, or one is damaged.
    """
    files: list[Path] = []
    for path in paths:
        if (path / "result.json").is_file():
            files.append(path / "result.json")
        elif path.is_dir():
            files += sorted(path.glob("*.json"))
        else:
            files.append(path)
    if not files:
        raise DataError(
            f"there are no results in {', '.join(map(str, paths))}; begin with vlv eval score"
        )
    results: dict[str, Result] = {}
    for file in files:
        name = file.parent.name if file.name == "result.json" else file.stem
        try:
            content = json.loads(file.read_text("utf-8"))
            if not ("figures" in content or "sections" in content):
                raise ValueError("no figures")
        except OSError as error:
            raise DataError(
                f"{file} cannot be read: {error.strerror}; score the run first"
            ) from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{file} holds no results ({error})") from error
        results[name] = content
    return results


def read_notes(paths: Sequence[Path]) -> str:
    """What a reader has to know of all results: the text of `notes.md` in their folders."""
    files = [path / "notes.md" for path in paths]
    return "\n".join(file.read_text("utf-8") for file in files if file.is_file())


def paper() -> Json:
    """The paper's tables with their citation."""
    file = resources.files("vlv.evaluation.report") / "paper.json"
    content: Json = json.loads(file.read_text("utf-8"))
    return content


def make_document(results: Mapping[str, Result], folder: str, notes: str = "") -> str:
    """The whole document.

    Args:
        results: By name.
        folder: Where their files are, for the reader.
        notes: What stands above all figures.
    """
    parts = [_HEAD.format(folder=folder), *([notes] if notes else [])]
    if not any(
        str(result.get("experiment", "")).startswith("ablation") for result in results.values()
    ):
        parts.append(_NO_ABLATIONS)
    parts.append(_claims(results))
    parts += [_result(name, result) for name, result in results.items()]
    return "\n".join([*parts, _paper()]).rstrip() + "\n"


class Table(NamedTuple):
    """Rows of text under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of(result: Result) -> list[Table]:
    """The figures of a result, by section where there are any, the comparison with its baseline, and its other tables."""
    if "sections" in result:
        sections = result["sections"].values()
        return [_figures(s["title"], s["figures"]) for s in sections if "figures" in s]
    is_interval = str(result["intervals"]).startswith("95 %")
    found = [_figures("", result["figures"], "95 % interval" if is_interval else "range")]
    if result["comparisons"]:
        rows = [
            (c["label"], *(format_cell(c[key]) for key in _DIFFERENCE), str(c["n"]))
            for c in result["comparisons"].values()
        ]
        found.append(Table("", ("difference, paired", *_DIFFERENCE, "n"), rows))
    for one in result["tables"]:
        cells = [[format_cell(value) for value in row.values()] for row in one["rows"]]
        if cells:
            found.append(Table(one["title"].capitalize(), list(one["rows"][0]), cells))
    return found


def _figures(title: str, figures: Figures, interval: str = "95 % interval") -> Table:
    rows = [figure_row(figure) for figure in figures.values()]
    return Table(title, ("figure", "value", interval, "n"), rows)


def format_cell(value: str | float | None) -> str:
    """A cell of a table: shares with three digits, counts as they are."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def paper_tables(experiments: Collection[str] | None = None) -> list[Table]:
    """The paper's tables, or those that belong to some experiments."""
    return [
        Table(
            one["title"],
            one["columns"],
            [[f"{v:g}" if isinstance(v, float) else str(v) for v in row] for row in one["rows"]],
        )
        for one in paper()["tables"]
        if experiments is None or one["experiment"] in experiments
    ]


# --- as Markdown ---------------------------------------------------------------------------------------


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _claims(results: Mapping[str, Result]) -> str:
    rows = [
        (claim.source, claim.text, f"**{found.verdict}**", claim.criterion, found.evidence)
        for claim, found in findings(results)
    ]
    head = ("paper", "claim", "by our figures", "when it holds", "figures")
    return "## The paper's claims\n\n" + _markdown(head, rows)


_ABOUT = ("num", "seed", "split", "steps", "guidance", "candidates", "timesteps", "temperature")


def _result(name: str, result: Result) -> str:
    tables = tables_of(result)
    if "sections" in result:
        about = {k: v for k, v in result["settings"].items() if k in _ABOUT}
        sections = list(result["sections"].values())
        what = "everything about vlv-tiny at once" if len(sections) > 1 else sections[0]["title"]
        parts = [f"### {table.title}\n\n{_markdown(*table[1:])}" for table in tables]
        head = f"## {name}: {what}\n\n{describe(about)}\n\n"
        return head + "\n".join(parts)
    text = f"## {name}: {result['title']}\n\n{about_run(result)}\n"
    text += "".join(f"\n> {note}\n" for note in result["notes"])
    for title, columns, rows in tables:
        text += "\n" + (f"{title}:\n\n" if title else "") + _markdown(columns, rows)
    return text


def _paper() -> str:
    parts = [
        f"## The paper's own figures\n\nOf {paper()['citation']}. Not ours, and of another data set.\n"
    ]
    parts += [f"{title}:\n\n{_markdown(columns, rows)}" for title, columns, rows in paper_tables()]
    return "\n".join(parts)


# --- settings ------------------------------------------------------------------------------------------


def about_run(result: Result) -> str:
    """Data and settings of a result in one line; the seed of the intervals is told from that of the data."""
    settings = dict(result["settings"])
    if "seed" in result["data"] and "seed" in settings:
        settings["seed of intervals"] = settings.pop("seed")
    return describe({**result["data"], **settings})


def describe(settings: Mapping[str, object]) -> str:
    """Settings in one line."""
    return "; ".join(f"{key}: {_short(value)}" for key, value in settings.items() if value not in (None, {}))  # fmt: skip


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list):
        return ", ".join(_short(item) for item in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:12] + " ..."
