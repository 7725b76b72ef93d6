"""The tables of a run in the toy world, as claims and columns by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import DataSet, Sample
from vlv.evaluation.experiments.viewing import (
    IMAGE_KEY,
    ORIGINAL,
    Features,
    captions_of,
    table_name,
)
from vlv.evaluation.metrics import claims as count
from vlv.evaluation.metrics.claims import Counts
from vlv.jobs.table import Row
from vlv.storage import Json
from vlv.toyworld.language import Claims, parse
from vlv.toyworld.scene import Scene

TEST: Final = "test"
COMPOSITION: Final = "composition"
JUDGE_NAME = "inspector"

Columns = dict[str, Sequence[float]]
"""Counts by sample id."""


def split_samples(run: Run, split: str) -> list[Sample]:
    """The samples of a split that a run looks at; those of `composition` come beside its own."""
    if split == TEST:
        return run.data.samples()
    num = run.settings["composition"]
    return DataSet(COMPOSITION, run.data.seed, num).samples() if num else []


@dataclass(frozen=True)
class Stated:
    """Claims about every sample: what its caption states, or what the inspector sees in an image of it."""

    ids: tuple[str, ...]
    scenes: tuple[Scene, ...]
    claims: tuple[Claims, ...]
    places: tuple[Sequence[count.Place], ...] = ()
    """Of the objects, where the inspector has seen them."""

    @cached_property
    def counts(self) -> Counts:
        """Claims stated, true and correct, by sample and fact."""
        return count.claim_counts(self.claims, self.scenes)

    def columns(self, counts: Counts) -> Columns:
        """Counts by sample id."""
        return dict(zip(self.ids, counts.tolist(), strict=True))

    @property
    def recall(self) -> Columns:
        """(correct, true) claims."""
        return self.columns(count.recall_columns(self.counts))

    @property
    def precision(self) -> Columns:
        """(correct, stated) claims."""
        return self.columns(count.precision_columns(self.counts))

    @property
    def all_claims(self) -> Columns:
        """(stated, true, correct) claims."""
        return self.columns(self.counts.sum(1))

    @property
    def objects(self) -> Columns:
        """(right, there or seen, columns rightly empty or taken, columns)."""
        return self.columns(count.object_counts(self.claims, self.scenes))

    @property
    def pairs(self) -> Columns:
        """(claimed, there) objects of a shape and colour that never occur together in training."""
        return self.columns(count.unseen_pairs(self.claims, self.scenes))

    @property
    def errors(self) -> Columns:
        """(|dx|, |dy|, objects found)."""
        return self.columns(count.place_errors(self.claims, self.places, self.scenes))


def joined(*tables: Columns) -> Columns:
    """The columns of several tables side by side, of the samples that all have."""
    first, *others = tables
    shared = [id for id in first if all(id in other for other in others)]
    return {id: [value for table in tables for value in table[id]] for id in shared}


def part(columns: Columns, *places: int) -> Columns:
    """Some of the columns."""
    return {id: [row[place] for place in places] for id, row in columns.items()}


class Tables:
    """The tables of a run, each read once."""

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed, self.settings = run, seed, run.settings
        self.samples = {split: split_samples(run, split) for split in (TEST, COMPOSITION)}
        self.guidance = float(self.settings["guidances"][0])

    @staticmethod
    def reference_path(run: Run, name: str = JUDGE_NAME) -> Path:
        """File of the features of further renders."""
        return run.folder / "features" / name / "reference.npy"

    @cached_property
    def _seen(self) -> dict[str, dict[str, Row]]:
        by_source: dict[str, dict[str, Row]] = {}
        for row in self.run.rows(f"judgements/{JUDGE_NAME}", IMAGE_KEY):
            by_source.setdefault(row["source"], {})[row["id"]] = row
        return by_source

    def has(self, source: str) -> bool:
        """Whether images of a source were looked at."""
        return source in self._seen

    def seen(self, source: str, split: str = TEST) -> Stated:
        """What the inspector sees in the images of a source."""
        rows = self._seen.get(source, {})
        samples = [s for s in self.samples[split] if s.id in rows]
        found = [rows[sample.id] for sample in samples]
        return Stated(
            tuple(sample.id for sample in samples),
            tuple(sample.known_scene for sample in samples),
            tuple(Claims(row["scene"], tuple(row["objects"])) for row in found),
            tuple(row["boxes"] for row in found),
        )

    def captions(self, source: str) -> dict[str, Row]:
        """The captions of a source."""
        return captions_of(self.run, source)

    def written(self, source: str, split: str = TEST) -> Stated:
        """What the captions of a source state."""
        rows = self.captions(source)
        samples = [sample for sample in self.samples[split] if sample.id in rows]
        return Stated(
            tuple(sample.id for sample in samples),
            tuple(sample.known_scene for sample in samples),
            tuple(parse(rows[sample.id]["caption"]) for sample in samples),
        )

    def truncated(self, source: str) -> Columns:
        """Whether the text tower cut the text of an image."""
        rows = self.run.rows(table_name(source, self.guidance), IMAGE_KEY)
        found = {row["id"]: float(row["truncated"]) for row in rows if "truncated" in row}
        return {s.id: [found[s.id]] for s in self.samples[TEST] if s.id in found}

    def measured(self, name: str) -> Json:
        """What was measured of the model on every scene."""
        rows = {row["id"]: row for row in self.run.rows(f"measured/{name}", ("id",))}
        (column,) = {key for row in rows.values() for key in row if key != "id"}
        return {s.id: rows[s.id][column] for s in self.samples[TEST] if s.id in rows}

    def features(self, source: str) -> NDArray[np.float32]:
        """Features of the images of the split `test`, (N, W)."""
        total = sum(map(len, self.samples.values()))
        guidance = 0.0 if source == ORIGINAL else self.guidance
        features = Features(self.run, JUDGE_NAME, total).read(source, guidance)
        return features[: len(self.samples[TEST])]
