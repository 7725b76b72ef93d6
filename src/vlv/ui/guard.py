"""Who may use the workbench: whoever has the address that was printed, from a browser on this machine."""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "vlv_ui"
_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "media-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
]


class Guard:
    """An ASGI application around another, which answers only to one browser on this machine.

    The address has a secret in it, which a cookie keeps afterwards: other users of the machine, and pages of other sites,
    know neither.

    Args:
        app: What is guarded.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.secret = secrets.token_urlsafe(24)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        headers: dict[bytes, bytes] = dict(scope["headers"])
        if not _is_local(headers):
            await _say(answer, 403, "this page is for a browser on this machine only")
        elif self._is_known(headers):
            await self._app(scope, receive, answer)
        elif self._has_secret(scope):
            cookie = f"{COOKIE}_{_port(headers)}={self.secret}; Path=/; HttpOnly; SameSite=Lax"
            await _say(answer, 303, "", [(b"location", b"/"), (b"set-cookie", cookie.encode())])
        else:
            await _say(answer, 403, "open the whole address that vlv ui has printed")

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
        try:
            cookies = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return False
        found = cookies.get(f"{COOKIE}_{_port(headers)}")
        return found is not None and hmac.compare_digest(found.value.encode(), self.secret.encode())

    def _has_secret(self, scope: Scope) -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return scope["path"] == "/" and hmac.compare_digest(given.encode(), self.secret.encode())


def _is_local(headers: dict[bytes, bytes]) -> bool:
    """Whether the request is to this machine by name, and no other page sent it."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    origin = headers.get(b"origin", b"").decode("latin-1").lower()
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name in _HOSTS and origin in ("", f"http://{host}")


def _port(headers: dict[bytes, bytes]) -> str:
    """Cookies know no ports, so that each workbench of a machine needs a name of its own."""
    port = headers.get(b"host", b"").decode("latin-1").rpartition(":")[2]
    return port if port.isdigit() else "80"


async def _say(
    send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = text.encode()
    plain = (b"content-type", b"text/plain; charset=utf-8")
    length = (b"content-length", str(len(body)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [plain, length, *(headers or [])],
        }
    )
    await send({"type": "http.response.body", "body": body})
