"""The captions and images of a run, where they lie, and what instruments say of the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlv.data.images import load_image
from vlv.errors import DataError
from vlv.evaluation.experiments.instruments import Instrument, Look
from vlv.evaluation.experiments.run import Emit, Key, Report, Run, add, batches, fill
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.sources import CAPTION_KEY, Source, parse_source
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally

PICTURE_KEY = ("id", "source", "guidance")
ORIGINAL = "original"
"""Source of the originals in the tables of judgements; its guidance is 0."""


def sources_of(run: Run) -> list[Source]:
    """The sources of a run."""
    return [parse_source(f"{name}={spec}") for name, spec in run.settings["sources"].items()]


def captions_of(run: Run, source: str) -> dict[str, Row]:
    """The captions of a source by sample id."""
    return {row["id"]: row for row in run.rows(f"captions/{source}", CAPTION_KEY)}


def table_name(source: str, guidance: float) -> str:
    """The table that lists the images of a source at a guidance."""
    return f"pictures/{source}-g{guidance:g}"


def picture_path(run: Run, source: str, guidance: float, id: str) -> Path:
    """File of a generated image."""
    return run.folder / table_name(source, guidance) / f"{Path(id).with_suffix('')}.png"


def pairs(run: Run) -> list[tuple[str, float]]:
    """Every source at every guidance."""
    return [(s.name, float(g)) for s in sources_of(run) for g in run.settings["guidances"]]


def pictures_of(run: Run) -> dict[Key, Row]:
    """The rows of all images that were drawn, by their key."""
    rows = [row for pair in pairs(run) for row in run.rows(table_name(*pair), PICTURE_KEY)]
    return {tuple(row[name] for name in PICTURE_KEY): row for row in rows}


class Viewer:
    """Shows images of a run to an instrument, and keeps the features that it returns.

    Args:
        run: Whose.
        name: Of the judge.
        instrument: It looks.
        samples: All of the run.
        side: Of the generated images; originals are brought to it.
    """

    def __init__(
        self, run: Run, name: str, instrument: Instrument, samples: Sequence[Sample], side: int
    ) -> None:
        self._run, self._name, self._instrument, self._samples = run, name, instrument, samples
        self._place = {sample.id: row for row, sample in enumerate(samples)}
        self._texts = {s.name: captions_of(run, s.name) for s in sources_of(run)}
        self._features = Features(run, name, len(samples), instrument.width)
        self._side = side

    def judge(self, wanted: Sequence[Sequence[Key]], batch_size: int, report: Report) -> Tally:
        """Fill the judge's table.

        Args:
            wanted: Keys, grouped by source and guidance; those of the originals come first.
            batch_size: Images looked at together.
            report: Receives finished rows.
        """
        total = Tally()

        def make(missing: list[Key], emit: Emit) -> None:
            for batch in batches(missing, batch_size):
                emit(self._judge(batch))

        about = self._instrument.about
        with self._run.filling(f"judgements/{self._name}", PICTURE_KEY, about) as table:
            for group in wanted:
                total = add(total, fill(table, group, make, report))
        return total

    def _judge(self, batch: Sequence[Key]) -> list[Row]:
        """A row for every key."""
        rows_of = [self._samples[self._place[id]] for id, *_ in batch]
        keys, pictures, originals, bad = self._open(batch, rows_of)
        if not keys:
            return bad
        at = [self._place[id] for id, *_ in keys]
        captions = [
            self._texts.get(source, {}).get(id, {}).get("caption") for id, source, _ in keys
        ]
        look = Look(pictures, originals, [self._samples[row] for row in at], captions)
        _, source, guidance = keys[0]
        compared = source != ORIGINAL and self._instrument.width > 0
        before = self._features.read(ORIGINAL, 0.0)[at] if compared else None
        features, found = self._instrument.look(look, before)
        if features is not None:
            self._features.write(source, guidance, at, features)
        return bad + [
            {**dict(zip(PICTURE_KEY, key, strict=True)), **columns}
            for key, columns in zip(keys, found, strict=True)
        ]

    def _open(
        self, keys: Sequence[Key], samples: Sequence[Sample]
    ) -> tuple[list[Key], list[Image.Image], list[Image.Image], list[Row]]:
        """Keys whose files can be opened, with images and originals, and a row for each of the others."""
        good, pictures, originals, bad = [], [], [], []
        for key, sample in zip(keys, samples, strict=True):
            id, source, guidance = key
            try:
                original = None
                if source == ORIGINAL or self._instrument.compares_pixels:
                    original = sample.square(self._side)
                path = picture_path(self._run, source, guidance, id)
                picture = original if source == ORIGINAL else load_image(path)
            except DataError as error:
                bad.append({**dict(zip(PICTURE_KEY, key, strict=True)), "error": str(error)})
                continue
            assert picture is not None, "an original was opened"
            good.append(key)
            pictures.append(picture)
            if original is not None:
                originals.append(original)
        return good, pictures, originals, bad


class Features:
    """Features of all images of a run as files of floats, a row for each sample; they are mapped, not read.

    Args:
        run: Whose.
        judge: Name of the judge.
        num: N, samples.
        width: W; 0 keeps nothing.
    """

    def __init__(self, run: Run, judge: str, num: int, width: int) -> None:
        self._folder = run.folder / "features" / judge
        self._shape = (num, width)

    def _path(self, source: str, guidance: float) -> Path:
        return self._folder / f"{source}-g{guidance:g}.npy"

    def write(
        self, source: str, guidance: float, rows: Sequence[int], values: NDArray[np.float32]
    ) -> None:
        """Put features into their rows; they are on disk when this returns."""
        path = self._path(source, guidance)
        path.parent.mkdir(parents=True, exist_ok=True)
        mode: Literal["r+", "w+"] = "r+" if path.is_file() else "w+"
        shape = None if path.is_file() else self._shape
        file = np.lib.format.open_memmap(path, mode, dtype=np.float32, shape=shape)
        file[list(rows)] = values
        file.flush()

    def read(self, source: str, guidance: float) -> NDArray[np.float32]:
        """All rows, (N, W)."""
        path = self._path(source, guidance)
        if not path.is_file():
            raise DataError(f"there are no features {path}; judge the run again")
        return np.asarray(np.load(path, mmap_mode="r"))
