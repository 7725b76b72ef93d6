"""From what was judged to figures: every number with an interval, and against a baseline with a paired test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlv.errors import DataError
from vlv.evaluation import statistics
from vlv.evaluation.experiments.run import Run, Settings
from vlv.evaluation.experiments.samples import read_rows
from vlv.evaluation.metrics.sentences import MAX_N, bleu
from vlv.evaluation.results import Figure, Section, Table, Target, Unit, number
from vlv.evaluation.statistics import Statistic, estimate, paired_test
from vlv.jobs.table import Row
from vlv.storage import write_json, write_text
from vlv.training.journal import versions

STATISTICS: dict[str, Statistic] = {
    "mean": statistics.mean,
    "ratio": statistics.ratio,
    "complement": statistics.complement,
    "f1": statistics.f1,
    "ratio_of_ratios": statistics.ratio_of_ratios,
    "ratio_of_f1": statistics.ratio_of_f1,
    "recovered": statistics.recovered,
    "decibels": statistics.decibels,
    **{f"bleu{n}": partial(bleu, n=n) for n in range(1, MAX_N + 1)},
}
"""What a figure may be of its columns; named in the files, so that others can recompute it."""

FEW_SAMPLES = 30
"""With fewer samples a bootstrap interval is too narrow."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure and, for every sample, the columns that it is computed from.

    Attributes:
        key: Such as ``ours.g2.claims``.
        label: What it is, with its unit where that is not plain.
        ids: (N,), the samples that were measured.
        columns: (N, K).
        statistic: A name in `STATISTICS`.
        unit: How it is written.
    """

    key: str
    label: str
    ids: tuple[str, ...]
    columns: NDArray[np.float64]
    statistic: str = "mean"
    unit: Unit = "share"


@dataclass(slots=True)
class Scores:
    """What the score step of an experiment has found.

    Attributes:
        measures: Figures that are computed from samples.
        figures: Figures that are not, such as a distance of sets; with intervals of their own.
        tables: Further numbers.
        notes: Sentences that belong to the figures: warnings, what was left out.
        settings: Judges and their versions, resizing, shares that were truncated, cost, and the like.
    """

    measures: list[Measure] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: Settings = field(default_factory=dict)

    def add(
        self,
        key: str,
        label: str,
        rows: Mapping[str, Sequence[float] | float],
        statistic: str = "mean",
        unit: Unit = "share",
    ) -> None:
        """Add a measure from columns by sample id; nothing where there is no sample."""
        if rows:
            table = np.array(list(rows.values()), np.float64)
            columns = table[:, None] if table.ndim == 1 else table
            self.measures.append(Measure(key, label, tuple(rows), columns, statistic, unit))


def judgements(run: Run, scores: Scores) -> Iterator[tuple[str, Settings, list[Row]]]:
    """Every judge's name, settings and rows without error; what failed and what it cost goes into the scores."""
    for name in run.judges():
        about = run.table_settings(f"judgements/{name}")
        rows = run.all_rows(f"judgements/{name}", ())
        good = [row for row in rows if row.get("error") is None and not row.get("skipped")]
        skipped = sum(bool(row.get("skipped")) for row in rows)
        scores.settings[f"judge {name}"] = about
        counts = {"failed": len(rows) - len(good) - skipped, "were skipped": skipped}
        scores.notes += [
            f"{name}: {count} of {len(rows)} judgements {what}"
            for what, count in counts.items()
            if count
        ]
        add_cost(scores, name, rows)
        if models := sorted({str(row["model"]) for row in rows if row.get("model")}):
            scores.settings[f"version of {name}"] = ", ".join(models)
        yield name, about, good


def add_cost(scores: Scores, name: str, rows: Sequence[Row]) -> None:
    """What the answers of an endpoint cost, where it cost anything."""
    if usd := sum(row.get("usd") or 0.0 for row in rows):
        scores.settings[f"cost of {name} in USD"] = usd


def figures_of(
    scores: Scores, seed: int, targets: Mapping[str, Target] | None = None
) -> tuple[Figure, ...]:
    """All figures, with intervals and the targets that they are held against."""
    computed = [
        Figure(
            m.key,
            m.label,
            estimate(m.columns, STATISTICS[m.statistic], seed),
            m.unit,
            (targets or {}).get(m.key),
        )
        for m in scores.measures
    ]
    return (*computed, *scores.figures)


def score_run(
    run: Run,
    scores: Scores,
    title: str,
    seed: int,
    baseline: Path | None = None,
    against: str | None = None,
) -> Section:
    """Compute the figures of a run and write ``scores.jsonl`` and ``result.json``.

    Args:
        run: Whose.
        scores: What was found.
        title: Of the experiment.
        seed: Of intervals and tests.
        baseline: Another run's folder, or its ``scores.jsonl``: figures that both have are compared sample by sample.
        against: What keys of this run begin with, such as a source's name: all others are compared with it likewise.

    Returns:
        All figures.

    Raises:
        DataError: Nothing was judged yet, the baseline has no sample of this run, or no figure begins so.
    """
    if not scores.measures and not scores.figures:
        raise DataError(
            f"nothing of {run.folder} has been judged, so there is nothing to score; begin with vlv eval judge"
        )
    compared = {} if baseline is None else compare(scores, baseline, seed)
    if against is not None:
        compared |= compare_within(scores, against, seed)
    _note_few(scores)
    figures = figures_of(scores, seed)
    section = Section(run.experiment, title, figures, tuple(scores.tables))
    _write_scores(run, scores)
    data = {
        "split": run.data.split,
        "seed": run.data.seed,
        "num": run.data.num,
        "files": len(run.data.inputs),
    }
    settings = {**run.settings, **scores.settings, "seed": seed}
    more = {"baseline": None if baseline is None else str(baseline), "comparisons": compared}
    write_result(run.folder, section, data, settings, {**more, "notes": scores.notes})
    return section


