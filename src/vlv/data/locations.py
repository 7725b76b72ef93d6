"""Where data lie: local files, remote ones by URL (through fsspec), and what a command prints (`pipe:`)."""

from __future__ import annotations

import glob
import io
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

from vlv.data.foreign import decode_text, open_regular, read_file
from vlv.errors import DataError

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SUFFIX = re.compile(r"\.(tar|parquet)\b")
_PIPE = "pipe:"
_BUFFER_BYTES = 2**20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Url:
    """A remote file, or the output of a command; it is only opened when it is read."""

    text: str

    def __str__(self) -> str:
        return self.text

    def as_posix(self) -> str:
        """The URL."""
        return self.text

    @property
    def is_command(self) -> bool:
        """Whether this is the output of a command, which can be read once from the beginning to the end."""
        return self.text.startswith(_PIPE)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.text.partition("?")[0].rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """`.tar` or `.parquet`; empty for another type. A command that names neither writes a tar."""
        if self.is_command:
            found = _SUFFIX.findall(self.text)
            return f".{found[-1]}" if found else ".tar"
        return Path(self.name).suffix.lower()

    def open(self) -> BinaryIO:
        """Open for reading from beginning to end; what goes wrong then is an OSError, whatever the protocol.

        Raises:
            DataError: fsspec, or what it needs for this protocol, is not installed.
            OSError: The file cannot be opened.
        """
        raw = _Command(self.text) if self.is_command else _Remote(_open_url(self.text))
        return io.BufferedReader(raw, _BUFFER_BYTES)


Location = Path | Url


def open_location(location: Location) -> BinaryIO:
    """Open a file, URL or command, to be read from beginning to end.

    Raises:
        DataError: As `Url.open`.
        OSError: It cannot be opened, or is no regular file.
    """
    if isinstance(location, Url):
        return location.open()
    return io.BufferedReader(open_regular(location))


def open_seekable(location: Location) -> BinaryIO:
    """As `open_location`, with random access: what a command prints, or a server sends in one piece, is copied first.

    The last copies are kept in temporary files, so that an image can be read without running the command again.
    """
    if (copy := _copies.get(location)) is not None:
        return copy.open("rb")
    if isinstance(location, Url):
        if not location.is_command:
            file = location.open()
            if file.seekable():
                return file
            file.close()
        return Path(_copied(location).name).open("rb")
    return open_location(location)


@contextmanager
def copied(location: Location | str) -> Iterator[None]:
    """Within the block, a remote file is read from a copy on this machine, which is fetched once and removed then.

    An image at a time, a store would be asked for each, and would send more than was asked for.

    Raises:
        DataError: As `Url.open`.
    """
    if not isinstance(location, Url) or location.is_command or location in _copies:
        yield
        return
    with tempfile.NamedTemporaryFile(prefix="vlv-") as copy:
        try:
            with location.open() as source:
                shutil.copyfileobj(source, copy, _BUFFER_BYTES)
        except OSError:  # whoever reads it is told
            yield
            return
        copy.flush()
        _copies[location] = Path(copy.name)
        try:
            yield
        finally:
            del _copies[location]


_copies: dict[Location, Path] = {}


@lru_cache(maxsize=2)
def _copied(url: Url) -> tempfile._TemporaryFileWrapper[bytes]:
    copy = tempfile.NamedTemporaryFile(prefix="vlv-")  # noqa: SIM115 -- removed when it leaves the cache
    try:
        with url.open() as source:
            shutil.copyfileobj(source, copy)
        copy.flush()
    except BaseException:
        copy.close()
        raise
    return copy


def is_remote(text: str) -> bool:
    """Whether an input is a URL or a command."""
    return text.startswith(_PIPE) or "://" in text


def expand_lists(text: str) -> Iterator[str]:
    """The inputs that an input stands for: the lines of `@FILE`, each with its braces expanded.

    Raises:
        DataError: The list cannot be read or is empty.
    """
    if not text.startswith("@"):
        yield from [text] if Path(text).exists() else expand_braces(text)
        return
    path = Path(text[1:])
    try:
        lines = decode_text(read_file(path), path).split("\n")
    except DataError as error:
        reason = str(error).rpartition(": ")[2]
        raise DataError(f"{path}: the list of inputs cannot be read ({reason})") from error
    inputs = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not inputs:
        raise DataError(f"{path}: the list names no input")
    for line in inputs:
        yield from expand_lists(line)


def expand_braces(text: str) -> Iterator[str]:
    """`shard-{00000..00003}.tar` as four names."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        middle = str(number).zfill(len(first))
        yield from expand_braces(text[: found.start()] + middle + text[found.end() :])


def expand_url(text: str) -> Iterator[Url]:
    """A URL, or with `*` those that match it where its protocol can list files.

    Raises:
        DataError: It matches nothing, or is neither .tar nor .parquet.
    """
    if not text.startswith((_PIPE, "http://", "https://")) and glob.has_magic(text):
        urls = [Url(found) for found in _glob_url(text)]
        if not urls:
            raise DataError(f"{text}: matches nothing")
    else:
        urls = [Url(text)]
    for url in urls:
        if url.suffix not in (".tar", ".parquet"):
            raise DataError(f"{url}: a remote input must be a .tar shard or a .parquet file")
        yield url


def _open_url(text: str) -> IO[bytes]:
    return _fsspec(text, lambda fsspec: cast("IO[bytes]", fsspec.open(text, "rb").open()))


def _glob_url(text: str) -> list[str]:
    def find(fsspec: Any) -> list[str]:
        system, path = fsspec.core.url_to_fs(text)
        return sorted(system.unstrip_protocol(name) for name in system.glob(path))

    return _fsspec(text, find)


def _fsspec(text: str, action: Callable[[Any], T]) -> T:
    try:
        import fsspec
    except ImportError as error:
        raise DataError(f"{text}: URLs need fsspec; pip install 'vlv[data]'") from error
    try:
        return action(fsspec)
    except ImportError as error:
        raise DataError(f"{text}: fsspec needs another package for it ({error})") from error
    except OSError:
        raise
    except Exception as error:  # every protocol has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Remote(io.RawIOBase):
    """A file of fsspec whose errors are all OSError."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except OSError:
            raise
        except Exception as error:  # every protocol has errors of its own
            raise OSError(f"{type(error).__name__}: {error}") from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Command(io.RawIOBase):
    """What a command of the shell prints; at its end a failure is an OSError."""

    def __init__(self, text: str) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", text.removeprefix(_PIPE)], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._output.read(len(buffer))
        buffer[: len(data)] = data
        if len(data) < len(buffer) and (code := self._process.wait()):
            raise OSError(f"the command ended with exit code {code}")
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._output.close()
            self._process.terminate()
            self._process.wait()
        super().close()
