"""The captions and images of a run, where they lie, and what instruments say of the images."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlv.data.images import load_image
from vlv.errors import DataError
from vlv.evaluation.experiments.instruments import Instrument, Look
from vlv.evaluation.experiments.run import Emit, Key, Report, Run, batches
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.sources import CAPTION_KEY, Source, parse_source
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally
from vlv.storage import new_array, replacing

IMAGE_KEY = ("id", "source", "guidance")
ORIGINAL = "original"
"""Source of the originals in the tables of judgements; its guidance is 0."""


def sources_of(run: Run) -> list[Source]:
    """The sources of a run."""
    return [
        parse_source(f"{name}={spec}") for name, spec in run.settings.get("sources", {}).items()
    ]


def captions_of(run: Run, source: str) -> dict[str, Row]:
    """The captions of a source by sample id."""
    return {row["id"]: row for row in run.rows(f"captions/{source}", CAPTION_KEY)}


def texts_of(run: Run) -> dict[str, dict[str, str]]:
    """By source and sample id, all captions of an experiment that reads captions.

    Raises:
        DataError: A source has none yet.
    """
    texts = {
        source.name: {id: str(row["caption"]) for id, row in captions_of(run, source.name).items()}
        for source in sources_of(run)
    }
    if empty := [name for name, captions in texts.items() if not captions]:
        raise DataError(
            f"{run.folder} has no captions of {empty[0]} yet; begin with vlv eval predict"
        )
    return texts


def table_name(source: str, guidance: float) -> str:
    """The table that lists the images of a source at a guidance."""
    return f"images/{source.replace(':', '-')}-g{guidance:g}"


def image_path(run: Run, source: str, guidance: float, id: str) -> Path:
    """File of a generated image."""
    return run.folder / table_name(source, guidance) / f"{Path(id).with_suffix('')}.png"


def pairs(run: Run) -> list[tuple[str, float]]:
    """Every source at every guidance."""
    return [(s.name, float(g)) for s in sources_of(run) for g in run.settings["guidances"]]


def image_rows(run: Run, source: str, guidance: float) -> list[Row]:
    """The rows of the images that were generated."""
    return run.rows(table_name(source, guidance), IMAGE_KEY)


@dataclass(frozen=True)
class Viewer:
    """Shows images of a run to an instrument, and keeps the features that it returns.

    Attributes:
        run: Whose.
        name: Of the judge.
        instrument: It looks.
        samples: All of the run.
        side: Of the generated images; originals are brought to it.
    """

    run: Run
    name: str
    instrument: Instrument
    samples: Sequence[Sample]
    side: int

    def judge(self, wanted: Iterable[Key], batch_size: int, report: Report) -> Tally:
        """Fill the judge's table.

        Args:
            wanted: Keys, those of a source and guidance together; those of the originals come first.
            batch_size: Images looked at together.
            report: Receives finished rows.
        """
        place = {sample.id: row for row, sample in enumerate(self.samples)}
        texts = {s.name: captions_of(self.run, s.name) for s in sources_of(self.run)}

        def make(missing: list[Key], emit: Emit) -> None:
            for (source, _), group in itertools.groupby(missing, lambda key: key[1:]):
                for batch in batches(list(group), batch_size):
                    emit(self._look(batch, place, texts.get(source, {})))

        table, about = f"judgements/{self.name}", self.instrument.about
        return self.run.fill(table, IMAGE_KEY, about, wanted, make, report)

    def _look(
        self, batch: Sequence[Key], place: dict[str, int], captions: dict[str, Row]
    ) -> list[Row]:
        """A row for every key; all are of one source and guidance."""
        features = Features(self.run, self.name, len(self.samples), self.instrument.width)
        _, source, guidance = batch[0]
        opened = [self._open(key, self.samples[place[key[0]]]) for key in batch]
        keys = [key for key, found in zip(batch, opened, strict=True) if not isinstance(found, str)]
        good = [found for found in opened if not isinstance(found, str)]
        rows: list[Row] = [
            {**dict(zip(IMAGE_KEY, key, strict=True)), "error": found}
            for key, found in zip(batch, opened, strict=True)
            if isinstance(found, str)
        ]
        if not good:
            return rows
        at = [place[id] for id, *_ in keys]
        compared = source != ORIGINAL and self.instrument.width > 0
        look = Look(
            [image for image, _ in good],
            [original for _, original in good if original is not None],
            [self.samples[row] for row in at],
            [captions.get(id, {}).get("caption") for id, *_ in keys],
            features.read(ORIGINAL, 0.0)[at] if compared else None,
        )
        values, found = self.instrument.look(look)
        if values is not None:
            features.write(source, guidance, at, values)
        columns = zip(keys, found, strict=True)
        return rows + [{**dict(zip(IMAGE_KEY, key, strict=True)), **row} for key, row in columns]

    def _open(self, key: Key, sample: Sample) -> tuple[Image.Image, Image.Image | None] | str:
        """An image, with its original where the instrument looks at that; or why there is none."""
        id, source, guidance = key
        try:
            if source == ORIGINAL:
                original = sample.square(self.side)
                return original, original
            image = load_image(image_path(self.run, source, guidance, id))
            return image, sample.square(self.side) if self.instrument.compares_pixels else None
        except DataError as error:
            return str(error)


@dataclass(frozen=True)
class Features:
    """Features of all images of a run as files of floats, a row for each sample; they are mapped, not read.

    Attributes:
        run: Whose.
        judge: Its name.
        num: N, samples.
        width: W; needed for writing.
    """

    run: Run
    judge: str
    num: int
    width: int = 0

    def _path(self, source: str, guidance: float) -> Path:
        return self.run.folder / "features" / self.judge / f"{source}-g{guidance:g}.npy"

    def write(
        self, source: str, guidance: float, rows: Sequence[int], values: NDArray[np.float32]
    ) -> None:
        """Put features into their rows; they are on disk when this returns."""
        path = self._path(source, guidance)
        if not path.is_file():
            with replacing(path) as temporary:
                new_array(temporary, np.float32, (self.num, self.width))
        file = np.lib.format.open_memmap(path, "r+")
        file[list(rows)] = values
        file.flush()

    def read(self, source: str, guidance: float) -> NDArray[np.float32]:
        """All rows, (N, W)."""
        path = self._path(source, guidance)
        if not path.is_file():
            raise DataError(f"there are no features {path}; judge the run again")
        return np.asarray(np.load(path, mmap_mode="r"))
