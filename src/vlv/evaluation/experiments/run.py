"""A run of an experiment: a folder whose tables are filled step by step, and never made twice.

```
RUN/run.json               which experiment, data and settings
RUN/captions.jsonl ...     what was predicted, one row per sample and source
RUN/images/                images that were generated
RUN/judgements/NAME.jsonl  what the judge of that name says, one row per thing judged
RUN/features/              features of the images, for the distances
RUN/scores.jsonl           one row per sample: what every figure is computed from
RUN/result.json            the figures
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vlv.endpoint import split_spec
from vlv.errors import ConfigError, DataError, OutputError
from vlv.evaluation.experiments.samples import DataSet, Sample
from vlv.jobs.formats import read_rows
from vlv.jobs.table import GrowingTable, Row
from vlv.jobs.tally import Tally
from vlv.storage import check_settings, plain, write_json
from vlv.training.journal import versions

if TYPE_CHECKING:
    from vlv.evaluation.experiments.backends import Backends
    from vlv.evaluation.experiments.scoring import Scores
    from vlv.evaluation.metrics.features import Resize

T = TypeVar("T")
Settings = dict[str, Any]
"""What rows depend on, as JSON values."""
Key = tuple[Any, ...]
"""The values of the columns that tell the rows of a table apart."""
Emit = Callable[[Sequence[Row]], None]
"""Receives rows that are finished."""
Report = Callable[[Sequence[Row]], None]
"""Receives rows that are on disk."""


def silent(rows: Sequence[Row]) -> None:
    """A `Report` that shows nothing."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: Where.
        experiment: Its name.
        data: What it looks at.
        settings: What its predictions depend on beside the data, as JSON values.
    """

    folder: Path
    experiment: str
    data: DataSet
    settings: Settings = field(default_factory=dict)

    @classmethod
    def start(cls, folder: Path, experiment: str, data: DataSet, settings: Settings) -> Run:
        """Make the folder, or go on with the one that was made with the same settings.

        Raises:
            OutputError: The folder holds another run, or cannot be written.
        """
        run = cls(folder, experiment, data, plain(settings))
        path = folder / "run.json"
        if path.exists():
            old = cls.open(folder)._identity()
            check_settings(folder, old, run._identity(), mend="name another folder")
        else:
            write_json(path, {**run._identity(), "versions": versions()})
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """A run that was started before.

        Raises:
            DataError: The folder holds none.
        """
        path = folder / "run.json"
        if not path.is_file():
            raise DataError(
                f"{folder} is no run of an experiment (there is no run.json); begin one with vlv eval predict"
            )
        try:
            content = json.loads(path.read_text("utf-8"))
            data = content["data"]
            return cls(
                folder,
                content["experiment"],
                DataSet(**{**data, "inputs": tuple(data["inputs"])}),
                content["settings"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); begin the run anew") from error

    def _identity(self) -> Settings:
        data = plain(asdict(self.data))
        return {"experiment": self.experiment, "data": data, "settings": self.settings}

    def check(self, *experiments: str) -> None:
        """Refuse a step that belongs to another experiment."""
        if self.experiment not in experiments:
            raise ConfigError(
                f"{self.folder} is a run of {self.experiment}, and this step is one of {' or '.join(experiments)}"
            )

    @contextmanager
    def filling(
        self, name: str, key: tuple[str, ...], settings: Settings
    ) -> Iterator[GrowingTable]:
        """A table of the run, open for the rows that it lacks.

        Raises:
            OutputError: It was filled with other settings, is damaged, or another process writes to it.
        """
        path = self.folder / f"{name}.jsonl"
        try:
            table = GrowingTable(path, {}, settings, "skip", key)
        except OutputError as error:
            text = str(error).partition("; name another file")[0]
            raise OutputError(f"{text}; give it another name, or begin a new run") from error
        with table.filling():
            yield table

    def fill(
        self,
        name: str,
        key: tuple[str, ...],
        settings: Settings,
        wanted: Iterable[Key],
        make: Callable[[list[Key], Emit], None],
        report: Report = silent,
    ) -> Tally:
        """Make the rows that a table lacks.

        Args:
            name: Of the table.
            key: Columns that tell its rows apart.
            settings: What its rows depend on.
            wanted: Keys of all rows it should have, in order.
            make: Given the keys of the missing rows, hands on rows as they are made, in any order; each has the columns of
                its key, and an ``error`` where it failed. An exception loses nothing that was handed on.
            report: Receives every batch once it is on disk.
        """
        wanted = list(wanted)
        with self.filling(name, key, settings) as table:
            missing = [key for key in wanted if key not in table]
            tally = Tally(skipped=len(wanted) - len(missing))

            def emit(rows: Sequence[Row]) -> None:
                table.append(rows)
                failed = sum(row.get("error") is not None for row in rows)
                truncated = sum(bool(row.get("truncated")) for row in rows)
                tally.failed += failed
                tally.done += len(rows) - failed
                tally.truncated += truncated
                report(rows)

            if missing:
                make(missing, emit)
        return tally

    def rows(self, name: str, key: tuple[str, ...]) -> list[Row]:
        """The rows of a table without error; none where it has not been begun."""
        return [row for row in self.all_rows(name, key) if row.get("error") is None]

    def all_rows(self, name: str, key: tuple[str, ...]) -> list[Row]:
        """The rows of a table, those that failed among them."""
        path = self.folder / f"{name}.jsonl"
        return list(read_rows(path, key=key)) if path.is_file() else []

    def table_settings(self, name: str) -> Settings:
        """What the rows of a table depend on."""
        path = self.folder / f"{name}.jsonl.settings.json"
        if not path.is_file():
            return {}
        settings: Settings = json.loads(path.read_text("utf-8"))["runs"][-1]["settings"]
        return settings

    def judges(self) -> list[str]:
        """Names of the judges whose tables are there, sorted."""
        folder = self.folder / "judgements"
        return sorted(path.name.removesuffix(".jsonl") for path in folder.glob("*.jsonl"))


@dataclass(frozen=True)
class Judge:
    """Who judges a run: ``NAME=KIND:VALUE``, and the options that belong to it.

    Attributes:
        name: Its table is ``judgements/NAME.jsonl``.
        kind: What it is.
        value: Which one: a model, a file, an address.
        resize: For Inception.
        pairs: In an arena, choose between two captions instead of rating each.
        shots: For questions, examples before each.
    """

    name: str
    kind: str
    value: str = ""
    resize: Resize = "pytorch-fid"
    pairs: bool = False
    shots: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}" if self.value else self.kind

    @classmethod
    def parse(
        cls, text: str, resize: Resize = "pytorch-fid", pairs: bool = False, shots: int = 0
    ) -> Judge:
        """Read ``NAME=KIND:VALUE``, or ``KIND:VALUE`` for a judge that is called by its kind.

        Raises:
            ConfigError: The name is none.

        >>> str(Judge.parse("fid=inception:weights.pth")), Judge.parse("pixels").name
        ('inception:weights.pth', 'pixels')
        """
        name, equals, spec = text.partition("=")
        if not equals or ":" in name:  # an equals sign further on belongs to an address
            name, spec = text.partition(":")[0], text
        if not name.replace("-", "").isalnum():
            raise ConfigError(f'"{name}" is no name for a judge; use letters, digits and hyphens')
        kind, _, value = spec.partition(":")
        if kind == "endpoint":
            split_spec(value)  # complain now, before anything is written
        return cls(name, kind, value, resize, pairs, shots)


class Experiment(Protocol):
    """Three steps over one run folder; a module of this package with these names is one."""

    NAME: str
    TITLE: str

    def predict(self, run: Run, backends: Backends, report: Report = ...) -> Tally:
        """Write captions and generate images, those that are missing."""
        ...

    def judge(self, run: Run, judge: Judge, backends: Backends, report: Report = ...) -> Tally:
        """Let one judge look at what it has not seen.

        Raises:
            ConfigError: The experiment does not know the judge.
        """
        ...

    def score(self, run: Run, seed: int) -> Scores:
        """Figures of everything that was judged."""
        ...


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Pieces of a sequence."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def by_id(samples: Sequence[Sample]) -> dict[str, Sample]:
    """Samples by id."""
    return {sample.id: sample for sample in samples}
