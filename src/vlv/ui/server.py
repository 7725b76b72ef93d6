"""The server of the workbench, on this machine alone."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    import socket

    from vlv.ui.workbench import Workbench


class Server(uvicorn.Server):
    """A uvicorn server for one workbench on one socket.

    Args:
        bench: What is shown.
        listener: Where.
        folder: Of images, to open at the start.
    """

    def __init__(
        self, bench: Workbench, listener: socket.socket, folder: str | None = None
    ) -> None:
        uploads = bench.closing.enter_context(tempfile.TemporaryDirectory(prefix="vlv-ui-"))
        os.environ["GRADIO_TEMP_DIR"] = uploads
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        from vlv.ui.app import build_app

        self._bench, self._listener = bench, listener
        self._app = build_app(bench, folder)
        super().__init__(
            uvicorn.Config(
                self._app,
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )

    @property
    def url(self) -> str:
        """The address with its secret, to be opened in a browser."""
        host, port = self._listener.getsockname()[:2]
        return f"http://{host}:{port}/?token={self._app.secret}"

    def serve_until_signal(self) -> None:
        """Answer; returns after SIGTERM or SIGINT, when the work is stopped and everything saved."""
        try:
            with suppress(KeyboardInterrupt):  # which uvicorn raises again once all is done
                self.run([self._listener])
        finally:
            self._bench.close()
