"""One HTTP request: an answer, an error worth a retry, or one that is final."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from vlv.endpoint.pace import retry_after
from vlv.errors import ConfigError, EndpointError, RequestError

if TYPE_CHECKING:
    from vlv.endpoint.settings import Endpoint

T = TypeVar("T")

MAX_BODY = 16 * 2**20
"""Bytes of a response that are read at most."""

_PASSING = frozenset({408, 409, 425, 429})
_KEY_TROUBLE = {
    401: "does not accept the key",
    402: "wants to be paid first",
    403: "forbids this to the key",
}
_OUT_OF_QUOTA = frozenset({"insufficient_quota", "billing_hard_limit_reached"})


class PassingError(Exception):
    """An error that another try may not meet.

    Attributes:
        reason: What happened, in words.
        wait: Seconds that the server asks to wait; None where it does not say.
        rate_limited: Whether the server is there and only too busy.
        unreachable: Whether not even a connection came about.
    """

    def __init__(
        self,
        reason: str,
        *,
        wait: float | None = None,
        rate_limited: bool = False,
        unreachable: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait, self.rate_limited, self.unreachable = wait, rate_limited, unreachable


def import_aiohttp() -> Any:
    """The HTTP library.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import aiohttp
    except ImportError:
        raise ConfigError('an endpoint needs aiohttp: pip install "vlv[data]"') from None
    return aiohttp


class Transport:
    """A pool of connections to one endpoint. No redirect is followed and no proxy of the environment used.

    Args:
        endpoint: Where, and how long it is waited for.
        key: Of the endpoint; None reads it from the environment.

    Raises:
        ConfigError: aiohttp or the key is missing.
    """

    def __init__(self, endpoint: Endpoint, key: str | None = None) -> None:
        self._aiohttp = import_aiohttp()
        self._endpoint = endpoint
        self._key = endpoint.read_key() if key is None else key
        self._session: Any = None

    async def open(self) -> None:
        """Make the pool; needs a running event loop."""
        http, given = self._aiohttp, self._endpoint
        headers = {"Content-Type": "application/json", "User-Agent": "vlv"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._session = http.ClientSession(
            connector=http.TCPConnector(limit=given.concurrency),
            timeout=http.ClientTimeout(total=given.timeout, sock_connect=given.connect_timeout),
            cookie_jar=http.DummyCookieJar(),
            headers=headers,
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def post(self, url: str, payload: bytes, read: Callable[[bytes], T]) -> T:
        """Send one request.

        Args:
            url: Below the endpoint's address.
            payload: A JSON body.
            read: Reads the body of the answer; a ValueError says that it is none.

        Raises:
            PassingError: Another try may help.
            RequestError: The server refuses this request.
            EndpointError: The server refuses all that we might send.
        """
        return await self._ask("POST", url, payload, read)

    async def get(self, url: str, read: Callable[[bytes], T]) -> T:
        """Read what is at an address; see `post`."""
        return await self._ask("GET", url, None, read)

    async def _ask(
        self, method: str, url: str, payload: bytes | None, read: Callable[[bytes], T]
    ) -> T:
        http = self._aiohttp
        try:
            async with self._session.request(
                method, url, data=payload, allow_redirects=False
            ) as response:
                raw = await self._read(response)
                status, headers = response.status, response.headers
        except http.ClientConnectorError as error:
            reason = f"no connection to {url} ({_cause(error)})"
            raise PassingError(reason, unreachable=True) from error
        except http.ServerTimeoutError as error:
            if isinstance(error, http.ConnectionTimeoutError):
                reason = f"no connection to {url} in {self._endpoint.connect_timeout:g} s"
                raise PassingError(reason, unreachable=True) from error
            raise PassingError("the connection fell silent") from error
        except TimeoutError as error:
            raise PassingError(f"no answer in {self._endpoint.timeout:g} s") from error
        except (http.ClientError, OSError, ValueError) as error:
            raise PassingError(f"the connection broke ({_cause(error)})") from error
        if status != 200:
            raise self._refusal(url, status, headers, raw)
        try:
            return read(raw)
        except ValueError as error:
            raise PassingError(self._without_key(str(error))) from error

    async def _read(self, response: Any) -> bytes:
        pieces: list[bytes] = []
        size = 0
        async for piece in response.content.iter_any():
            size += len(piece)
            if size > MAX_BODY:
                raise PassingError(f"the answer is longer than {MAX_BODY} bytes")
            pieces.append(piece)
        body = b"".join(pieces)
        return body.replace(self._key.encode(), b"***") if self._key else body

    def _refusal(self, url: str, status: int, headers: Any, raw: bytes) -> Exception:
        message, code = _error_of(raw)
        said = f": {self._without_key(message)}" if message else ""
        if status in _KEY_TROUBLE:
            return EndpointError(f"{url} {_KEY_TROUBLE[status]} (HTTP {status}){said}")
        if 300 <= status < 400:
            target = self._without_key(str(headers.get("Location", "nowhere")))
            return EndpointError(
                f"{url} redirects to {target}, which is not followed; name that address if you trust it"
            )
        if status == 429 and code in _OUT_OF_QUOTA:
            return EndpointError(f"{url} says that the account is used up{said}")
        reason = f"HTTP {status}{said}"
        if status in _PASSING or status >= 500:
            wait = retry_after(headers.get("Retry-After"))
            return PassingError(reason, wait=wait, rate_limited=status == 429)
        return RequestError(reason)

    def _without_key(self, text: str) -> str:
        """Text of a server's headers, on one line, not too long, and with the key blotted out."""
        text = text.replace(self._key, "***") if self._key else text
        text = " ".join(text.split())
        return text if len(text) <= 300 else text[:300] + " ..."


def _error_of(raw: bytes) -> tuple[str, str]:
    """Message and code of an error's body; the body itself where it is no JSON."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return raw[:600].decode("utf-8", errors="replace"), ""
    if isinstance(body, list) and body:  # as Gemini's endpoint writes it
        body = body[0]
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), ""
    return str(error.get("message") or error.get("detail") or ""), str(error.get("code") or "")


def _cause(error: BaseException) -> str:
    cause = getattr(error, "os_error", None) or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
