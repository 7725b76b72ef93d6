"""The members of a tar shard by key, with everything that is wrong with the file, and nothing lost for it."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from vlv.data.tars import split_name
from vlv.errors import DataError

_BLOCK = 512

Member = tuple[int, int]
"""Offset and size in bytes."""


@dataclass
class TarContents:
    """What a tar holds.

    Attributes:
        keys: Key to suffix (lower case, without its dot) to member, in the order of the file.
        repeated: Names of members that occur again; the first counts.
        cut: Names of members whose end is missing.
        damage: What is wrong with the file, in words; empty when it is sound.
    """

    keys: dict[str, dict[str, Member]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    damage: str = ""


def list_tar(path: str | Path) -> TarContents:
    """Find every member by one pass over the headers.

    Raises:
        DataError: The file cannot be read, or is no tar.
    """
    contents = TarContents()
    try:
        with Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            length = file.seek(0, io.SEEK_END)
            try:
                for info in tar:
                    if info.isfile():
                        _add(contents, info, length)
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                file.seek(tar.offset)
                whole = file.read(_BLOCK) == bytes(_BLOCK) and not contents.cut
            except tarfile.TarError:
                whole = False
    except tarfile.TarError as error:
        raise DataError(f"{path}: this is no tar file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not whole:
        count = sum(len(parts) for parts in contents.keys.values())
        contents.damage = f"the tar is truncated or damaged after {count} members"
    return contents


def _add(contents: TarContents, info: tarfile.TarInfo, length: int) -> None:
    key, suffix = split_name(info.name)
    if not key or key.endswith("/"):
        return  # a hidden file
    if info.offset_data + info.size > length:
        contents.cut.append(info.name)
        return
    parts = contents.keys.setdefault(key, {})
    if suffix in parts:
        contents.repeated.append(info.name)
    else:
        parts[suffix] = info.offset_data, info.size
