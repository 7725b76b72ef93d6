"""Build an index: embed what is new, part by part, and bring the first stage up to date; resumable at any moment.

A folder holds ``index.json`` (which model, which space), ``search.safetensors`` (the space), ``parts/``, the graph of the first stage and
``state.json``. Parts are filled with the good images in the order of the inputs and embedded in whole batches, so that a build that
was killed and repeated gives the very files of one that was not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlv.errors import DataError, OutputError
from vlv.jobs.inputs import check_embeddings, embeddings, good_items, open_batches
from vlv.jobs.tally import Tally
from vlv.models.arguments import present
from vlv.models.hashing import weights_hash
from vlv.models.search_space import SPACE_NAME, Space
from vlv.progress import say
from vlv.search.engine import STATE_NAME, load_usearch, update_graph
from vlv.search.parts import Row, read_parts, rows_of_part, write_part
from vlv.search.space import plain_space
from vlv.storage import (
    Json,
    check_writable,
    lock,
    read_settings,
    remove_temporaries,
    write_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from vlv.data.records import Record
    from vlv.jobs.inputs import Opened
    from vlv.models.pipeline import VLVPipeline

ABOUT_NAME = "index.json"
FORMAT = 2


@dataclass(frozen=True)
class ModelName:
    """How the model of an index is found again.

    Attributes:
        model: Name or folder.
        revision: On the hub.
        adapter: Of its encoder.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None

    @property
    def lasting(self) -> str:
        """The name that holds in any working directory."""
        return _lasting(self.model)

    @property
    def lasting_adapter(self) -> str | None:
        """That of the adapter."""
        return None if self.adapter is None else _lasting(self.adapter)


def _lasting(name: str) -> str:
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def identity(pipe: VLVPipeline) -> Json:
    """What tells a model from others here: hashes of the encoder and of the text towers, rounded to bfloat16 in which they may be held."""
    parts = {"encoder": present(pipe.encoder, "encoder")}
    parts |= {name: present(getattr(pipe, name), name) for name in pipe.decoder.towers}
    return {name: weights_hash(part, torch.bfloat16) for name, part in parts.items()}


def read_about(folder: Path) -> Json:
    """What an index says of itself.

    Raises:
        DataError: The folder is no index, or one of another format.
    """
    about = read_settings(folder / ABOUT_NAME, mend="build the index anew in another folder")
    if about is None:
        raise DataError(
            f"{folder} is no index; make one with vlv index build INPUT --output {folder}"
        )
    if about.get("format") != FORMAT:
        raise DataError(
            f"{folder} is an index of format {about.get('format')}, this version reads {FORMAT}; build it anew in another folder"
        )
    return about


def begin_index(folder: Path, name: ModelName, pipe: VLVPipeline, space: Space) -> None:
    """Write down whose images an index will hold, and in which space.

    Raises:
        OutputError: The disk refuses.
    """
    space.save(folder / SPACE_NAME)
    about = {
        "format": FORMAT,
        "model": name.lasting,
        "revision": name.revision,
        "adapter": name.lasting_adapter,
        "weights": identity(pipe),
        "space": space.hash(),
    }
    write_json(folder / ABOUT_NAME, about)


def check_model(folder: Path, about: Json, pipe: VLVPipeline) -> None:
    """Make sure that an index was built with this model.

    Raises:
        DataError: It was built with another.
    """
    if about["weights"] != identity(pipe):
        name = pipe.config.get("_name_or_path")
        raise DataError(
            f"{folder} is an index of {about['model']}, whose weights are not those of {name}; "
            f"search it with --model {about['model']}, or build another index"
        )


