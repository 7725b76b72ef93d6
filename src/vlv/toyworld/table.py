"""Rendered scenes as tensors that stay on the device: what the small pretrained parts learn from.

The nets are so small that a loader which opens files would keep a GPU waiting, and two cores busy. So the images, the
labels and a few texts of every scene are prepared once. Shapes: N scenes, B batch, V texts of a scene, L tokens, K = 3
columns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlv.data.loader import LoaderSettings, epoch_batches
from vlv.data.records import Record
from vlv.data.sampling import fingerprint
from vlv.errors import DataError, OutputError
from vlv.models.draws import mixed_seed
from vlv.progress import Progress
from vlv.storage import Json, new_array, temporary_beside
from vlv.toyworld.inspector import encode_scenes
from vlv.toyworld.scene import COLUMNS, Scene
from vlv.toyworld.writing import Write, write_several
from vlv.training.objective import Batch

LABEL = "label."
"""Before the name of a fact, the column of its labels."""
_CHUNK = 1024
_TOKENS_AT_ONCE = 20_000


def scenes_of(records: Sequence[Record]) -> list[Scene]:
    """The scenes behind rendered images."""
    return [Scene.from_dict((record.meta or {})["scene"]) for record in records]


def image_columns(records: Sequence[Record], size: int, folder: Path) -> dict[str, Tensor]:
    """Pictures and labels of a data set, made once and kept in files.

    Args:
        records: N rendered scenes.
        size: S, side of the images in pixels.
        folder: Where the files of this and other data sets lie.

    Returns:
        `pixels` uint8 (N, 3, S, S), `boxes` int16 (N, K, 4) with zeros where there is no object, and for every fact of
        the inspector and its box `label.FACT`, as `encode_scenes` makes it.

    Raises:
        OutputError: The disk refuses.
    """
    place = folder / fingerprint(f"{r.id} {r.meta_json}" for r in records)[:16]
    if not place.is_dir():
        unfinished = temporary_beside(place)
        try:
            unfinished.mkdir(parents=True)
            _write_images(records, size, unfinished)
            unfinished.rename(place)
        except (OSError, OutputError) as error:
            if not place.is_dir():  # else another process was quicker
                reason = getattr(error.__cause__ or error, "strerror", None) or error
                raise OutputError(f"{place} cannot be written ({reason})") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return {
        file.stem: torch.from_numpy(np.load(file, mmap_mode="c")) for file in place.glob("*.npy")
    }


def _write_images(records: Sequence[Record], size: int, folder: Path) -> None:
    pixels = new_array(folder / "pixels.npy", np.uint8, (len(records), 3, size, size))
    boxes = np.zeros((len(records), len(COLUMNS), 4), np.int16)
    labels: dict[str, list[Tensor]] = {}
    settings = LoaderSettings(
        batch_size=_CHUNK, image_size=size, num_workers=os.cpu_count() or 1, prefetch=1
    )
    progress = Progress(len(records), what="scenes to tensors", unit="scene")
    first = 0
    for batch in epoch_batches(list(records), settings):
        count = len(batch["ids"])
        pixels[first : first + count] = batch["pixels"].numpy()
        for row, meta in enumerate(batch["meta"], first):
            boxes[row, : len(meta["boxes"])] = meta["boxes"]
        for fact, values in encode_scenes(
            [Scene.from_dict(meta["scene"]) for meta in batch["meta"]]
        ).items():
            labels.setdefault(fact, []).append(values)
        first += count
        progress.advance(count)
    progress.close()
    pixels.flush()
    np.save(folder / "boxes.npy", boxes)
    for fact, parts in labels.items():
        np.save(folder / f"{LABEL}{fact}.npy", torch.cat(parts).numpy())


def labels_of(batch: Batch) -> dict[str, Tensor]:
    """What `encode_scenes` says of a batch."""
    return {
        name.removeprefix(LABEL): value for name, value in batch.items() if name.startswith(LABEL)
    }


# --- texts ----------------------------------------------------------------------------------------


def write_texts(
    scenes: Sequence[Scene], write: Write, variants: int, seed: int, workers: int | None = None
) -> list[str]:
    """V texts of every scene, one after the other: N V texts that depend on the seed and the scene's number alone.

    Args:
        scenes: N scenes.
        write: Called V times for each; a function of a module with few imports, so that processes can share the work.
        variants: V.
        seed: Of the texts.
        workers: Processes; by default one for every processor where there is enough to do.
    """
    starts = range(0, len(scenes), _CHUNK)
    chunks = [scenes[start : start + _CHUNK] for start in starts]
    work = partial(write_several, write, variants, seed)
    workers = workers or (os.cpu_count() or 1)
    if workers == 1 or len(chunks) < 4:
        return [text for pair in zip(chunks, starts, strict=True) for text in work(*pair)]
    with ProcessPoolExecutor(min(workers, len(chunks)), get_context("spawn")) as pool:
        return [text for texts in pool.map(work, chunks, starts) for text in texts]


def token_column(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    variants: int,
    *,
    max_length: int,
    end: str = "",
) -> Tensor:
    """Token ids of the texts of every scene, int16 (N, V, L), padded with the tokenizer's pad token.

    Args:
        tokenizer: A fast one.
        texts: N V texts.
        variants: V.
        max_length: Longer texts are cut; L is the longest length that occurs.
        end: Put behind every text.
    """
    rows: list[list[int]] = []
    for start in range(0, len(texts), _TOKENS_AT_ONCE):
        some = [text + end for text in texts[start : start + _TOKENS_AT_ONCE]]
        rows += tokenizer(some, truncation=True, max_length=max_length).input_ids
    length = max(map(len, rows))
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int16)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return torch.from_numpy(ids.reshape(-1, variants, length))


# --- batches --------------------------------------------------------------------------------------


class TableLoader:
    """Endless batches of some rows of tensors, all of which stay on one device.

    Every epoch has an order of its own, drawn from the seed; the N mod B last rows of it are left out. Of a scene's V
    texts a batch takes one, drawn likewise.

    Args:
        columns: Tensors (N, ...); they are moved to the device.
        batch_size: B.
        seed: Of the order and of the choice of texts.
        device: Where the batches are wanted.
        texts: Names of the columns (N, V, L), of which batches hold (B, L).

    Raises:
        DataError: There are fewer rows than a batch needs.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        texts: Sequence[str] = (),
    ) -> None:
        self.columns = {name: column.to(device) for name, column in columns.items()}
        self.batch_size, self.seed, self.device, self.texts = batch_size, seed, device, set(texts)
        self.num_rows = len(next(iter(self.columns.values())))
        if self.num_rows < batch_size:
            raise DataError(
                f"{self.num_rows} scenes are too few for batches of {batch_size}; render more, or lower the batch size"
            )
        self._num_batches = 0
        self._epoch = -1
        self._order = torch.empty(0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, place = divmod(self._num_batches, self.num_rows // self.batch_size)
        if epoch != self._epoch:
            self._epoch, generator = epoch, self._generator("order", epoch)
            self._order = torch.randperm(self.num_rows, generator=generator).to(self.device)
        rows = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        draws = self._generator("texts", self._num_batches)
        self._num_batches += 1
        return {
            name: column[rows, self._variants(column, draws)]
            if name in self.texts
            else column[rows]
            for name, column in self.columns.items()
        }

    def _variants(self, column: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(column.shape[1], (self.batch_size,), generator=generator)
        return chosen.to(self.device, non_blocking=True)

    def _generator(self, *what: object) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed(self.seed, *what))

    def state_dict(self) -> Json:
        """The position after the last batch, as JSON values."""
        return {"batches": self._num_batches, "rows": self.num_rows, "batch_size": self.batch_size}

    def load_state_dict(self, state: Json) -> None:
        """Go to a position.

        Raises:
            DataError: It belongs to other data.
        """
        if self.state_dict() != {**state, "batches": self._num_batches}:
            raise DataError(
                "the run was started with another number of scenes, or in other batches"
            )
        self._num_batches = int(state["batches"])

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
