"""Rules on the columns of a table of addresses, such as LAION's, before anything is downloaded.

The images that a table names are fetched by img2dataset; what this leaves of the table is its input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlv.curation import rules
from vlv.curation.engine import Engine
from vlv.curation.job import run_missing
from vlv.curation.settings import FilterConfig
from vlv.curation.state import OutputFolder
from vlv.curation.summary import PLOT_NAME, REASONS, Summary, draw
from vlv.curation.tables import read_groups, write_table
from vlv.data.parquet import Parquet
from vlv.data.parts import Part, Unreadable
from vlv.data.records import DAMAGED
from vlv.data.source import Source, fingerprint
from vlv.data.tables import ParquetRows
from vlv.errors import ConfigError, DataError
from vlv.jobs.formats import import_pyarrow
from vlv.storage import Json, replacing

_ROWS = 65536
_COUNTS = {"reason": "string", "count": "int64"}


@dataclass(frozen=True)
class TableTask:
    """Some row groups of one table.

    Attributes:
        part: Where they are.
        config: The rules.
        kept: The Parquet file of the rows that stay.
        dropped: The Parquet file of the others, with reason and value.
        counts: The Parquet file of how many each reason took; written last.
    """

    part: ParquetRows | Unreadable
    config: FilterConfig
    kept: Path
    dropped: Path
    counts: Path


@dataclass(frozen=True)
class TableJob:
    """Tables to smaller tables: `part-00000.parquet` and so on, `dropped-00000.parquet`, summary and plot.

    Attributes:
        inputs: Parquet files, folders or globs.
        output: The folder to write.
        config: The rules; those that need an image are refused.
    """

    inputs: Sequence[str]
    output: Path
    config: FilterConfig

    def run(
        self, engine: Engine, report: Callable[[str, int, int], None] = lambda what, done, of: None
    ) -> Summary:
        """Do what is not done yet; a finished job is left alone.

        Raises:
            ConfigError: A rule needs the images.
            DataError: A table lacks a column that a rule needs.
            OutputError: The folder holds something else, or cannot be written.
        """
        self._check_rules()
        parts = [_only_parquet(part) for part in Source(self.inputs).parts()]
        rules_ = self.config.model_dump(mode="json")
        settings = {"command": "filter --table", "rules": rules_}
        folder = OutputFolder(self.output, settings, fingerprint(parts))
        if folder.is_finished:
            folder.clean()
            return Summary.from_dict(folder.summary())
        with folder.working():
            tasks = [self._task(number, part, folder.work) for number, part in enumerate(parts)]
            todo = [task for task in tasks if not task.counts.exists()]
            run_missing(engine, filter_table, todo, len(tasks), "filtered", report)
            summary = _sum(task.counts for task in tasks)
            summary.shards = len(tasks)
            draw(summary, self.output / PLOT_NAME)
            folder.finish(summary.to_dict())
        return summary

    def _check_rules(self) -> None:
        config = self.config
        for name, wanted in {
            "decode": config.decode,
            "min_contrast": config.min_contrast is not None,
            "min_bytes_per_pixel": config.min_bytes_per_pixel is not None,
            "exact_duplicates": config.exact_duplicates,
            "near_duplicates": config.near_duplicates is not None,
            "caption_score": config.caption_score is not None,
            "embedding_duplicates": config.embedding_duplicates is not None,
            **{f"{name}.model": rule.model is not None for name, rule in config.scores.items()},
        }.items():
            if wanted:
                raise ConfigError(
                    f"{name} needs the images and cannot filter a table; switch it off"
                )

    def _task(self, number: int, part: ParquetRows | Unreadable, work: Path) -> TableTask:
        kept, dropped = (
            self.output / f"{name}-{number:05d}.parquet" for name in ("part", "dropped")
        )
        return TableTask(part, self.config, kept, dropped, work / f"counts-{number:05d}.parquet")


def _only_parquet(part: Part) -> ParquetRows | Unreadable:
    if not isinstance(part, ParquetRows | Unreadable):
        raise DataError(f"{part}: --table filters Parquet tables alone; leave --table out")
    return part


def filter_table(task: TableTask) -> int:
    """Filter some row groups, a portion of rows at a time; returns the number of rows.

    Raises:
        DataError: The table lacks a column that a rule needs.
        OutputError: The results cannot be written.
    """
    if isinstance(task.part, Unreadable):
        write_table(task.counts, _COUNTS, [{"reason": DAMAGED, "count": 1}])
        return 0
    pyarrow, parquet = import_pyarrow()
    file = Parquet(task.part.source)
    schema = file.schema
    columns = _columns(task.config, schema.names, str(task.part))
    more = schema.append(pyarrow.field("reason", pyarrow.string())).append(
        pyarrow.field("value", pyarrow.string())
    )
    counts: Counter[str] = Counter()
    with replacing(task.kept) as kept_path, replacing(task.dropped) as dropped_path:
        kept = parquet.ParquetWriter(kept_path, schema, compression="zstd")
        dropped = parquet.ParquetWriter(dropped_path, more, compression="zstd")
        with kept, dropped:
            groups = range(task.part.start, task.part.stop or file.num_groups)
            for batch in file.batches(groups, schema.names, _ROWS):
                drops = [_judge(task.config, values) for values in _values(batch, columns)]
                kept.write_batch(batch.filter(pyarrow.array([drop is None for drop in drops])))
                lost = batch.filter(pyarrow.array([drop is not None for drop in drops]))
                why = zip(*((drop.reason, drop.value) for drop in drops if drop), strict=True)
                extra = [pyarrow.array(list(part), pyarrow.string()) for part in why]
                if extra:
                    arrays = [*lost.columns, *extra]
                    dropped.write_batch(pyarrow.RecordBatch.from_arrays(arrays, schema=more))
                counts.update(drop.reason if drop else "" for drop in drops)
    rows = [{"reason": reason, "count": count} for reason, count in sorted(counts.items())]
    write_table(task.counts, _COUNTS, rows)
    return counts.total()


def _columns(config: FilterConfig, names: Sequence[str], where: str) -> dict[str, str]:
    """The columns of one table that the rules read, by rule; one that a forgiving rule lacks is left out."""
    wanted = rules.Columns(config).wanted
    if (config.short_side_above, config.aspect_min, config.aspect_max) != (None, None, None):
        wanted |= {"width": config.width_column, "height": config.height_column}
    lower = {name.lower(): name for name in names}
    for rule, column in wanted.items():
        score = config.scores.get(rule)
        if column.lower() not in lower and not (score and score.unknown == "keep"):
            raise DataError(_absent(rule, column, names, where))
    return {rule: lower[c.lower()] for rule, c in wanted.items() if c.lower() in lower}


def _values(batch: Any, columns: Mapping[str, str]) -> Iterator[Json]:
    """What the rules read of each row, by rule."""
    pyarrow, _ = import_pyarrow()
    lists = []
    for rule, name in columns.items():
        column = batch.column(name)
        try:
            column = column if rule == rules.LANGUAGE else column.cast(pyarrow.float64())
            lists.append(column.to_pylist())
        except pyarrow.ArrowException as error:
            raise DataError(f"the column {name} holds no numbers ({error})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"the column {name} holds a text that is no UTF-8") from error
    for row in range(batch.num_rows):
        yield {rule: values[row] for rule, values in zip(columns, lists, strict=True)}


def _judge(config: FilterConfig, values: Json) -> rules.Drop | None:
    """Why a row is dropped, by the rules on images; None when it stays."""
    drop = rules.check_known(config, values)
    if drop is not None or "width" not in values:
        return drop
    sides = values["width"], values["height"]
    return rules.check_size(config, *((math.nan, math.nan) if None in sides else sides))


def _absent(rule: str, column: str, names: Sequence[str], where: str) -> str:
    if rule in ("width", "height"):
        known = ", ".join(sorted(names))
        return f"{where}: there is no column {column} (columns: {known}); name it with --set {rule}_column=NAME"
    return rules.unknown_column([(rule, column)], names, where)


def _sum(tables: Iterable[Path]) -> Summary:
    summary, counts = Summary(), dict.fromkeys(REASONS, 0)
    for path in tables:
        for row in (row for rows in read_groups(path) for row in rows):
            if row["reason"] == DAMAGED:
                summary.damaged_files += row["count"]
            elif row["reason"]:
                counts[row["reason"]] += row["count"]
            else:
                summary.kept += row["count"]
    summary.dropped = {name: count for name, count in counts.items() if count}
    summary.images = summary.kept + sum(counts.values())
    return summary
