"""Rules on the columns of a table of addresses, such as LAION's, before anything is downloaded.

The images that a table names are fetched by img2dataset; what this leaves of the table is its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlv.curation import rules
from vlv.curation.settings import column_of
from vlv.curation.state import OutputFolder
from vlv.curation.summary import PLOT_NAME, REASONS, Summary, draw
from vlv.curation.tables import arrow, read_groups, write_table
from vlv.data.parts import Part, Unreadable
from vlv.data.records import DAMAGED
from vlv.data.source import Source, fingerprint
from vlv.data.tables import ParquetRows, open_parquet
from vlv.errors import ConfigError, DataError
from vlv.storage import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from vlv.curation.engine import Engine
    from vlv.curation.settings import FilterConfig

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
        arrow()
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
            missing = [task for task in tasks if not task.counts.exists()]
            done = len(tasks) - len(missing)
            report("filtered", done, len(tasks))
            for _ in engine.run(filter_table, missing):
                done += 1
                report("filtered", done, len(tasks))
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
    pyarrow = arrow()
    file = open_parquet(task.part.source)
    schema = file.schema_arrow
    columns = _Columns(task.config, schema.names, str(task.part))
    more = schema.append(pyarrow.field("reason", pyarrow.string())).append(
        pyarrow.field("value", pyarrow.string())
    )
    counts: dict[str, int] = {}
    total = 0
    with replacing(task.kept) as kept_path, replacing(task.dropped) as dropped_path:
        kept = pyarrow.parquet.ParquetWriter(kept_path, schema, compression="zstd")
        dropped = pyarrow.parquet.ParquetWriter(dropped_path, more, compression="zstd")
        with kept, dropped:
            groups = range(task.part.start, task.part.stop or file.num_row_groups)
            for batch in file.iter_batches(_ROWS, row_groups=list(groups), use_threads=False):
                reasons, values = columns.judge(batch)
                stays = reasons == ""
                kept.write_batch(batch.filter(pyarrow.array(stays)))
                gone = pyarrow.array(~stays)
                extra = [
                    pyarrow.array(part[~stays].tolist(), pyarrow.string())
                    for part in (reasons, values)
                ]
                lost = pyarrow.RecordBatch.from_arrays(
                    [*batch.filter(gone).columns, *extra], schema=more
                )
                dropped.write_batch(lost)
                total += len(stays)
                for reason, count in zip(*np.unique(reasons, return_counts=True), strict=True):
                    counts[str(reason)] = counts.get(str(reason), 0) + int(count)
    rows = [{"reason": reason, "count": count} for reason, count in sorted(counts.items())]
    write_table(task.counts, _COUNTS, rows)
    return total


class _Columns:
    """The columns of one table that the rules read."""

    def __init__(self, config: FilterConfig, names: Sequence[str], where: str) -> None:
        self.config = config
        wanted = {
            name: column
            for name, rule in config.scores.items()
            if (column := column_of(name, rule)) is not None
        }
        if config.languages:
            wanted[rules.LANGUAGE] = config.language_column
        if (config.short_side_above, config.aspect_min, config.aspect_max) != (None, None, None):
            wanted |= {"width": config.width_column, "height": config.height_column}
        lower = {name.lower(): name for name in names}
        self.names: dict[str, str | None] = {}
        for rule, column in wanted.items():
            self.names[rule] = lower.get(column.lower())
            score = config.scores.get(rule)
            if self.names[rule] is None and not (score and score.unknown == "keep"):
                raise DataError(_absent(rule, column, names, where))

    def judge(self, batch: Any) -> tuple[NDArray[np.object_], NDArray[np.object_]]:
        """For each row why it is dropped (empty when it stays) and what was measured."""
        reasons = np.full(batch.num_rows, "", object)
        values = np.full(batch.num_rows, "", object)
        for name, bad, measured in self._checks(batch):
            new = bad & (reasons == "")
            reasons[new] = name
            values[new] = [_text(value) for value in measured[new].tolist()]
        return reasons, values

    def _checks(self, batch: Any) -> Iterator[tuple[str, NDArray[np.bool_], NDArray[Any]]]:
        config = self.config
        for name, rule in config.scores.items():
            column = self.names[name]
            if column is None:
                continue  # unknown: keep
            numbers = _numbers(batch, column)
            unknown = np.isnan(numbers)
            bad = (
                numbers >= rule.below if rule.below is not None else numbers < (rule.at_least or 0)
            )
            yield name, np.where(unknown, rule.unknown == "drop", bad), numbers
        if config.languages:
            language = np.array(batch.column(str(self.names[rules.LANGUAGE])).to_pylist(), object)
            yield rules.LANGUAGE, ~np.isin(language.astype(str), config.languages), language
        if "width" in self.names:
            width, height = (_numbers(batch, str(self.names[side])) for side in ("width", "height"))
            short, ratio = np.minimum(width, height), width / np.maximum(height, 1e-9)
            if config.short_side_above is not None:
                yield rules.SHORT_SIDE, ~(short > config.short_side_above), short
            low, high = config.aspect_min or 0.0, config.aspect_max or np.inf
            yield rules.ASPECT, ~((ratio >= low) & (ratio <= high)), ratio


def _numbers(batch: Any, column: str) -> NDArray[np.float64]:
    """A column as float64 (n); what is no number is not a number."""
    pyarrow = arrow()
    try:
        numbers = batch.column(column).cast(pyarrow.float64())
    except pyarrow.ArrowException as error:
        raise DataError(f"the column {column} holds no numbers ({error})") from error
    return np.asarray(numbers.to_numpy(zero_copy_only=False), np.float64)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _absent(rule: str, column: str, names: Sequence[str], where: str) -> str:
    if rule in ("width", "height"):
        known = ", ".join(sorted(names))
        return f"{where}: there is no column {column} (columns: {known}); name it with --set {rule}_column=NAME"
    return rules.unknown_column([(rule, column)], names, where)


def _sum(tables: Iterator[Path] | Any) -> Summary:
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
