"""What an evaluation returns: figures with intervals and targets, in sections, as data that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from vlv.evaluation.statistics import Estimate
from vlv.storage import Json

Unit = Literal[
    "share",
    "ratio",
    "dB",
    "length",
    "degrees",
    "tokens",
    "loss",
    "distance",
    "points",
    "hours",
    "USD",
]


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure is held against; a goal below the floor means that less is better."""

    floor: float
    """The least that counts as done."""
    goal: float
    """What is wanted."""

    def verdict(self, value: float) -> str:
        """One of "goal", "ok" and "below floor".

        >>> Target(floor=0.08, goal=0.01).verdict(0.05), Target(0.9, 0.98).verdict(0.89)
        ('ok', 'below floor')
        """
        sign = 1 if self.goal > self.floor else -1
        if sign * value >= sign * self.goal:
            return "goal"
        return "ok" if sign * value >= sign * self.floor else "below floor"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the report."""

    key: str
    """Its name in the JSON file, such as captions.f1."""
    label: str
    estimate: Estimate
    unit: Unit = "share"
    target: Target | None = None

    @property
    def verdict(self) -> str:
        """What the target says of the value; empty without a target or a value."""
        if self.target is None or math.isnan(self.estimate.value):
            return ""
        return self.target.verdict(self.estimate.value)

    def to_dict(self) -> Json:
        """As JSON values."""
        e = self.estimate
        target = self.target and {"floor": self.target.floor, "goal": self.target.goal}
        return {
            "label": self.label,
            "unit": self.unit,
            "value": number(e.value),
            "low": number(e.low),
            "high": number(e.high),
            "n": e.n,
            **(target or {}),
            **({"verdict": self.verdict} if self.verdict else {}),
        }


class StoredFigure(TypedDict):
    """A figure as it stands in a result file; a number is None where there was nothing to measure."""

    label: str
    unit: Unit
    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers without targets, one row per fact or timestep."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]

    def to_dict(self) -> Json:
        """As JSON values: one dict per row."""
        rows = [{c: number(v) for c, v in zip(self.columns, row, strict=True)} for row in self.rows]
        return {"title": self.title, "rows": rows}


@dataclass(frozen=True, slots=True)
class Section:
    """The figures of one experiment, or the reason why there are none."""

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    not_measured: str | None = None
    notes: tuple[str, ...] = ()
    """What was left out, and why."""

    def to_dict(self) -> Json:
        """As JSON values."""
        if self.not_measured is not None:
            return {"title": self.title, "not_measured": self.not_measured}
        return {
            "title": self.title,
            "figures": {f.key: f.to_dict() for f in self.figures},
            "tables": [t.to_dict() for t in self.tables],
            **({"notes": list(self.notes)} if self.notes else {}),
        }


@dataclass(frozen=True, slots=True)
class Results:
    """A whole evaluation."""

    settings: Json
    """Everything that decides the figures: seeds, sizes, steps, guidance, weights, versions."""
    sections: tuple[Section, ...]

    @property
    def figures(self) -> dict[str, Figure]:
        """All figures by key."""
        return {figure.key: figure for section in self.sections for figure in section.figures}

    def to_dict(self) -> Json:
        """Settings and sections as JSON values."""
        return {
            "settings": self.settings,
            "sections": {section.name: section.to_dict() for section in self.sections},
        }


def number(value: str | int | float) -> str | int | float | None:
    """A value that JSON can hold: None for NaN and the infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- as text ---------------------------------------------------------------------------------------

_DIGITS = {
    "dB": 2,
    "points": 2,
    "degrees": 2,
    "tokens": 1,
    "length": 3,
    "loss": 4,
    "distance": 3,
    "hours": 0,
    "USD": 0,
}
_HEAD = ("", "value", "95 % interval", "n", "floor", "goal", "")
_LEFT = (0, len(_HEAD) - 1)


def format_results(results: Results) -> str:
    """The report as an aligned table."""
    cells: list[Sequence[str] | str] = [_HEAD]
    for section in results.sections:
        cells.append(section.title)
        if section.not_measured is not None:
            cells.append(f"  not measured: {section.not_measured}")
        cells += [_figure_cells(figure) for figure in section.figures]
        cells += [line for table in section.tables for line in format_table(table)]
        cells += [f"  {note}" for note in section.notes]
    return "\n".join(_aligned(cells, _LEFT))


def format_summary(results: Results, keys: Sequence[str]) -> str:
    """The figures that say most as an aligned table, with what could not be measured and how to see the rest."""
    settings, figures = results.settings, results.figures
    cells: list[Sequence[str] | str] = [_HEAD]
    for section in results.sections:
        for figure in section.figures:
            if figure.key in keys:
                title = section.title.partition(":")[0]
                cells.append(_figure_cells(replace(figure, label=f"{title}: {figure.label}")))
    notes = [note for section in results.sections for note in section.notes]
    missing = [s for s in results.sections if s.not_measured]
    if missing:
        notes += [f"not measured: {s.name} ({s.not_measured})" for s in missing]
    left = len(figures) - sum(key in figures for key in keys)
    about = f"{settings['num']} scenes of seed {settings['seed']}, {settings['steps']} steps, guidance {settings['guidance']:g}"
    return "\n".join(
        [*_aligned(cells, _LEFT), *notes, f"{about}; --full prints the other {left} figures"]
    )


def _figure_cells(figure: Figure) -> tuple[str, ...]:
    e, unit = figure.estimate, figure.unit
    known = not math.isnan(e.low)
    interval = f"{format_value(e.low, unit)} to {format_value(e.high, unit)}" if known else ""
    floor, goal = (
        (format_value(figure.target.floor, unit), format_value(figure.target.goal, unit))
        if figure.target
        else ("", "")
    )
    value = format_value(e.value, unit)
    return (f"  {figure.label}", value, interval, str(e.n), floor, goal, figure.verdict)


def format_value(value: float, unit: Unit) -> str:
    """A value with the digits and the sign of its unit.

    >>> format_value(0.91234, "share"), format_value(31.4159, "dB"), format_value(float("nan"), "share")
    ('91.2 %', '31.42 dB', '-')
    """
    if math.isnan(value):
        return "-"
    if unit == "share":
        return f"{100 * value:.{1 if value < 0.995 else 2}f} %"
    suffix = {"dB": " dB", "degrees": "°"}.get(unit, "")
    return f"{value:.{_DIGITS.get(unit, 3)}f}{suffix}"


def figure_row(figure: StoredFigure) -> tuple[str, str, str, str]:
    """Label, value, interval and n of a figure of a result file."""
    value, low, high = (
        "" if number is None else format_value(number, figure["unit"])
        for number in (figure["value"], figure["low"], figure["high"])
    )
    return figure["label"], value or "-", f"{low} to {high}" if low else "", str(figure["n"])


def format_table(table: Table) -> list[str]:
    """Lines of an indented table; floats are shares."""
    rows = [table.columns, *([_cell(value) for value in row] for row in table.rows)]
    return [f"  {table.title}:", *(f"    {line}" for line in _aligned(rows))]


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}"
    return str(value)


def _aligned(rows: Sequence[Sequence[str] | str], left: Collection[int] = (0,)) -> Iterator[str]:
    """Lines of a table, whose columns are aligned to the right, or to the left; a row of text alone stays as it is."""
    cells = [row for row in rows if not isinstance(row, str)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in rows:
        if not isinstance(row, str):
            columns = enumerate(zip(row, widths, strict=True))
            row = "  ".join(v.ljust(w) if i in left else v.rjust(w) for i, (v, w) in columns)
        yield row.rstrip()
