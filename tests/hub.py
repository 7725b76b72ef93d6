"""A hub on this machine: it speaks as much of the hub's API as downloads need, and can be made to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_this-is-the-secret-of-somebody"
_LARGE = 20_000  # bytes from which on a file lies in large storage
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_STORE = re.compile(r"/store/([^/]+/[^/]+)/(.+)")


@dataclass
class Repo:
    """A repository with one commit.

    Attributes:
        refuse: Status and error code that every request for a file gets.
        gone: Status and error code that every request gets.
        absent: Files that are listed and not there.
        lies: Files whose hash is announced wrong.
    """

    files: dict[str, bytes]
    licence: str | None = None
    refuse: tuple[int, str] | None = None
    gone: tuple[int, str] | None = None
    absent: set[str] = field(default_factory=set)
    lies: set[str] = field(default_factory=set)

    @property
    def commit(self) -> str:
        names = json.dumps({k: hashlib.sha256(v).hexdigest() for k, v in self.files.items()})
        return hashlib.sha1(names.encode()).hexdigest()


@dataclass
class Request:
    """One that came."""

    method: str
    path: str
    host: str
    start: int
    authorization: str | None


class Hub:
    """Repositories, what was asked for, and how the connection misbehaves.

    Attributes:
        breaks: How many more answers end early, and after how many bytes.
        pause: Seconds between pieces of 64 kB.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.breaks, self.break_after = 0, 0
        self.pause = 0.0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def sent(self, name: str) -> list[Request]:
        """Requests for the content of a file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(name)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        self.hub.requests.append(
            Request(
                self.command,
                path,
                self.headers.get("Host", ""),
                int(start[1]) if start else 0,
                self.headers.get("Authorization"),
            )
        )
        found = next((m for p in (_TREE, _API, _STORE, _FILE) if (m := p.fullmatch(path))), None)
        repo = self.hub.repos.get(found[1]) if found else None
        if found is None or repo is None:
            self._refuse(401, "RepoNotFound")  # as the hub does to strangers
        elif repo.gone:
            self._refuse(*repo.gone)
        elif found.re is _API:
            self._json(_about(found[1], repo)) if found[2] in (None, "main", repo.commit) else (
                self._refuse(404, "RevisionNotFound")
            )
        elif found.re is _TREE:
            self._json(_tree(repo))
        else:
            self._file(found[1], repo, found[found.re.groups], stored=found.re is _STORE)

    def _file(self, name: str, repo: Repo, file: str, *, stored: bool) -> None:
        content = repo.files.get(file)
        if repo.refuse and not stored:
            self._refuse(*repo.refuse)
        elif content is None or file in repo.absent:
            self._refuse(404, "EntryNotFound")
        elif len(content) >= _LARGE and not stored:  # large storage is another host
            elsewhere = self.hub.url.replace("127.0.0.1", "localhost")
            self.send_response(302)
            self._about_file(repo, content)
            self.send_header("Location", f"{elsewhere}/store/{name}/{file}?signature=of-the-link")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send(repo, content)

    def _send(self, repo: Repo, content: bytes) -> None:
        start = self.hub.requests[-1].start
        self.send_response(206 if start else 200)
        self._about_file(repo, content)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            size = len(content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = content[start:]
        if self.hub.breaks and len(rest) > self.hub.break_after:
            self.hub.breaks -= 1
            rest = rest[: self.hub.break_after]
            self.close_connection = True
        with suppress(OSError):
            for at in range(0, len(rest), 2**16):
                self.wfile.write(rest[at : at + 2**16])
                time.sleep(self.hub.pause)

    def _about_file(self, repo: Repo, content: bytes) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        for header, value in (
            ("X-Repo-Commit", repo.commit),
            ("ETag", etag),
            ("X-Linked-Etag", etag),
            ("X-Linked-Size", str(len(content))),
        ):
            self.send_header(header, value)

    def _json(self, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _hashes(repo: Repo, name: str) -> tuple[str, str]:
    """Git's hash, and SHA-256."""
    content = repo.files[name]
    wrong = b"!" if name in repo.lies else b""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content + wrong).hexdigest()
    return blob, hashlib.sha256(content + wrong).hexdigest()


def _about(name: str, repo: Repo) -> Any:
    siblings = []
    for file, content in repo.files.items():
        blob, sha = _hashes(repo, file)
        entry: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": blob}
        if len(content) >= _LARGE:
            entry["lfs"] = {"size": len(content), "sha256": sha, "pointerSize": 134}
        siblings.append(entry)
    card = {} if repo.licence is None else {"cardData": {"license": repo.licence}}
    return {"id": name, "sha": repo.commit, "siblings": siblings, "tags": [], **card}


def _tree(repo: Repo) -> Any:
    entries = []
    for file, content in repo.files.items():
        blob, sha = _hashes(repo, file)
        entry: dict[str, Any] = {"type": "file", "path": file, "size": len(content), "oid": blob}
        if len(content) >= _LARGE:
            entry["lfs"] = {"size": len(content), "oid": sha, "pointerSize": 134}
        entries.append(entry)
    return entries


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that listens."""
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def point_to(hub: Hub, patch: pytest.MonkeyPatch, home: Path) -> None:
    """Let the hub's library of this process ask a hub of ours, as somebody who is logged in, with caches below a folder."""
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
    patch.setattr(
        constants, "DOWNLOAD_CHUNK_SIZE", 2**16
    )  # what is not a whole piece is lost in a break
    patch.setenv("HF_TOKEN", TOKEN)
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        patch.delenv(name, raising=False)


def content_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder by their names in a repository."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