class IndexJob:
    """The images that are to be in an index, those that are, and the way to add the rest.

    Building it reads and checks, and writes nothing.

    Args:
        records: Images, or caption embeddings of `vlv embed`.
        name: The model.
        folder: The index.
        space: A fitted space; None takes that of the model, or else the plain one.

    Attributes:
        todo: What will be embedded.
        skipped: How many are there already.

    Raises:
        OutputError: The folder holds something else.
        DataError: It is an index of another format.
    """

    def __init__(
        self, records: Sequence[Record], name: ModelName, folder: Path, space: Space | None = None
    ) -> None:
        load_usearch()  # complain now
        self.name, self.folder, self._space = name, folder, space
        if folder.exists() and not (folder / ABOUT_NAME).exists() and _holds_others(folder):
            raise OutputError(f"{folder} exists and is no index; name a new folder")
        self.about = read_about(folder) if (folder / ABOUT_NAME).exists() else None
        self.parts = folder / "parts"
        good, self._damaged = read_parts(self.parts)
        self._seen = [part.path.name for part in good]
        self._num_tokens = good[0].num_tokens if good else None
        known = {(row["id"], row["file_name"]) for part in good for row in part.images()}
        self.todo = [record for record in records if _key(record) not in known]
        self.skipped = len(records) - len(self.todo)

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: int = 32,
        report: Callable[[Sequence[Opened]], None] = lambda batch: None,
    ) -> Tally:
        """Add what is missing.

        Args:
            load: Loads the model; called only when something is missing, or when the index names another.
            batch_size: Images embedded together.
            report: Receives each batch of inputs, good and bad.

        Raises:
            DataError: The index is one of another model.
            OutputError: The disk refuses, or another process builds the same index.
        """
        tally = Tally(skipped=self.skipped)
        check_writable(self.folder / ABOUT_NAME)
        with lock(self.folder / ".lock", str(self.folder)):
            self._tidy()
            if self.todo or self._names_another():
                self._add(load(), batch_size, report, tally)
            good, _ = read_parts(self.parts)
            if good:
                update_graph(self.folder, good)
        return tally

    def _names_another(self) -> bool:
        names = {"model": self.name.lasting, "adapter": self.name.lasting_adapter}
        return self.about is not None and any(self.about[k] != v for k, v in names.items())

    def _tidy(self) -> None:
        """Remove what a killed build left half written, and parts that a disk has damaged: their images are embedded again."""
        remove_temporaries(self.folder)
        good, damaged = read_parts(self.parts)
        if [part.path.name for part in good] != self._seen or damaged != self._damaged:
            raise OutputError(f"another process has added to {self.folder}; give the command again")
        for path in damaged:
            say(f"note: {path} is damaged; its images are embedded again")
            path.unlink()

    def _add(
        self,
        pipe: VLVPipeline,
        batch_size: int,
        report: Callable[[Sequence[Opened]], None],
        tally: Tally,
    ) -> None:
        space = self._begin(pipe)
        check_embeddings(pipe, self.todo)
        tally.restart()
        number = self._next_number()
        rows: list[Row] = []
        most = rows_of_part(batch_size)
        for items in _good_batches(pipe, self.todo, batch_size, report, tally):
            z = self._embed(pipe, items)
            rows += _rows(pipe, space, items, z)
            tally.done += len(items)
            while len(rows) >= most:
                write_part(self.parts / f"{number:06d}.safetensors", rows[:most])
                rows, number = rows[most:], number + 1
        if rows:
            write_part(self.parts / f"{number:06d}.safetensors", rows)

    def _next_number(self) -> int:
        """Of the next part: no number is given twice, also where a part was damaged or removed."""
        state = read_settings(self.folder / STATE_NAME) or {}
        names = [*self._seen, *(path.name for path in self._damaged), *state.get("parts", [])]
        return max((int(str(name).partition(".")[0]) for name in names), default=-1) + 1

    def _embed(self, pipe: VLVPipeline, items: Sequence[Opened]) -> Tensor:
        """Caption embeddings (B, Q, D) of inputs, all of one shape."""
        for item in items:
            if item.z is not None:
                self._num_tokens = self._num_tokens or len(item.z)
                wanted = (self._num_tokens, pipe.decoder.text_width)
                if tuple(item.z.shape) != wanted:
                    raise DataError(
                        f"{item.record.name}: its embedding has the shape {tuple(item.z.shape)}, "
                        f"and those of this index have {wanted}"
                    )
        z = embeddings(pipe, items)
        self._num_tokens = z.shape[1]
        return z

    def _begin(self, pipe: VLVPipeline) -> Space:
        """The space of the index; a new one is written down with the model before any part."""
        if self.about is not None:
            check_model(self.folder, self.about, pipe)
            space = Space.load(self.folder / SPACE_NAME)
            if self._space is not None and self._space.hash() != space.hash():
                raise OutputError(
                    f"{self.folder} was built in another search space; build another index"
                )
            return space
        space = self._space or pipe.search_space or plain_space(pipe)
        if space.text_width != pipe.decoder.text_width:
            raise DataError(
                f"the search space is one for contexts of width {space.text_width}, "
                f"but those of {self.name.model} have {pipe.decoder.text_width}; fit one to this model"
            )
        begin_index(self.folder, self.name, pipe, space)
        return space


def _key(record: Record) -> tuple[str, str]:
    """By what an image is known again: its id and its name, or of an embedding the name of its image."""
    if record.is_embedding:
        return record.id, str((record.meta or {}).get("file_name") or record.name)
    return record.id, record.name


def _holds_others(folder: Path) -> bool:
    """Whether a folder without an index holds anything else than what a killed build leaves."""
    own = {".lock", SPACE_NAME}
    if not folder.is_dir():
        return True
    return any(path.name not in own and not path.name.startswith(".") for path in folder.iterdir())


def _good_batches(
    pipe: VLVPipeline,
    records: Sequence[Record],
    batch_size: int,
    report: Callable[[Sequence[Opened]], None],
    tally: Tally,
) -> Iterator[list[Opened]]:
    """The inputs that can be used, in whole batches whatever lies between them."""
    waiting: list[Opened] = []
    for batch in open_batches(records, batch_size, pipe.image_size, pipe.framing):
        tally.failed += len(batch) - len(good_items(batch))
        waiting += good_items(batch)
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            waiting = waiting[batch_size:]
        report(batch)
    if waiting:
        yield waiting


def _rows(pipe: VLVPipeline, space: Space, items: Sequence[Opened], z: Tensor) -> Iterator[Row]:
    found = space.images(pipe.context(z).sequence)
    for item, tokens, pooled in zip(items, found.tokens, found.pooled, strict=True):
        yield Row.of(item, tokens, pooled)
