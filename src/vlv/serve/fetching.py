"""Images at addresses that requests name: from allowed hosts, and from public addresses of the internet alone.

What a server fetches for others must not reach what only the server can reach (SSRF). So every name is looked up once, all that
it stands for has to be public, and the connection goes to what was looked up; a redirect is an address like any other.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vlv.endpoint.transport import import_aiohttp
from vlv.errors import ConfigError
from vlv.serve.errors import ApiError

if TYPE_CHECKING:
    from yarl import URL

SECONDS = 5.0
"""For one image, redirects included."""
MOST_REDIRECTS = 3
_MOST_AT_ONCE = 16
_CHUNK = 65_536
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PATTERN = re.compile(r"\*|(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d{1,5})?")
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, itself and any that it stands for."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _TRANSLATED or ip.scope_id is not None:
            return False
        inside = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if any(other is not None and not is_public(str(other)) for other in inside):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return ip.is_global and not ip.is_multicast


class Fetcher:
    """Downloads images for requests.

    Args:
        hosts: That may be asked: ``images.example.org``, ``*.example.org``, ``example.org:8443`` or ``*``, which is every
            host of the internet. Ports other than 80 and 443 have to be named.
        max_bytes: Of an image.
        is_allowed: Which IP addresses may be asked.

    Raises:
        ConfigError: A host is none, or aiohttp is missing.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        *,
        is_allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._hosts = [host.lower() for host in hosts]
        for host in self._hosts:
            if not _PATTERN.fullmatch(host):
                raise ConfigError(
                    f"{host!r} is no host; name one such as images.example.org, *.example.org, example.org:8443 or *"
                )
        self._max_bytes, self._is_allowed = max_bytes, is_allowed
        self._http = import_aiohttp() if hosts else None
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)

    async def fetch(self, address: str, name: str) -> bytes:
        """The bytes at an address.

        Args:
            address: http or https.
            name: The field of the request.

        Raises:
            ApiError: The host is not allowed or not public, or there is no file, or it is too large or too slow.
        """
        if self._http is None:
            raise ApiError(
                400,
                "this server fetches no addresses; send the image itself as a data: URL",
                param=name,
                code="fetching_is_off",
            )
        try:
            async with self._places, asyncio.timeout(SECONDS):
                return await self._follow(address, name)
        except TimeoutError:
            raise _failed(f"the address gave no image within {SECONDS:g} s", name) from None
        except (self._http.ClientError, OSError, ValueError) as error:
            raise _failed("the address cannot be reached", name) from error

    async def _follow(self, address: str, name: str) -> bytes:
        from yarl import URL

        url = URL(address)
        for _ in range(MOST_REDIRECTS + 1):
            self._check(url, name)
            found = await self._get(url, await self._look_up(url, name), name)
            if isinstance(found, bytes):
                return found
            url = url.join(URL(found))
        raise _failed(f"the address redirects more than {MOST_REDIRECTS} times", name)

    def _check(self, url: URL, name: str) -> None:
        """Refuse what no allowed host is asked for."""
        host, port = (url.host or "").lower().rstrip("."), url.port
        names = {host, f"{host}:{port}"} if port in (80, 443) else {f"{host}:{port}"}
        any_port = port in (80, 443)
        allowed = url.scheme in ("http", "https") and bool(host) and not (url.user or url.password)
        if not allowed or not any(
            pattern in names
            or (
                any_port and (pattern == "*" or (pattern[:1] == "*" and host.endswith(pattern[1:])))
            )
            for pattern in self._hosts
        ):
            raise ApiError(
                400,
                "this server does not fetch from that address; send the image itself as a data: URL",
                param=name,
                code="host_not_allowed",
            )

    async def _look_up(self, url: URL, name: str) -> list[tuple[int, str]]:
        """Family and IP address of all that a host stands for.

        Raises:
            ApiError: One of them is not public.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(str(url.host), url.port, type=socket.SOCK_STREAM)
        places = list(dict.fromkeys((int(family), str(where[0])) for family, *_, where in found))
        if not places or not all(self._is_allowed(ip) for _, ip in places):
            raise ApiError(
                400,
                "this server fetches from public addresses only",
                param=name,
                code="address_not_public",
            )
        return places

    async def _get(self, url: URL, places: Sequence[tuple[int, str]], name: str) -> bytes | str:
        """The body, or where a redirect leads to."""
        http: Any = self._http
        connector = http.TCPConnector(resolver=_Known(url, places), use_dns_cache=False)
        async with (
            http.ClientSession(
                connector=connector,
                auto_decompress=False,
                cookie_jar=http.DummyCookieJar(),
                headers={"User-Agent": "vlv", "Accept-Encoding": "identity", "Accept": "image/*"},
            ) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status in _REDIRECTS and "Location" in response.headers:
                return str(response.headers["Location"])
            if response.status != 200:
                raise _failed(f"the address answers with status {response.status}", name)
            parts, size = list[bytes](), 0
            async for part in response.content.iter_chunked(_CHUNK):
                parts.append(part)
                size += len(part)
                if size > self._max_bytes:
                    raise ApiError(
                        413,
                        f"the image is larger than the limit of {self._max_bytes} bytes",
                        param=name,
                        code="image_too_large",
                    )
            return b"".join(parts)


class _Known:
    """A resolver that knows one host: what was looked up and checked is what is connected to."""

    def __init__(self, url: URL, places: Sequence[tuple[int, str]]) -> None:
        self._host, self._places = url.host, places

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        """See aiohttp's AbstractResolver."""
        if host != self._host:
            raise OSError(f"{host} was not looked up")
        return [
            {
                "hostname": host,
                "host": ip,
                "port": port,
                "family": kind,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
            for kind, ip in self._places
        ]

    async def close(self) -> None:
        """Nothing is held."""


def _failed(message: str, name: str) -> ApiError:
    return ApiError(400, message, param=name, code="fetch_failed")
