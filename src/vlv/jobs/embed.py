"""Embed many images into one safetensors file, with a JSON file that says what lies in it; resumable.

While it runs, ``FILE.parts/`` holds one safetensors file per batch, each with the ids of its rows; at the
end they are joined into ``FILE`` and removed.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, BinaryIO, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlv.errors import ConfigError, OutputError
from vlv.jobs.inputs import check_embeddings, embeddings, good_items, open_batches
from vlv.jobs.tally import Tally
from vlv.models.arguments import present
from vlv.models.hashing import weights_hash
from vlv.storage import Json, check_settings, replacing, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from vlv.data.records import Record
    from vlv.jobs.inputs import Opened
    from vlv.models.pipeline import VLVPipeline

OnExistingFile = Literal["skip", "overwrite", "error"]
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # in safetensors
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EmbedSettings:
    """What the embeddings depend on, besides the images.

    Attributes:
        model: Name or folder of the model.
        revision: Its revision on the hub.
        dtype: Type of the stored numbers.
    """

    model: str
    revision: str | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Rows:
    """Some embeddings on disk.

    Attributes:
        path: Their safetensors file.
        shape: Of one of them: (Q,D).
        files: One dictionary per row: id, file_name, sha256.
    """

    path: Path
    shape: list[int]
    files: list[Json]


class EmbedJob:
    """The embeddings that are asked for, those that are there, and the way to make the rest.

    Building it reads and checks, and writes nothing.

    Attributes:
        model_hash: Hash of the encoder's weights; give it where it is known, as it takes seconds for a large model.

    Raises:
        OutputError: The output has another suffix, is there and must not be, or was made with other settings.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: EmbedSettings,
        output: Path,
        on_existing: OnExistingFile = "skip",
        *,
        model_hash: str | None = None,
    ) -> None:
        if output.suffix != ".safetensors":
            raise OutputError(f"{output} must end in .safetensors")
        if on_existing == "error" and output.exists():
            raise OutputError(f"{output} exists; name another file, or use --on-existing skip")
        self.settings, self.output, self.records = settings, output, records
        self.model_hash = model_hash
        self.parts = output.with_name(output.name + ".parts")
        self._have = [] if on_existing == "overwrite" else self._read_parts()
        self._fresh = on_existing == "overwrite"
        known = {_key(file) for rows in self._have for file in rows.files}
        self.todo = [r for r in records if (r.id, r.name) not in known]
        self.skipped = len(records) - len(self.todo)

    def _read_parts(self) -> list[Rows]:
        paths = sorted(self.parts.glob("*.safetensors")) if self.parts.is_dir() else []
        return [self._read(path) for path in [self.output, *paths] if path.exists()]

    def _read(self, path: Path) -> Rows:
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("vlv", "{}"))
                shape = file.get_slice("z").get_shape()
        except (SafetensorError, OSError, ValueError) as error:
            raise OutputError(f"{path} is damaged ({error}); remove it") from error
        mend = "name another file, or use --on-existing overwrite"
        check_settings(path, header.get("settings") or {}, vars(self.settings), mend=mend)
        return Rows(path, shape[1:], header.get("files", []))

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: int = 32,
        report: Callable[[Sequence[Opened]], None] = lambda batch: None,
    ) -> Tally:
        """Embed what is missing; ``load`` is called only when something is.

        The output is written unless it would be empty, see `is_empty`.
        """
        tally = Tally(skipped=self.skipped)
        if self._fresh:
            shutil.rmtree(self.parts, ignore_errors=True)
        if not self.todo and self.output.exists() and not self._fresh and not self.parts.exists():
            return tally
        pipe = load()
        check_embeddings(pipe, self.todo)
        tally.restart()
        first = len(self._have)
        batches = open_batches(self.todo, batch_size, pipe.image_size, pipe.framing)
        for number, batch in enumerate(batches, first):
            if items := good_items(batch):
                z = embeddings(pipe, items).to("cpu", DTYPES[self.settings.dtype])
                self._have.append(self._write_part(number, z, items))
                tally.done += len(items)
            tally.failed += sum(item.error is not None for item in batch)
            report(batch)
        if not self.is_empty:
            self.model_hash = self.model_hash or weights_hash(present(pipe.encoder, "encoder"))
            self._join(self.model_hash)
        return tally

    @property
    def is_empty(self) -> bool:
        """Whether none of the inputs could be embedded, now or before."""
        return not self._have

    def _write_part(self, number: int, z: Tensor, items: Sequence[Opened]) -> Rows:
        path = self.parts / f"{number:06d}.safetensors"
        files = [
            {"id": item.record.id, "file_name": item.record.name, "sha256": item.sha256}
            for item in items
        ]
        with replacing(path) as temporary:
            save_file({"z": z.contiguous()}, temporary, {"vlv": self._header(files)})
        return Rows(path, list(z.shape[1:]), files)

    def _header(self, files: Sequence[Json]) -> str:
        return json.dumps({"settings": vars(self.settings), "files": files})

    def _join(self, model_hash: str) -> None:
        """Write the output in the order of the inputs; rows of other inputs follow."""
        # a run that ended before its parts were removed has left the same rows in the output and in them
        rows_of = {
            _key(file): (rows, i) for rows in self._have for i, file in enumerate(rows.files)
        }
        rank = {(r.id, r.name): number for number, r in enumerate(self.records)}
        places = sorted(rows_of.values(), key=lambda x: rank.get(_key(x[0].files[x[1]]), len(rank)))
        files = [rows.files[index] for rows, index in places]
        shape = [len(files), *self._have[0].shape]
        with replacing(self.output) as temporary, temporary.open("wb") as out:
            self._write_joined(out, places, shape, files)
        about = {
            "tensor": "z",
            "shape": shape,
            "dtype": self.settings.dtype,
            "model": self.settings.model,
            "revision": self.settings.revision,
            "model_hash": model_hash,
            "ids": [file["id"] for file in files],
            "files": files,
        }
        write_json(self.output.with_suffix(".json"), about)
        shutil.rmtree(self.parts, ignore_errors=True)

    def _write_joined(
        self,
        out: BinaryIO,
        places: Sequence[tuple[Rows, int]],
        shape: Sequence[int],
        files: Sequence[Json],
    ) -> None:
        """Write a safetensors file row by row: all of them together may not fit into memory."""
        dtype = DTYPES[self.settings.dtype]
        size = math.prod(shape) * dtype.itemsize
        entry = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"vlv": self._header(files)}, "z": entry}).encode()
        header += b" " * (-len(header) % 8)
        out.write(len(header).to_bytes(8, "little") + header)
        for path, group in groupby(places, key=lambda place: place[0].path):
            with safe_open(path, "pt") as file:
                z = file.get_slice("z")
                for _, index in group:
                    row: Tensor = z[index : index + 1]
                    out.write(row.contiguous().view(torch.uint8).numpy().tobytes())


def _key(file: Json) -> tuple[str, str]:
    return file["id"], file["file_name"]