INTERVALS = "95 %, 1000 bootstrap resamples of the samples, unless a label says otherwise"


def write_result(
    folder: Path,
    section: Section,
    data: Settings,
    settings: Settings,
    more: Settings,
) -> None:
    """Write the figures of a run into its ``result.json``.

    Args:
        folder: Of the run.
        section: The figures.
        data: What they were measured on: split, seed, number of samples, number of files.
        settings: What they depend on.
        more: Notes, and what else differs from the defaults.
    """
    content = {
        "experiment": section.name,
        "title": section.title,
        "data": data,
        "settings": settings,
        "intervals": INTERVALS,
        **section.to_dict(),
        "baseline": None,
        "comparisons": {},
        **more,
        "versions": {k: v for k, v in versions().items() if k != "command"},  # it names folders
    }
    write_json(folder / "result.json", content)


def _note_few(scores: Scores) -> None:
    few = min((len(m.ids) for m in scores.measures), default=FEW_SAMPLES)
    if few < FEW_SAMPLES:
        scores.notes.append(
            f"a figure has only {few} samples; its interval is a rough one below {FEW_SAMPLES}"
        )


def _write_scores(run: Run, scores: Scores) -> None:
    """One row per sample, and a first row that says what the columns are."""
    about = {
        m.key: {"statistic": m.statistic, "label": m.label, "unit": m.unit} for m in scores.measures
    }
    rows: dict[str, Settings] = {}
    for measure in scores.measures:
        for id, columns in zip(measure.ids, measure.columns.tolist(), strict=True):
            rows.setdefault(id, {})[measure.key] = columns
    lines = [{"measures": about}, *({"id": id, "columns": values} for id, values in rows.items())]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(run.folder / "scores.jsonl", text)


def read_scores(path: Path) -> dict[str, Measure]:
    """The measures of a run by key, from its folder or its ``scores.jsonl``.

    Raises:
        DataError: The file is missing or is none.
    """
    path = path / "scores.jsonl" if path.is_dir() else path
    if path.name == "result.json":
        path = path.with_name("scores.jsonl")
    rows = read_rows(path)
    try:
        about = rows[0]["measures"]
        found = {}
        for key, said in about.items():
            having = [row for row in rows[1:] if key in row["columns"]]
            found[key] = Measure(
                key,
                said["label"],
                tuple(row["id"] for row in having),
                np.array([row["columns"][key] for row in having], np.float64),
                said["statistic"],
                said["unit"],
            )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} holds no scores ({type(error).__name__}: {error}); name a run that was scored, or its scores.jsonl"
        ) from error
    return found


def compare(scores: Scores, baseline: Path, seed: int) -> dict[str, Settings]:
    """Paired tests of every figure that two runs share, on the samples that they share, as JSON values."""
    theirs = read_scores(baseline)
    common = [m for m in scores.measures if m.key in theirs]
    if not common:
        raise DataError(
            f"{baseline} shares no figure with this run: it has {', '.join(list(theirs)[:4])} ..., this run "
            f"{', '.join(m.key for m in scores.measures[:4])} ...; give the sources the same names"
        )
    return {m.key: _paired(scores, m, theirs[m.key], m.label, seed, str(baseline)) for m in common}


def compare_within(scores: Scores, against: str, seed: int) -> dict[str, Settings]:
    """Paired tests of every other source, or guidance, against one of the same run, as JSON values."""
    theirs = {
        m.key.removeprefix(f"{against}."): m
        for m in scores.measures
        if m.key.startswith(f"{against}.")
    }
    if not theirs:
        heads = list(dict.fromkeys(m.key.split(".")[0] for m in scores.measures))
        raise DataError(
            f"no figure of this run begins with {against}; name a source, one of {', '.join(heads)}"
        )
    found, depth = {}, against.count(".") + 1
    for ours in scores.measures:
        parts = ours.key.split(".")
        head, rest = ".".join(parts[:depth]), ".".join(parts[depth:])
        if head != against and rest in theirs:
            label = f"{ours.label}, minus {against}"
            found[f"{head} over {against}.{rest}"] = _paired(
                scores, ours, theirs[rest], label, seed, against
            )
    return found


def _paired(
    scores: Scores, ours: Measure, other: Measure, label: str, seed: int, baseline: str
) -> Settings:
    """The paired test of a figure on the samples that both have."""
    place = {id: row for row, id in enumerate(other.ids)}
    rows = [(row, place[id]) for row, id in enumerate(ours.ids) if id in place]
    if not rows:
        raise DataError(
            f"{baseline} was measured on other samples ({other.ids[0]} ...) than this run ({ours.ids[0]} ...); a "
            "paired test needs the same"
        )
    if len(rows) < len(ours.ids):
        note = f"compared with the baseline on the {len(rows)} of {len(ours.ids)} samples that both have"
        scores.notes.extend([note] if note not in scores.notes else [])
    mine, its = (np.array(column) for column in zip(*rows, strict=True))
    paired = paired_test(ours.columns[mine], other.columns[its], STATISTICS[ours.statistic], seed)
    return {
        "label": label,
        "unit": ours.unit,
        "difference": number(paired.difference.value),
        "low": number(paired.difference.low),
        "high": number(paired.difference.high),
        "n": paired.difference.n,
        "p": number(paired.p),
    }
