"""People as judges: a small blind page on this machine, where each judgement is on disk as soon as it is given.

Captions come in random order without the names of their sources. In pairs the two sides are those of the order that is judged: as
every two captions come in both orders, a preference for a side shows. Nothing but this machine can reach the page.
"""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from vlv.data.foreign import decode_text, parse_object
from vlv.errors import ConfigError, DataError, VLVError
from vlv.evaluation.experiments.arena import (
    CRITERIA,
    NAME,
    PAIR_KEY,
    RATING_KEY,
    SCALE,
    TOP,
    Mode,
    wanted_pairs,
    wanted_ratings,
)
from vlv.evaluation.experiments.run import Run, by_id
from vlv.evaluation.experiments.sources import png
from vlv.evaluation.experiments.viewing import texts_of
from vlv.jobs.table import GrowingTable, Row
from vlv.pages import render
from vlv.storage import Json

MAX_BODY = 10_000
MAX_CONNECTIONS = 32
TIMEOUT = 20.0
"""Seconds that a browser may be silent; the whole exchange may take three times as long."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_HOSTS = ("127.0.0.1", "localhost")
_WINNERS = ("first", "second", "tie")


class Ballot:
    """The items that one person has not judged yet, in an order of their own.

    Args:
        run: With captions.
        table: The open table of that person's judgements.
        mode: What they judge.
        rater: Their name; it decides the order.
    """

    def __init__(self, run: Run, table: GrowingTable, mode: Mode, rater: str) -> None:
        self._table, self._mode = table, mode
        self._samples = by_id(run.data.samples())
        self._captions = texts_of(run)
        self._columns = RATING_KEY if mode == "rating" else PAIR_KEY
        keys = wanted_ratings(run) if mode == "rating" else wanted_pairs(run)
        seed = [run.data.seed, *rater.encode()]
        order = np.random.default_rng(seed).permutation(len(keys))
        self._keys = [keys[i] for i in order]
        self._lock = threading.Lock()

    def next(self) -> Json:
        """The next item for the page: no name of a source, no id."""
        with self._lock:
            left = [n for n, key in enumerate(self._keys) if key not in self._table]
            about = {"left": len(left), "total": len(self._keys), "mode": self._mode}
            if not left:
                return about
            id, *sources = self._keys[left[0]]
        picture = base64.b64encode(png(self._samples[id].load())).decode("ascii")
        texts = [self._captions[source][id] for source in sources]
        return {**about, "item": left[0], "picture": picture, "captions": texts}

    def vote(self, item: int, value: int | str | None) -> None:
        """Write down a judgement: a rating, a winner, or None for a skipped item.

        Raises:
            ValueError: There is no such item, or no such judgement.
        """
        if not 0 <= item < len(self._keys):
            raise ValueError("there is no such item")
        row: Row = dict(zip(self._columns, self._keys[item], strict=True))
        if value is None:
            row["skipped"] = True
        elif self._mode == "rating" and type(value) is int and 0 <= value <= TOP:
            row["rating"] = value
        elif self._mode == "pairs" and value in _WINNERS:
            row["winner"] = value
        else:
            raise ValueError("there is no such judgement")
        with self._lock:
            if self._keys[item] not in self._table:
                self._table.append([row])


@contextmanager
def open_ballot(run: Run, rater: str, mode: Mode) -> Iterator[tuple[Ballot, GrowingTable]]:
    """The ballot of a person, and the table of the judgements, which is whole when the block ends.

    Raises:
        ConfigError: The rater's name is none, or the run is of another experiment.
        DataError: The run has no captions.
        OutputError: Somebody else judges under that name.
    """
    if not rater.replace("-", "").isalnum():
        raise ConfigError(f'"{rater}" is no name for a rater; use letters, digits and hyphens')
    run.check(NAME)
    key = RATING_KEY if mode == "rating" else PAIR_KEY
    about = {"judge": "human", "mode": mode}
    with run.filling(f"judgements/{rater}", key, about) as table:
        yield Ballot(run, table, mode, rater), table


class RatingServer(ThreadingHTTPServer):
    """A server on loopback for one person's ballot; who is slow, or comes in too many connections, is cut off.

    Raises:
        ConfigError: The port is taken.
    """

    daemon_threads = True
    request_queue_size = 3 * MAX_CONNECTIONS  # who finds the queue full tries again seconds later

    def __init__(self, ballot: Ballot, port: int = 0) -> None:
        page = render(
            "rating.html.jinja", title="Rate descriptions", criteria=CRITERIA, scale=SCALE
        )
        self.ballot, self.page = ballot, page.encode()
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"the page cannot be served on port {port}: {error.strerror}; name another with --port"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, as long as there are not too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, within a limit of time."""
        cut = threading.Timer(3 * TIMEOUT, _cut_off, (request,))
        cut.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away, or was cut off, is no news."""

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    """The page, the next item, a vote."""

    server: RatingServer

    def setup(self) -> None:
        """Wait so long for a browser, and no longer."""
        super().setup()
        self.connection.settimeout(TIMEOUT)

    def do_GET(self) -> None:
        """The page and the next item."""
        if self._refused():
            return
        if self.path == "/":
            self._send(200, self.server.page, "text/html; charset=utf-8")
        elif self.path == "/next":
            self._guarded(self.server.ballot.next)
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        """A vote."""
        if self._refused():
            return
        length = self.headers.get("Content-Length", "")
        if (
            self.path != "/vote"
            or not (length.isascii() and length.isdigit())
            or int(length[:9]) > MAX_BODY
        ):
            self.send_error(400)
            return
        body = self.rfile.read(int(length))
        self._guarded(lambda: _vote(self.server.ballot, body))

    def _refused(self) -> bool:
        """Another page in the browser may not speak for the person: the host must be this machine."""
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        origin = self.headers.get("Origin")
        own = f"http://{self.headers.get('Host', '')}"
        if host in _HOSTS and origin in (None, own):
            return False
        self.send_error(403)
        return True

    def _guarded(self, make: Callable[[], Json]) -> None:
        try:
            content, status = make(), 200
        except (ValueError, KeyError, DataError) as error:
            content, status = {"error": str(error)}, 400
        except VLVError as error:
            content, status = {"error": str(error)}, 500
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        """Every answer, errors too, may be shown nowhere but in its own page."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _cut_off(connection: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


def _vote(ballot: Ballot, body: bytes) -> Json:
    vote = parse_object(decode_text(body, "the vote"), "the vote")
    if type(vote["item"]) is not int:
        raise ValueError("there is no such item")
    ballot.vote(vote["item"], vote["value"])
    return {"saved": True}
