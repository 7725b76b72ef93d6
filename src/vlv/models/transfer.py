"""Single files of the hub: sizes and hashes before anything is fetched, resumed and verified downloads after.

The hub's own library begins a file anew when its process ended; here it goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm

from vlv.endpoint.secrets import without_secrets
from vlv.errors import ModelFolderError
from vlv.models.hub import refusal
from vlv.storage import sync

PARTIAL = ".part"
_PATIENCE = 30.0  # seconds for the hub to answer
_BLOCK = 2**22


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit.

    Attributes:
        sha256: Of a large file; None for small ones.
        blob_id: Git's hash of a small file, or of what points to a large one.
    """

    repo: str
    commit: str
    name: str
    size: int
    sha256: str | None = None
    blob_id: str | None = None


@dataclass(frozen=True)
class Repository:
    """What the hub says of a repository at one commit.

    Attributes:
        licence: By its card; empty where it names none.
        files: By name.
    """

    name: str
    commit: str
    licence: str
    files: Mapping[str, RemoteFile]

    def names_in(self, folder: str) -> set[str]:
        """Names of the files right in a folder, "" for the top."""
        start = f"{folder}/" if folder else ""
        inside = (name.removeprefix(start) for name in self.files if name.startswith(start))
        return {name for name in inside if "/" not in name}


def look_up(repo: str, revision: str | None = None) -> Repository:
    """Ask the hub which files a repository holds, at which commit and under which licence.

    Raises:
        ModelFolderError: It cannot be had; the message says why, and what to do.
    """
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_PATIENCE)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise refusal(repo, revision, error) from error
    except httpx2.HTTPError as error:
        raise refusal(repo, revision, ConnectionError(_reason(error))) from error
    commit = info.sha or revision or "main"
    files = {
        one.rfilename: RemoteFile(
            repo,
            commit,
            one.rfilename,
            one.size or 0,
            one.lfs.sha256 if one.lfs else None,
            one.blob_id,
        )
        for one in info.siblings or ()
        if _is_inside(one.rfilename)
    }
    card = info.card_data
    licence = (card.get("license_name") or card.get("license")) if card else None
    return Repository(repo, commit, str(licence or ""), files)


def fetch(file: RemoteFile, path: Path, report: Callable[[int], None]) -> None:
    """Download a file, going on with what an earlier process left of it, and compare its hash.

    Args:
        file: At its commit.
        path: Where it goes; one that is there already is taken for it.
        report: Receives the bytes that have come since the last call.

    Raises:
        ModelFolderError: The hub refuses, the connection broke for good, the disk is full, or the hash is another.
    """
    if path.is_file():
        report(file.size)
        return
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hushed(), partial.open("ab") as out:
            if out.tell() > file.size:
                out.truncate(0)
            if out.tell() < file.size:
                _receive(file, out, report)
        if not _is_whole(file, partial):
            partial.unlink()
            raise ModelFolderError(
                f"{file.name} of {file.repo} came with other bytes than the hub announced; it was removed, so give the "
                "same command again, and if that does not help look for the fault in a proxy or mirror"
            )
        sync(partial)
        partial.replace(path)
    except HfHubHTTPError as error:
        raise refusal(file.repo, file.commit, error) from error
    except httpx2.HTTPError as error:
        raise _broken(file, _reason(error)) from error
    except OSError as error:
        if error.errno is None:  # the library's own: other bytes than there should be
            raise _broken(file, _reason(error)) from error
        raise refusal(file.repo, file.commit, error, path.parent) from error


def _receive(file: RemoteFile, out: Any, report: Callable[[int], None]) -> None:
    """Append what is missing of a file; connections that break are taken up again a few times."""
    http_get(
        hf_hub_url(file.repo, file.name, revision=file.commit),
        out,
        resume_size=out.tell(),
        headers=build_hf_headers(library_name="vlv") | {"Accept-Encoding": "identity"},
        expected_size=file.size,
        displayed_filename=file.name,
        tqdm_class=_reporting(report),
    )


def _reporting(report: Callable[[int], None]) -> type[tqdm[Any]]:
    """A bar of the hub's library that shows nothing, and passes on what it is told."""

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings | {"disable": True})
            report(int(settings.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            report(int(n or 0))
            return None

    return Bar


def _is_whole(file: RemoteFile, path: Path) -> bool:
    """Whether a file has the size and, where the hub gave one, the hash that was announced."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return _digest(path, hashlib.sha256()) == file.sha256
    if file.blob_id is None:
        return True
    header = f"blob {file.size}\0".encode()
    return _digest(path, hashlib.sha1(header, usedforsecurity=False)) == file.blob_id


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return str(digest.hexdigest())


def _broken(file: RemoteFile, reason: str) -> ModelFolderError:
    return ModelFolderError(
        f"the download of {file.name} from {file.repo} broke off ({reason[:200]}); what has come is kept, and the same "
        "command goes on from there"
    )


def _reason(error: Exception) -> str:
    return without_secrets(" ".join(str(error).split())) or type(error).__name__


def _is_inside(name: str) -> bool:
    """Whether a name stays below the folder of its repository."""
    parts = Path(name).parts
    return bool(parts) and ".." not in parts and not Path(name).is_absolute() and "\0" not in name


@contextmanager
def hushed() -> Iterator[None]:
    """Keep the hub's library from telling of each retry; what fails for good is told by us."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
