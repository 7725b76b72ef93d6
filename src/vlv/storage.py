"""Files that survive a crash: replaced atomically, appended line by line, owned by one process, with known settings.

Everything that vlv writes and may read again goes through here:

- `replacing`, `replacing_folder`, `write_text`, `write_json`: the old content or the new, never half of it.
- `new_array`: an array in a file, with room on the disk for all of it.
- `check_writable`: refuses a place before hours of work for it.
- `Journal`: JSON lines that are on disk once `append` returns, whatever happens afterwards.
- `create`: the first of several processes makes a file.
- `lock`: one process at a time.
- `check_settings`: a result goes on only with the settings it was begun with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError

from vlv.errors import OutputError, VLVError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import IO

    import numpy as np
    from numpy.typing import DTypeLike

Json = dict[str, Any]
"""A JSON object."""
TEMPORARY_SUFFIX = ".vlv-tmp"


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Force every file and folder below `folder` to the disk, the folder itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before it
        sync(path)
    sync(folder)


def temporary_beside(path: Path) -> Path:
    """A name for work in progress on the same disk as `path`; short, as `path`'s own name may be at the limit."""
    return path.with_name(f".{secrets.token_hex(6)}{TEMPORARY_SUFFIX}")


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left half written in a folder and below."""
    for path in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends well, and is removed otherwise.

    Content and name are synced to the disk. Missing parent folders are made.

    Raises:
        OutputError: The disk refuses.
    """
    temporary = temporary_beside(path)
    try:
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that takes the place of `folder` when the block ends well.

    An older `folder` is removed only after the new one has its name.

    Raises:
        OutputError: The disk refuses.
    """
    temporary, old = temporary_beside(folder), temporary_beside(folder)
    try:
        with as_output_error(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
            sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():  # the new one could not take its name
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Raise what the disk refuses within the block as an OutputError that names `path`."""
    if "\0" in str(path):
        raise OutputError(
            f"{str(path)!r} cannot be written (a file name cannot hold a NUL character)"
        )
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OutputError(f"{path} cannot be written ({reason})") from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically: UTF-8, LF line ends.

    Raises:
        OutputError: The disk refuses.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically, indented, for people to read too.

    Raises:
        OutputError: The disk refuses.
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def create(path: Path, data: bytes) -> bool:
    """Write a file that must not exist; of several processes, on one machine or many, one is told that it did.

    The others see the whole file or none, except where the disk knows no hard links: there they may see it empty.

    Raises:
        OutputError: The disk refuses.
    """
    temporary = temporary_beside(path)
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            path.hardlink_to(temporary)
        except FileExistsError:
            return False
        except OSError:  # no hard links here
            try:
                with path.open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
        finally:
            temporary.unlink(missing_ok=True)
    return True


def check_writable(*paths: Path | None) -> None:
    """Refuse files that could not be written when their content is there at last; None is passed over.

    Raises:
        OutputError: The disk refuses.
    """
    for path in paths:
        if path is None:
            continue
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISDIR(path.stat().st_mode):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            temporary = temporary_beside(path)
            temporary.touch()
            temporary.unlink()


def new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An array of zeros in a .npy file, which is written through memory.

    The disk gives it all its room now: where a page of memory finds none later, the system ends the process.

    Raises:
        OutputError: The disk refuses.
    """
    from numpy.lib.format import open_memmap  # what else needs this module does not need numpy

    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            array: np.memmap[Any, Any] = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            _take_room(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return array


def _take_room(path: Path) -> None:
    """Give every byte of a sparse file its place on the disk."""
    size = path.stat().st_size
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    elif shutil.disk_usage(path).free < size:  # some systems can only be asked
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_in_place(file: IO[bytes], path: Path) -> None:
    """Refuse to write on to an open file that is no longer found under its name: it, or its folder, was removed.

    Raises:
        OutputError: It is gone, or another file is in its place.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return
    raise OutputError(
        f"{path} was removed or replaced while it was written; the same command begins anew"
    )


