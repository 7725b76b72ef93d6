"""Rendered scenes that an experiment takes as they come from the toy world, without a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlv.jobs.table import GrowingTable, Row
from vlv.models.arguments import MAX_SEED, whole_number
from vlv.toyworld.scene import MOST_SCENES, Scene, Split, sample_scene


@dataclass(frozen=True, slots=True)
class ScenePlan:
    """Which scenes, and how many are worked on together.

    Raises:
        ConfigError: A number is out of its range.
    """

    split: Split = "test"
    num: int = 2000
    seed: int = 1
    batch_size: int = 8

    def __post_init__(self) -> None:
        whole_number("num", self.num, 1, MOST_SCENES)
        whole_number("seed", self.seed, 0, MAX_SEED)
        whole_number("batch_size", self.batch_size, 1)

    def scene(self, index: int) -> Scene:
        """One of them."""
        return sample_scene(self.seed, index, self.split)

    def collect(
        self,
        file: Path,
        about: Mapping[str, Any],
        make: Callable[[Sequence[int]], Iterable[Row]],
        report: Callable[[int], None],
    ) -> list[Row]:
        """A row of each scene; those that the file holds are kept, the others are made and added.

        Args:
            file: A JSONL file, which may not exist yet, or may hold more or fewer scenes.
            about: What the rows depend on beside `index`; another file is refused.
            make: From the indices of a batch to its rows, each with its `index`.
            report: Receives how many scenes are done.

        Returns:
            Rows in order of the scenes.

        Raises:
            DataError: The file was made otherwise.
        """
        table = GrowingTable(file, {}, dict(about), "skip", ("index",))
        with table.filling():
            todo = [index for index in range(self.num) if (index,) not in table]
            report(self.num - len(todo))
            for start in range(0, len(todo), self.batch_size):
                rows = list(make(todo[start : start + self.batch_size]))
                table.append(rows)
                report(len(rows))
            found = [table.get((index,)) for index in range(self.num)]
        return [row for row in found if row is not None]
