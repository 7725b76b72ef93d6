"""What the inputs consist of: a list of chunks that can be worked on apart, in the order of the inputs.

Only names, sizes and footers are read here, so that the list of 40 million images in shards takes
seconds. What lies in a chunk is read by `vlv.curation.items`.
"""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlv.curation import hf
from vlv.curation.items import PATH_FIELDS, bytes_column
from vlv.curation.places import open_parquet
from vlv.data.images import IMAGE_SUFFIXES
from vlv.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RECORDS = 1000
"""Records of a chunk, where its size can be chosen; a tar is always one chunk."""

READABLE = "images, folders, .tar, .parquet, .jsonl, saved Hugging Face datasets and hf:OWNER/NAME"
TABLES = frozenset({".jsonl", ".parquet"})

Kind = Literal["files", "tar", "parquet", "jsonl", "dataset", "unreadable"]


@dataclass(frozen=True)
class Chunk:
    """A part of the inputs.

    Attributes:
        kind: What it is.
        path: The folder of files; the tar, table or dataset.
        start: First row group, byte, or row.
        stop: The one after the last.
        names: Of files: their paths relative to `path`.
        table: Parquet that img2dataset has put beside its shard; None where there is none.
        size: Bytes of the file or files.
        problem: Of an unreadable file: what is wrong with it.
    """

    kind: Kind
    path: str
    start: int = 0
    stop: int = 0
    names: tuple[str, ...] = ()
    table: str | None = None
    size: int = 0
    problem: str = ""


def find_chunks(
    inputs: Sequence[str | os.PathLike[str]], *, need_images: bool = True
) -> list[Chunk]:
    """List the chunks of files, folders, globs, tar shards, tables and datasets.

    A folder gives its images and tar shards at any depth; where it has neither, its tables. A
    Parquet file beside a shard of img2dataset belongs to the shard. A file that cannot be opened
    becomes a chunk of its own, so that it is named in the results.

    Args:
        inputs: What to read.
        need_images: Whether a table without images is refused.

    Raises:
        DataError: No input, or one that is missing, empty or of a type that vlv does not read.
    """
    if not inputs:
        raise DataError(f"no input was given; vlv data reads {READABLE}")
    chunks = [chunk for text in inputs for chunk in _chunks_of(os.fspath(text))]
    for path in dict.fromkeys(chunk.path for chunk in chunks if chunk.kind == "parquet"):
        if need_images and not _names_images(path):
            raise DataError(
                f"{path}: no column holds or names images; filter a table of addresses with --table, "
                "and fetch the images with img2dataset"
            )
    return chunks


def _names_images(path: str) -> bool:
    schema = open_parquet(path).schema_arrow
    return bytes_column(schema) is not None or not set(PATH_FIELDS).isdisjoint(schema.names)


def fingerprint(chunks: Sequence[Chunk]) -> str:
    """A hash of names and sizes: the same inputs give the same."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(repr(asdict(chunk)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _chunks_of(text: str) -> Iterator[Chunk]:
    if hf.is_hub_set(text):
        yield from _dataset(text)
        return
    path = Path(text)
    if not path.exists() and glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - absolute patterns too
        readable = [
            name for name in matches if Path(name).is_dir() or _is_readable(Path(name).name)
        ]
        if not readable:
            raise DataError(f"{text}: matches nothing that vlv data reads: {READABLE}")
        yield from _several(readable)
    elif not path.exists():
        raise DataError(f"{text}: there is no such file or folder")
    elif path.is_dir():
        yield from _folder(path)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield _files(path.parent, [path.name])
    elif path.suffix.lower() in TABLES | {".tar"}:
        yield from _file(path)
    else:
        raise DataError(f"{text}: vlv data does not read this type of file; it reads {READABLE}")


def _is_readable(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES | TABLES | {".tar"}


def _several(names: Sequence[str]) -> Iterator[Chunk]:
    """The matches of a pattern; loose images of one folder come together."""
    images: list[Path] = []
    for path in map(Path, names):
        is_image = path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
        if images and (not is_image or path.parent != images[0].parent or len(images) == RECORDS):
            yield _files(images[0].parent, [image.name for image in images])
            images = []
        if is_image:
            images.append(path)
        else:
            yield from _chunks_of(str(path))
    if images:
        yield _files(images[0].parent, [image.name for image in images])


def _folder(folder: Path) -> Iterator[Chunk]:
    if hf.is_saved_set(folder):
        yield from _dataset(str(folder))
        return
    empty = True
    for chunk in _walk(folder):
        empty = False
        yield chunk
    if empty:
        for path in sorted(path for path in folder.rglob("*") if _is_table(path, folder)):
            empty = False
            yield from _file(path)
    if empty:
        raise DataError(f"{folder}: the folder holds nothing that vlv data reads: {READABLE}")


def _is_table(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in TABLES and not hidden


def _walk(folder: Path) -> Iterator[Chunk]:
    """Images and tar shards in sorted order; a folder of img2dataset is one chunk, as a tar is."""
    for (is_tar, table), group in groupby(_files_below(folder), _family):
        paths = list(group)
        if is_tar:
            yield from map(_tar, paths)
            continue
        names = [path.relative_to(folder).as_posix() for path in paths]
        at_once = RECORDS if table is None else len(names)
        for start in range(0, len(names), at_once):
            yield _files(folder, names[start : start + at_once], table)


def _files_below(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    for top, folders, files in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES | {".tar"}:
                yield Path(top, name)


def _family(path: Path) -> tuple[bool, str | None]:
    """Whether it is a tar; of an image: the table beside its folder."""
    is_tar = path.suffix.lower() == ".tar"
    return is_tar, None if is_tar else _table_beside(path.parent)


def _files(folder: Path, names: Sequence[str], table: str | None = None) -> Chunk:
    size = sum((folder / name).stat().st_size for name in names if (folder / name).exists())
    return Chunk("files", str(folder), names=tuple(names), table=table, size=size)


def _tar(path: Path) -> Chunk:
    return Chunk("tar", str(path), table=_table_beside(path), size=path.stat().st_size)


def _table_beside(path: Path) -> str | None:
    """The Parquet that img2dataset writes for a shard: 00007.parquet for 00007.tar, or the folder 00007."""
    table = path.with_name(f"{path.name.removesuffix('.tar')}.parquet")
    return str(table) if table.is_file() else None


def _file(path: Path) -> Iterator[Chunk]:
    try:
        match path.suffix.lower():
            case ".tar":
                yield _tar(path)
            case ".parquet":
                yield from list(_parquet(path))
            case _:
                yield from list(_jsonl(path))
    except (DataError, OSError) as error:
        yield Chunk("unreadable", str(path), problem=str(error))


def _parquet(path: Path) -> Iterator[Chunk]:
    metadata = open_parquet(path).metadata
    size = path.stat().st_size
    start = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= RECORDS or group == metadata.num_row_groups - 1:
            yield Chunk("parquet", str(path), start, group + 1, size=size)
            start, rows = group + 1, 0


def _jsonl(path: Path) -> Iterator[Chunk]:
    """Cut between lines, at bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = stop = 0
        for number, line in enumerate(file, 1):
            stop += len(line)
            if number % RECORDS == 0:
                yield Chunk("jsonl", str(path), start, stop, size=size)
                start = stop
    if stop > start:
        yield Chunk("jsonl", str(path), start, stop, size=size)


def _dataset(name: str) -> Iterator[Chunk]:
    for part, rows in hf.parts(name):
        for start in range(0, rows, RECORDS):
            yield Chunk("dataset", part, start, min(start + RECORDS, rows))
