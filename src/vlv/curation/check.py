"""Is every record whole? Decode it, compare it with the index, and name everything that is wrong."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlv.curation.caption_stats import short_hash
from vlv.curation.engine import Engine
from vlv.curation.inputs import image_parts, place_of, shown
from vlv.curation.measure import measure_part
from vlv.curation.settings import FilterConfig
from vlv.curation.shards import INDEX_NAME
from vlv.curation.tables import INDEX, Row, read_groups
from vlv.data.foreign import printable
from vlv.data.parts import Part
from vlv.data.records import DUPLICATE_KEY, NOT_DOWNLOADED, Record
from vlv.data.tars import TarShard
from vlv.errors import DataError, VLVError
from vlv.jobs.formats import import_pyarrow
from vlv.storage import write_text

WRONG_HASH = "wrong_hash"
NOT_IN_INDEX = "not_in_index"
MISSING_RECORD = "missing_record"
MISSING_SHARD = "missing_shard"
DAMAGED_INDEX = "damaged_index"

_DECODE = FilterConfig(decode=True)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with the data.

    Attributes:
        kind: Such as wrong_hash or unreadable.
        id: Of the record, or the path of the file.
        source: Where it lies.
        detail: In words.
    """

    kind: str
    id: str
    source: str
    detail: str


@dataclass(frozen=True)
class CheckTask:
    """One part to check."""

    part: Part
    index: Path | None


@dataclass(frozen=True)
class Checked:
    """What a part gave.

    Attributes:
        images: Records with an image.
        problems: What is wrong.
        keys: 64-bit hashes of the keys of a tar, to find those of several shards (images).
    """

    images: int
    problems: list[Problem]
    keys: NDArray[np.uint64]