@contextlib.contextmanager
def lock(
    path: Path, what: str, mend: str = "wait for it, or name another output"
) -> Iterator[None]:
    """Keep other processes out for the time of the block; the lock ends with its process, even a killed one.

    Args:
        path: The lock file, which stays.
        what: What is locked, for the message, such as the output folder.
        mend: What the user can do, the end of the sentence.

    Raises:
        OutputError: Another process holds the lock, or the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another process works in {what}; {mend}") from error
        yield


class Journal:
    """JSON lines that survive kill -9: every append is on disk when it returns.

    A last line that a crash cut short is dropped when the file is opened, without rewriting the lines before it.

    Args:
        path: The file; made if missing, with its folder.

    Raises:
        OutputError: The disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)  # nothing is left over for later
            self._file.truncate(_whole_lines(path))
            self._end = self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add one line for every row, and sync once.

        Raises:
            OutputError: The disk refuses, or another process has written to the file or removed it.
        """
        with as_output_error(self.path):
            check_in_place(self._file, self.path)
            if self._file.seek(0, os.SEEK_END) != self._end:
                raise OutputError(
                    f"another process writes to {self.path}; let only one run at a time"
                )
            try:
                rest = memoryview(b"".join(map(to_line, rows)))
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # part of the rows would be as good as none
                    self._file.truncate(self._end)
                raise
            self._end = self._file.tell()

    def close(self) -> None:
        """Close the file; nothing is lost by forgetting to."""
        with as_output_error(self.path):
            self._file.close()


def to_line(row: Mapping[str, object]) -> bytes:
    """A row as one JSON line, UTF-8."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _whole_lines(path: Path, block: int = 1 << 16) -> int:
    """Size of a file up to and with its last line end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def read_journal(path: Path) -> Iterator[Json]:
    """Yield the rows of a file of JSON lines one by one; a last line that a crash cut short is left out.

    Raises:
        OutputError: A line before the last is no JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _object(line)
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    return
                raise OutputError(
                    f"line {number} of {path} is damaged ({error}); remove it, or begin anew"
                ) from error
            yield row


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that differs: its dotted name, and both values (None where it is missing)."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name} was {_short(self.old)}, now {_short(self.new)}"


def plain(settings: Mapping[str, object]) -> Json:
    """Settings as the JSON values that reading them back gives: tuples are lists, paths are strings."""
    values: Json = json.loads(json.dumps(dict(settings), default=str))
    return values


def flat(values: Mapping[str, object], prefix: str = "") -> Json:
    """Nested settings by dotted name; an empty mapping stays a value."""
    found: Json = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(
    old: Mapping[str, object],
    new: Mapping[str, object],
    *,
    free: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> list[Difference]:
    """Settings that differ, by dotted name.

    Args:
        old: The settings that a result was begun with.
        new: The settings of now.
        free: Dotted names that may change.
        defaults: What a setting was before it existed, by dotted name; None where it is not named.
    """
    before, after, missing = flat(plain(old)), flat(plain(new)), plain(defaults or {})
    found = []
    for name in sorted((before.keys() | after.keys()) - set(free)):
        values = [side.get(name, missing.get(name)) for side in (before, after)]
        if values[0] != values[1]:
            found.append(Difference(name, *values))
    return found


def check_settings(
    what: object,
    old: Mapping[str, object],
    new: Mapping[str, object],
    *,
    mend: str = "name another output",
    free: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
    error: type[VLVError] = OutputError,
) -> None:
    """Refuse to go on with a result that was begun with other settings, naming each that differs.

    Args:
        what: The result, usually its path.
        old: The settings that it was begun with.
        new: The settings of now.
        mend: What the user can do, the end of the sentence.
        free: Dotted names that may change.
        defaults: What a setting was before it existed, see `differences`.
        error: Class of the error.

    Raises:
        VLVError: Settings differ; of class `error`.
    """
    if found := differences(old, new, free=free, defaults=defaults):
        listed = ", ".join(map(str, found))
        raise error(f"{what} was made with other settings ({listed}); {mend}")


def read_settings(path: Path, *, mend: str = "name another output") -> Json | None:
    """The JSON object that `write_json` left beside a result; None where there is none.

    Raises:
        OutputError: The file is damaged.
    """
    try:
        return _object(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror or error}); {mend}") from error
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{path} is damaged ({error}); {mend}") from error


def _object(text: bytes) -> Json:
    """Parse one JSON object; ValueError for anything else."""
    value = json.loads(text)
    if isinstance(value, dict):
        return value
    raise ValueError(f"a JSON object is expected, not {_short(value)!r}")


def _short(value: object, limit: int = 60) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} ..."
