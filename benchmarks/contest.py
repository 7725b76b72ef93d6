"""Contestants that do the same work, timed in turn: A B C, A B C, so that a busy minute hits all of them."""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlv.training.journal import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


@dataclass(frozen=True)
class Row:
    """One contestant."""

    name: str
    seconds: list[float]
    """Of each round, for the same amount of work."""
    ratios: list[float]
    """How much faster than the first contestant in the same round."""
    notes: dict[str, float] = field(default_factory=dict)
    """What else is known of it, such as its loss."""

    @property
    def ratio(self) -> float:
        """Median."""
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class Contest:
    """All contestants of one kind of work."""

    title: str
    unit: str
    """What one round does."""
    rows: list[Row]

    def __str__(self) -> str:
        lines = [f"{self.title} ({self.unit})"]
        for row in self.rows:
            low, high = min(row.ratios), max(row.ratios)
            notes = "  ".join(f"{name} {value:.6g}" for name, value in row.notes.items())
            lines.append(
                f"  {row.name:<44} {statistics.median(row.seconds):8.3f} s  "
                f"{row.ratio:6.2f} x  ({low:.2f} to {high:.2f})  {notes}"
            )
        return "\n".join(lines)


def compete(
    title: str,
    unit: str,
    contestants: dict[str, Callable[[], Any]],
    *,
    repeats: int = 3,
    calls: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    notes: dict[str, dict[str, float]] | None = None,
) -> Contest:
    """Time every contestant in every round, after a warm-up of all; the first one is the measure of the others.

    Args:
        title: Of the contest.
        unit: What one call does.
        contestants: Names, and what is called.
        repeats: Rounds.
        calls: Of each contestant in a round, one after the other; the seconds are those of one.
        clock: `time.process_time` where others use the machine too.
        notes: What else is known of some of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(repeats + 1):
        for name, action in contestants.items():
            print(f"{title}: {name}, round {number} of {repeats}", file=sys.stderr)
            start = clock()
            for _ in range(calls):
                action()
            if number:
                seconds[name].append((clock() - start) / calls)
    first = next(iter(seconds.values()))
    rows = [
        Row(
            name,
            mine,
            [a / b for a, b in zip(first, mine, strict=True)],
            (notes or {}).get(name, {}),
        )
        for name, mine in seconds.items()
    ]
    return Contest(title, unit, rows)


def joined(contests: list[Contest]) -> Contest:
    """Contests of the same work, in each of which the first contestant is the same, as one."""
    firsts = [contest.rows[0] for contest in contests]
    first = replace(
        firsts[0],
        seconds=[second for row in firsts for second in row.seconds],
        ratios=[ratio for row in firsts for ratio in row.ratios],
    )
    rest = [row for contest in contests for row in contest.rows[1:]]
    return replace(contests[0], rows=[first, *rest])


def note(contest: Contest, notes: Callable[[Row], dict[str, float]]) -> Contest:
    """The contest with something more about every row, which becomes columns of its table."""
    rows = [replace(row, notes={**row.notes, **notes(row)}) for row in contest.rows]
    return replace(contest, rows=rows)


def write(file: Path, models: str | None, contests: list[Contest]) -> None:
    """The figures as JSON, with what they were made on; without models where none takes part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    value = {**_made_on(models), "contests": [asdict(contest) for contest in contests]}
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def others(file: Path, models: str, titles: Collection[str]) -> list[Contest]:
    """The contests of a file that a measurement of these titles leaves as they are; none where there is no file.

    Raises:
        SystemExit: They were measured with other models, threads or versions, so that the two do not belong in one file.
    """
    if not file.is_file():
        return []
    old = json.loads(file.read_text(encoding="utf-8"))
    kept = [
        Contest(each["title"], each["unit"], [Row(**row) for row in each["rows"]])
        for each in old["contests"]
        if each["title"] not in titles
    ]
    before, now = _flat(old), _flat(_made_on(models))
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if kept and changed:
        what = ", ".join(f"{k} was {before.get(k)}, now {now.get(k)}" for k in changed)
        raise SystemExit(
            f"{file} holds {kept[0].title} of another measurement ({what}); measure all anew, or name another file"
        )
    return kept


def _made_on(models: str | None) -> dict[str, Any]:
    found = versions()
    found = {name: value for name, value in found.items() if name not in {"command", "platform"}}
    return {"models": models, "threads": torch.get_num_threads(), "versions": found}


def _flat(made_on: dict[str, Any]) -> dict[str, Any]:
    """What two measurements must share to stand in one file."""
    found = {"models": made_on["models"], **made_on["versions"], "threads": made_on["threads"]}
    del found["started"]
    return found
