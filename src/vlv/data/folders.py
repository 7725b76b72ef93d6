"""Listing folders: names alone, which is quick with a hundred thousand files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vlv.data.foreign import printable
from vlv.data.images import IMAGE_SUFFIXES
from vlv.errors import DataError


def image_names(folder: Path, recursive: bool = True) -> list[str]:
    """Names of the image files below a folder, relative to it, in the order in which `Source` lists them; nothing is opened.

    Raises:
        DataError: It is no folder, or cannot be listed.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)}: there is no such folder")
    skip = len(os.path.join(folder, ""))  # noqa: PTH118 -- fast
    return [
        f"{top}/{name}"[skip:]
        for top, name in walk(folder, recursive)
        if not name.lower().endswith(".tar")
    ]


def walk(folder: Path, recursive: bool) -> Iterator[tuple[str, str]]:
    """Images and tar shards below a folder, in sorted order: the folder of each, and its name."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from error

    wanted = IMAGE_SUFFIXES | {".tar"}
    for top, folders, names in os.walk(str(folder), onerror=fail):
        shown = sorted(name for name in folders if not name.startswith("."))
        folders[:] = shown if recursive else []
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in wanted:  # noqa: PTH122 -- fast
                yield top, name
