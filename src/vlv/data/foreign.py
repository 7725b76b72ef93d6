"""The boundary at which foreign bytes come in: regular files only, sizes and depths limited, text that is Unicode.

Whatever is wrong with a file becomes one DataError here, so that no caller has to expect a FIFO that never answers, a
device without an end, a lone surrogate, or brackets nested a million times.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from vlv.errors import DataError
from vlv.storage import Json

MAX_TEXT_BYTES = 2**26
"""Of a text file, a line of JSON lines, or a text member of a tar."""

_MAX_DEPTH = 200
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def printable(name: str | os.PathLike[str]) -> str:
    r"""A file name as text that can be written anywhere; bytes that are no UTF-8 appear as `\xff`."""
    text = os.fspath(name)
    if text.isascii() or not _SURROGATES.search(text):
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for reading, unbuffered; a FIFO or device is refused at once, without waiting for it.

    Raises:
        OSError: It is missing, cannot be opened, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL in the name
        raise OSError(str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        return open(descriptor, "rb", buffering=0)  # noqa: PTH123 -- of a descriptor, for the caller
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        DataError: It is missing, cannot be read, or is over the limit.
    """
    data = read_at_most(path, max_bytes + 1)
    if len(data) > max_bytes:
        raise DataError(f"{printable(path)}: larger than the limit of {max_bytes} bytes")
    return data


def read_at_most(path: str | os.PathLike[str], count: int) -> bytes:
    """The first bytes of a regular file.

    Raises:
        DataError: It is missing or cannot be read.
    """
    try:
        with open_regular(path) as file:
            return read_up_to(file, count, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise unreadable(path, error) from error


def read_up_to(file: BinaryIO, count: int, expected: int = 2**20) -> bytes:
    """Up to `count` bytes of a file that may give fewer at a time; `expected` is how many there probably are."""
    parts: list[bytes] = []
    while count > 0 and (part := file.read(min(count, max(expected, 1)))):
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def unreadable(path: object, error: BaseException) -> DataError:
    """The error for a file that the system refuses."""
    name = printable(path) if isinstance(path, str | os.PathLike) else str(path)
    reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return DataError(f"{name}: cannot be read ({reason.splitlines()[0]})")


def decode_text(data: bytes, where: object) -> str:
    """Bytes as UTF-8 text, with or without a byte order mark.

    Raises:
        DataError: They are not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: the text is not UTF-8") from error


def parse_json(text: str, where: object) -> Any:
    """A JSON value from text; lone surrogates, which no file could hold, become U+FFFD.

    Raises:
        DataError: It is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise DataError(f"{where}: the JSON is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: this is not JSON ({error})") from error
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth_exceeds(value, _MAX_DEPTH):
        raise DataError(f"{where}: the JSON is nested too deeply")
    return _without_surrogates(value) if _ESCAPED_SURROGATE.search(text) else value


def parse_object(text: str, where: object) -> Json:
    """A JSON object from text.

    Raises:
        DataError: It is no JSON, or no object.
    """
    value = parse_json(text, where)
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is wanted here, not {type(value).__name__}")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inside = (inner for outer in level for inner in _values(outer))
        level = [inner for inner in inside if isinstance(inner, dict | list)]
    return bool(level)


def _values(value: Json | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(inner) for inner in value]
    if isinstance(value, dict):
        return {
            _SURROGATES.sub("\ufffd", name): _without_surrogates(inner)
            for name, inner in value.items()
        }
    return value


# Names ------------------------------------------------------------------------------------------


def shown_name(name: str) -> str:
    r"""A name as it can be shown in one line.

    >>> shown_name("a\0b")
    'a\\x00b'
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", printable(name))


def has_control(name: str) -> bool:
    """Whether a name holds NUL, a line feed, or another control character."""
    return _CONTROL.search(name) is not None


def path_below(name: str, base: Path, root: str | None, where: str) -> Path:
    """The path of a file that a table names, whose folder must lie below that of the table, or below another.

    Args:
        name: Absolute, or relative to the folder of the table.
        base: The folder of the table.
        root: Another folder that the user named; None is none.
        where: What names the file, for the error.

    Raises:
        DataError: It lies elsewhere, or is no name of a file.
    """
    path = base / name
    if has_control(name):
        raise DataError(f"{where}: the name {shown_name(name)} holds a control character")
    here = str(Path.cwd())
    folder = _real(here, str(path.parent))
    for trusted in (str(base), root) if root is not None else (str(base),):
        real = _real(here, trusted)
        if folder == real or folder.startswith(f"{real.rstrip(os.sep)}{os.sep}"):
            return path
    raise DataError(
        f"{where}: {printable(name)} lies outside the folder of its table; if it may be read, name its folder as image root"
    )


@lru_cache(maxsize=1024)
def _real(here: str, folder: str) -> str:
    """A folder without links; its own are followed, those of files below it are not looked at, as in a folder of images."""
    return os.path.realpath(os.path.join(here, folder))  # noqa: PTH118 -- Path would take out "link/.."
