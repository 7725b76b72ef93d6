"""Inputs to shards: measure every part, decide who stays, write every shard. Resumable at each part and shard.

`filter`, `pack` and `split` are this one job: they differ in the rules and in which folder an image goes to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlv.curation.decide import Survivors, drop_duplicates, read_survivors
from vlv.curation.engine import Engine, Task
from vlv.curation.inputs import image_parts, place_of, shown
from vlv.curation.measure import MeasureTask, measure
from vlv.curation.settings import FilterConfig
from vlv.curation.shards import ShardLimits, ShardTask, join_index, plan_shards, write_shard
from vlv.curation.state import OutputFolder
from vlv.curation.summary import PLOT_NAME, REASONS, Summary, draw
from vlv.curation.tables import DROPPED, Row, read_groups, writing_table
from vlv.data.source import fingerprint
from vlv.errors import OutputError
from vlv.jobs.formats import import_pyarrow
from vlv.storage import Json

DROPPED_NAME = "dropped.parquet"

Report = Callable[[str, int, int], None]
"""Told of progress: what is done, how many, of how many."""
Sorting = Callable[[Survivors], dict[str, NDArray[np.int64]]]
"""Folder name to the places of the survivors that go there."""


def into_one(survivors: Survivors) -> dict[str, NDArray[np.int64]]:
    """All that stay, into the output folder itself."""
    return {"": survivors.kept}


@dataclass(frozen=True)
class ShardJob:
    """Inputs to shards.

    Attributes:
        inputs: Paths, globs, datasets.
        output: The folder to write.
        command: Its name, so that one command does not go on with the work of another.
        config: The rules.
        limits: When a shard is full.
        sorting: Which image goes where.
        keep_duplicates: Measure the duplicates only, for the sorting.
        options: What else the result depends on.
        image_root: Folder below which the images of a table may lie, beside its own.
    """

    inputs: Sequence[str]
    output: Path
    command: str = "filter"
    config: FilterConfig = field(default_factory=FilterConfig)
    limits: ShardLimits = field(default_factory=ShardLimits)
    sorting: Sorting = into_one
    keep_duplicates: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    image_root: str | None = None

    def run(self, engine: Engine, report: Report = lambda what, done, of: None) -> Summary:
        """Do what is not done yet; a finished job is left alone.

        Raises:
            ConfigError: The settings contradict each other.
            DataError: The inputs are missing, or a rule needs a column that is not there.
            OutputError: The folder holds something else, or cannot be written.
        """
        import_pyarrow()  # complain now, not after hours of work
        self._check_apart()
        parts = image_parts(self.inputs, self.image_root)
        folder = OutputFolder(self.output, self._settings(), fingerprint(parts))
        if folder.is_finished:
            folder.clean()
            return Summary.from_dict(folder.summary())
        with folder.working():
            tasks = [
                MeasureTask(part, self.config, folder.work / f"measured-{number:06d}.parquet")
                for number, part in enumerate(parts)
            ]
            todo = [task for task in tasks if not task.table.exists()]
            run_missing(engine, measure, todo, len(tasks), "measured", report)
            tables = [task.table for task in tasks]
            survivors = read_survivors(tables)
            if not self.keep_duplicates:
                drop_duplicates(survivors, self.config, self._vectors(tables))
            plans = self._plan(survivors, tables, folder.work)
            shards = [task for plan in plans.values() for task in plan]
            missing = [task for task in shards if not task.is_done]
            run_missing(engine, write_shard, missing, len(shards), "written", report)
            summary = self._finish(survivors, tables, plans)
            folder.finish(summary.to_dict())
        return summary

    def _check_apart(self) -> None:
        output = self.output.resolve()
        for text in self.inputs:
            folder = Path(text).resolve()
            if folder.is_dir() and (output == folder or folder in output.parents):
                raise OutputError(
                    f"{self.output} lies in the input {text}, where its shards would be read again; "
                    "name a folder outside"
                )

    def _settings(self) -> Json:
        shards = {"images": self.limits.images, "bytes": self.limits.bytes}
        rules = self.config.model_dump(mode="json")
        return {"command": self.command, "rules": rules, "shards": shards, **self.options}

    def _vectors(self, tables: Sequence[Path]) -> NDArray[np.float32] | None:
        from vlv.curation.embeddings import measured_vectors, stored_vectors

        alike = self.config.embedding_duplicates
        if alike is None:
            return None
        return stored_vectors(tables, alike.file) if alike.file else measured_vectors(tables)

    def _plan(
        self, survivors: Survivors, tables: Sequence[Path], work: Path
    ) -> dict[str, list[ShardTask]]:
        return {
            name: plan_shards(
                survivors.table,
                places,
                tables,
                folder=self.output / name,
                work=work / name,
                limits=self.limits,
                max_bytes=self.config.max_bytes,
                image_root=self.image_root,
            )
            for name, places in self.sorting(survivors).items()
        }

    def _finish(
        self, survivors: Survivors, tables: Sequence[Path], plans: Mapping[str, list[ShardTask]]
    ) -> Summary:
        summary = Summary()
        write_dropped(self.output / DROPPED_NAME, survivors, tables, summary)
        kept = survivors.kept
        summary.kept = len(kept)
        summary.bytes = int(survivors.table["bytes"][kept].sum(dtype=np.int64))
        for name, plan in plans.items():
            (self.output / name).mkdir(exist_ok=True)
            join_index(self.output / name, plan)
            summary.shards += len(plan)
            if name:
                counts = (len(rows) for task in plan for _, rows in task.rows)
                summary.splits[name] = sum(counts)
        draw(summary, self.output / PLOT_NAME)
        return summary


def run_missing(
    engine: Engine,
    function: Callable[[Task], int],
    missing: Sequence[Task],
    total: int,
    what: str,
    report: Report,
) -> None:
    """Run the tasks that are not done yet, and report against the number of all."""
    done = total - len(missing)
    report(what, done, total)
    if missing:
        for number, _ in enumerate(engine.run(function, missing), done + 1):
            report(what, number, total)


def write_dropped(
    path: Path, survivors: Survivors, tables: Sequence[Path], summary: Summary
) -> None:
    """Write the table of everything that was dropped, and count it in the summary.

    Raises:
        OutputError: It cannot be written.
    """
    lost = _duplicates_by_part(survivors)
    winners = _winner_names(survivors, tables)
    counts: dict[str, int] = {}
    columns = [*DROPPED, "is_image", "kind", "path", "first", "second", "column"]
    columns.remove("source")
    with writing_table(path, DROPPED) as add_dropped:
        for part, table in enumerate(tables):
            number = 0
            for rows in read_groups(table, columns):
                gone = []
                for row in rows:
                    summary.images += row["is_image"]
                    if (part, number) in lost:
                        row |= _as_duplicate(survivors, lost[part, number], winners)
                    number += 1
                    if row["reason"]:
                        gone.append(row | {"source": shown(place_of(row))})
                        if row["is_image"]:
                            counts[row["reason"]] = counts.get(row["reason"], 0) + 1
                        else:
                            summary.damaged_files += 1
                add_dropped([{name: row[name] for name in DROPPED} for row in gone])
    summary.dropped = {name: counts[name] for name in REASONS if name in counts}


def _duplicates_by_part(survivors: Survivors) -> dict[tuple[int, int], int]:
    table = survivors.table
    return {
        (int(table["part"][place]), int(table["row"][place])): place
        for place in survivors.duplicates
    }


def _winner_names(survivors: Survivors, tables: Sequence[Path]) -> dict[int, str]:
    """The ids of the images that stay in place of others."""
    winners = np.unique([winner for _, winner in survivors.duplicates.values()]).astype(np.int64)
    names: dict[int, str] = {}
    for part in np.unique(survivors.table["part"][winners]).tolist():
        ids = [row["id"] for rows in read_groups(tables[part], ["id"]) for row in rows]
        for place in winners[survivors.table["part"][winners] == part].tolist():
            names[place] = ids[survivors.table["row"][place]]
    return names


def _as_duplicate(survivors: Survivors, place: int, winners: Mapping[int, str]) -> Row:
    reason, winner = survivors.duplicates[place]
    value = survivors.similarity.get(place)
    measured = "" if value is None else f"{value:.6g}"
    return {"reason": reason, "value": measured, "detail": f"like {winners[winner]}, which stays"}
