"""The HTTP server: a socket, and an end that finishes what runs."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

from vlv.errors import DeviceLostError
from vlv.serve.app import build_app
from vlv.serve.connection import limited
from vlv.serve.logs import json_logs
from vlv.serve.service import Service
from vlv.serve.settings import is_loopback

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from vlv.models.pipeline import VLVPipeline
    from vlv.search.index import Index
    from vlv.serve.settings import Keys, ServeSettings

_DRAIN_SECONDS = 5
"""For answers to be sent when all are computed."""
_HEADER_BYTES = 16_384


class Server(uvicorn.Server):
    """A uvicorn server for one service on one socket; refuses new requests while it ends.

    Args:
        service: What is served.
        keys: Who may ask.
        listener: Where.
    """

    def __init__(self, service: Service, keys: Keys, listener: socket.socket) -> None:
        self._service, self._listener = service, listener
        service.batcher.when_lost = self.drain
        host = listener.getsockname()[0]
        super().__init__(
            uvicorn.Config(
                build_app(service, keys, local_only=is_loopback(host)),
                http=limited(service.settings.limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=int(service.settings.limits.patience_seconds),
                timeout_graceful_shutdown=int(service.settings.timeout) + _DRAIN_SECONDS,
                h11_max_incomplete_event_size=_HEADER_BYTES,
            )
        )

    @property
    def url(self) -> str:
        """Where it is."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal to end."""
        self.drain()
        super().handle_exit(sig, frame)

    def drain(self) -> None:
        """Refuse what comes, finish what is there, and end."""
        self._service.draining = True
        self.should_exit = True

    def serve_until_signal(self) -> None:
        """Answer requests; returns after SIGTERM, SIGINT or `drain`, when all are answered."""
        self._service.batcher.start()
        try:
            with suppress(KeyboardInterrupt):  # which uvicorn raises again once all is done
                self.run([self._listener])
        finally:
            self._service.close()


def serve(
    pipe: VLVPipeline,
    settings: ServeSettings,
    keys: Keys,
    listener: socket.socket,
    index: Index | None = None,
) -> None:
    """Serve a model, and an index of it, until a signal ends it.

    Raises:
        DeviceLostError: The device failed.
    """
    service = Service(pipe, settings, index)
    with json_logs():
        Server(service, keys, listener).serve_until_signal()
    if service.batcher.is_lost:
        raise DeviceLostError(
            "the device failed, and this process cannot use it again (its log says how); start the server anew, as "
            "systemd and Docker do by themselves"
        )