@dataclass
class Report:
    """What a check found."""

    images: int = 0
    indexed: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 when all is well, 2 otherwise."""
        return 2 if self.problems else 0

    def table(self, most: int = 20) -> str:
        """How many of each kind, and the first of them in words."""
        counts = Counter(problem.kind for problem in self.problems)
        lines = [f"{self.images} images, {self.indexed} of them in an index"]
        lines += [
            f"{kind.replace('_', ' '):<24}{count:>8}" for kind, count in sorted(counts.items())
        ]
        lines += [f"{problem.kind}: {problem.detail}" for problem in self.problems[:most]]
        if len(self.problems) > most:
            lines.append(f"... and {len(self.problems) - most} more")
        return "\n".join(lines if self.problems else [*lines, "all are whole"])

    def write(self, path: Path) -> None:
        """Write every problem as a line of JSON.

        Raises:
            OutputError: The file cannot be written.
        """
        lines = [json.dumps(vars(problem), ensure_ascii=False) + "\n" for problem in self.problems]
        write_text(path, "".join(lines))


def check(
    inputs: Sequence[str],
    engine: Engine,
    report: Callable[[str, int, int], None] = lambda what, done, of: None,
    image_root: str | None = None,
) -> Report:
    """Check that every record decodes, and matches the index where a shard has one beside it.

    Images that a table names lie below its folder, or below `image_root`.

    Raises:
        DataError: The inputs are missing or empty.
    """
    import_pyarrow()
    parts = image_parts(inputs, image_root)
    tasks = [CheckTask(part, _index_of(part)) for part in parts]
    found = Report()
    keys = []
    report("checked", 0, len(tasks))
    for number, checked in enumerate(engine.run(check_part, tasks), 1):
        found.images += checked.images
        found.indexed += checked.images if tasks[number - 1].index else 0
        found.problems += checked.problems
        keys.append(checked.keys)
        report("checked", number, len(tasks))
    found.problems += _repeated_keys(parts, keys)
    indexes = {task.index.parent: task for task in tasks if task.index is not None}
    for folder in sorted(indexes):
        found.problems += _missing_shards(folder)
    return found


def _index_of(part: Part) -> Path | None:
    if not isinstance(part, TarShard) or not isinstance(part.source, Path):
        return None
    index = part.source.parent / INDEX_NAME
    return index if index.is_file() else None


def check_part(task: CheckTask) -> Checked:
    """Read and decode every record of a part."""
    known: dict[str, Row] = {}
    problems: list[Problem] = []
    images, keys = 0, []
    if task.index is not None:
        try:
            known = _index_rows(task.index, task.part.name)
        except VLVError as error:
            path = str(task.index)
            problems.append(Problem(DAMAGED_INDEX, path, path, str(error)))
            task = CheckTask(task.part, None)
    for row in measure_part(task.part, _DECODE):
        images += row["kind"] == "span" or not row["reason"]
        if row["kind"] == "span":
            keys.append(short_hash(row["id"]))
        if row["reason"] and row["reason"] != NOT_DOWNLOADED:
            problems.append(_problem(row["reason"], row, row["detail"]))
        if task.index is not None and row["kind"] == "span":
            problems += _against_index(row, known.pop(row["id"], None))
    for key, entry in known.items():
        detail = f"{task.part}: {key} is in the index and not in the shard"
        problems.append(Problem(MISSING_RECORD, key, entry["shard"], detail))
    return Checked(images, problems, np.array(keys, np.uint64))


def _problem(kind: str, row: Row, detail: str) -> Problem:
    return Problem(kind, row["id"], shown(place_of(row)), detail)


def _against_index(row: Row, entry: Row | None) -> list[Problem]:
    name = f"{printable(os.fsdecode(row['path']))}: {row['id']}"
    if entry is None:
        return [_problem(NOT_IN_INDEX, row, f"{name} is in the shard and not in the index")]
    if (entry["offset"], entry["size"]) != (row["first"], row["second"]):
        detail = f"{name} lies at byte {row['first']}, the index says {entry['offset']}"
        return [_problem(WRONG_HASH, row, detail)]
    if row.get("sha256") and row["sha256"] != entry["sha256"]:
        detail = f"{name} has other bytes than the index says (sha256 {row['sha256'][:12]}...)"
        return [_problem(WRONG_HASH, row, detail)]
    return []


def _index_rows(index: Path, shard: str) -> dict[str, Row]:
    """The rows of one shard by key; the index has one row group for each shard."""
    _, parquet = import_pyarrow()
    try:
        file = parquet.ParquetFile(index)
        if not set(INDEX) <= set(file.schema_arrow.names):
            raise DataError(f"{index}: this is no index of vlv; move it away from the shards")
        place = file.schema_arrow.names.index("shard")
        rows: dict[str, Row] = {}
        for group in range(file.num_row_groups):
            statistics = file.metadata.row_group(group).column(place).statistics
            if statistics is not None and not statistics.min <= shard <= statistics.max:
                continue
            table = file.read_row_group(group, ["key", "shard", "offset", "size", "sha256"])
            rows |= {row["key"]: row for row in table.to_pylist() if row["shard"] == shard}
    except (OSError, ValueError) as error:
        raise DataError(f"{index}: cannot be read ({error})") from error
    return rows


def _missing_shards(folder: Path) -> list[Problem]:
    """Shards that an index names and that are not there."""
    names: set[str] = set()
    try:
        for rows in read_groups(folder / INDEX_NAME, ["shard"]):
            names |= {row["shard"] for row in rows}
    except VLVError:
        return []  # named with each of its shards
    return [
        Problem(
            MISSING_SHARD,
            name,
            str(folder / name),
            f"{folder / name} is in the index and not there",
        )
        for name in sorted(names)
        if not (folder / name).exists()
    ]


def _repeated_keys(parts: Sequence[Part], keys: Sequence[NDArray[np.uint64]]) -> list[Problem]:
    """Keys that occur in several shards of one folder, where a reader could not tell them apart."""
    folders: dict[str, list[int]] = {}
    for number, part in enumerate(parts):
        if isinstance(part, TarShard):
            folders.setdefault(str(part).rpartition("/")[0], []).append(number)
    problems = []
    for numbers in folders.values():
        values, counts = np.unique(np.concatenate([keys[n] for n in numbers]), return_counts=True)
        repeated = values[counts > 1]
        first: dict[str, Part] = {}
        for number in numbers:
            if not np.isin(keys[number], repeated).any():
                continue
            for entry in parts[number].entries("images"):
                if not isinstance(entry, Record) or short_hash(entry.id) not in repeated:
                    continue
                if entry.id in first:
                    detail = f"the key {entry.id} is in {first[entry.id]} and in {parts[number]}"
                    place = shown(entry.source)
                    problems.append(Problem(DUPLICATE_KEY, entry.id, place, detail))
                first.setdefault(entry.id, parts[number])
    return problems
