"""Embed many images into one safetensors file, with a JSON file that says what lies in it; resumable.

While it runs, ``FILE.parts/`` holds one safetensors file per batch, each with the ids of its rows; at the
end they are joined into ``FILE`` and removed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlv.errors import ConfigError, OutputError
from vlv.jobs.inputs import file_name, good_images, open_batches
from vlv.jobs.tally import Tally
from vlv.models.arguments import present
from vlv.models.hashing import weights_hash
from vlv.storage import replacing, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from vlv.data.records import Record
    from vlv.jobs.inputs import Opened
    from vlv.models.pipeline import VLVPipeline

OnExistingFile = Literal["skip", "overwrite", "error"]
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
    """Some embeddings and the files they belong to.

    Attributes:
        z: (N,Q,D).
        files: One dictionary per row: id, file_name, sha256.
    """

    z: Tensor
    files: list[dict[str, Any]]


class EmbedJob:
    """The embeddings that are asked for, those that are there, and the way to make the rest.

    Building it reads and checks, and writes nothing.

    Raises:
        OutputError: The output has another suffix, is there and must not be, or was made with other settings.
    """

    def __init__(
        self,
        records: Sequence[Record],
        settings: EmbedSettings,
        output: Path,
        on_existing: OnExistingFile = "skip",
    ) -> None:
        if output.suffix != ".safetensors":
            raise OutputError(f"{output} must end in .safetensors")
        if on_existing == "error" and output.exists():
            raise OutputError(f"{output} exists; name another file, or use --on-existing skip")
        self.settings, self.output, self.records = settings, output, records
        self.parts = output.with_name(output.name + ".parts")
        self._have = [] if on_existing == "overwrite" else self._read_parts()
        self._fresh = on_existing == "overwrite"
        known = {_key(file) for rows in self._have for file in rows.files}
        self.todo = [r for r in records if (r.id, file_name(r)) not in known]
        self.skipped = len(records) - len(self.todo)

    def _read_parts(self) -> list[Rows]:
        paths = sorted(self.parts.glob("*.safetensors")) if self.parts.is_dir() else []
        return [self._read(path) for path in [self.output, *paths] if path.exists()]

    def _read(self, path: Path) -> Rows:
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("vlv", "{}"))
                rows = Rows(file.get_tensor("z"), header.get("files", []))
        except (SafetensorError, OSError, ValueError) as error:
            raise OutputError(f"{path} is damaged ({error}); remove it") from error
        if header.get("settings") != vars(self.settings):
            raise OutputError(
                f"{path} was made with other settings ({header.get('settings')}, now {vars(self.settings)}); "
                "name another file, or use --on-existing overwrite"
            )
        return rows

    def run(
        self,
        load: Callable[[], VLVPipeline],
        *,
        batch_size: int = 16,
        report: Callable[[Sequence[Opened]], None] = lambda batch: None,
    ) -> Tally:
        """Embed what is missing and write the output; ``load`` is called only when something is."""
        tally = Tally(skipped=self.skipped)
        if self._fresh:
            shutil.rmtree(self.parts, ignore_errors=True)
        if not self.todo and self.output.exists() and not self._fresh and not self.parts.exists():
            return tally
        pipe = load()
        tally.restart()
        first = len(self._have)
        batches = open_batches(self.todo, batch_size, pipe.image_size, pipe.framing)
        for number, batch in enumerate(batches, first):
            self._add(number, self._embed(pipe, batch), tally)
            tally.failed += sum(item.error is not None for item in batch)
            report(batch)
        self._join(weights_hash(present(pipe.encoder, "encoder")))
        return tally

    def _embed(self, pipe: VLVPipeline, batch: Sequence[Opened]) -> Rows | None:
        images = good_images(batch)
        if not images:
            return None
        z = pipe.embed(images).to("cpu", DTYPES[self.settings.dtype])
        good = (item for item in batch if item.error is None)
        return Rows(
            z,
            [
                {"id": i.record.id, "file_name": file_name(i.record), "sha256": i.sha256}
                for i in good
            ],
        )

    def _add(self, number: int, rows: Rows | None, tally: Tally) -> None:
        if rows is None:
            return
        self._write(self.parts / f"{number:06d}.safetensors", rows)
        self._have.append(rows)
        tally.done += len(rows.files)

    def _write(self, path: Path, rows: Rows) -> None:
        header = {"settings": vars(self.settings), "files": rows.files}
        with replacing(path) as temporary:
            save_file({"z": rows.z.contiguous()}, temporary, {"vlv": json.dumps(header)})

    def _join(self, model_hash: str) -> None:
        """Write the output in the order of the inputs; rows of other inputs follow."""
        if not self._have:
            raise OutputError(
                f"none of the inputs could be embedded, so {self.output} is not written"
            )
        z = torch.cat([rows.z for rows in self._have])
        files = [file for rows in self._have for file in rows.files]
        order = self._order(files)
        rows = Rows(z[order], [files[index] for index in order])
        self._write(self.output, rows)
        about = {
            "tensor": "z",
            "shape": list(rows.z.shape),
            "dtype": self.settings.dtype,
            "model": self.settings.model,
            "revision": self.settings.revision,
            "model_hash": model_hash,
            "ids": [file["id"] for file in rows.files],
            "files": rows.files,
        }
        write_text(self.output.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
        shutil.rmtree(self.parts, ignore_errors=True)

    def _order(self, files: Sequence[dict[str, Any]]) -> list[int]:
        rank = {(r.id, file_name(r)): number for number, r in enumerate(self.records)}
        last = len(rank)
        return sorted(range(len(files)), key=lambda index: rank.get(_key(files[index]), last))


def _key(file: dict[str, Any]) -> tuple[str, str]:
    return file["id"], file["file_name"]
