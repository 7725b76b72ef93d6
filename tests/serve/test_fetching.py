"""Images at addresses: from allowed and public hosts alone, whatever the address looks like."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from tests.serve.conftest import Make, assert_refused, chat, data_url, image, png
from vlv.errors import ConfigError
from vlv.serve import fetching
from vlv.serve.errors import ApiError
from vlv.serve.fetching import Fetcher, is_public

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ANY = ["*"]

PRIVATE = [
    "127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1",
    "::1", "::", "fe80::1", "fe80::1%1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:80ff:fffe",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "::ffff:8.8.8.8"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1/a.png",
        "http://127.1/a.png",
        "http://2130706433/a.png",
        "http://0x7f000001/a.png",
        "http://0177.0.0.1/a.png",
        "http://[::1]/a.png",
        "http://[::ffff:127.0.0.1]/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost/a.png",
        "http://LOCALHOST/a.png",
    ],
)
def test_what_stands_for_a_private_address(address: str) -> None:
    assert refusal(Fetcher(ANY, 100), address).code == "address_not_public"


@pytest.mark.parametrize(
    "address",
    [
        "http://user@example.org/a.png",
        "http://user:word@example.org/a.png",
        "http://example.org@evil.test/a.png",
        "http://example.org:22/a.png",
        "http://example.org:8443/a.png",
        "http://evil.test/a.png",
        "http://example.org.evil.test/a.png",
        "http://notexample.org/a.png",
        "http://example.org%2eevil.test/a.png",
        "http://evil.test#example.org",
        "http://evil.test/?example.org",
        "http:///a.png",
        "http:example.org",
    ],
)
def test_hosts_that_were_not_allowed(address: str) -> None:
    found = refusal(Fetcher(["example.org", "*.example.org", "other.test:8443"], 100), address)
    assert found.code in ("host_not_allowed", "fetch_failed")
    assert found.status == 400


@pytest.mark.parametrize(
    "host", ["", "http://example.org", "a b", "*example.org", "example.org/x", "-"]
)
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(ConfigError, match="is no host"):
        Fetcher([host], 100)


def refusal(fetcher: Fetcher, address: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(fetcher.fetch(address, "image"))
    assert "/" not in caught.value.message
    return caught.value


# --- a server of images that counts as public ------------------------------------------------------------------------


def fetched(
    handler: Handler, max_bytes: int = 10_000, path: str = "/a.png", **more: Any
) -> tuple[bytes | ApiError, list[str]]:
    """What is fetched of a loopback server under the name images.test, and the paths that it was asked for."""

    async def run() -> tuple[bytes | ApiError, list[str]]:
        asked: list[str] = []

        @web.middleware
        async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
            asked.append(f"{request.host.partition(':')[0]}{request.path}")
            return await handler(request)

        app = web.Application(middlewares=[note])
        app.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        hosts = [f"images.test:{port}", f"moved.test:{port}", f"inside.test:{port}"]
        allowed = more.get("is_allowed", lambda ip: ip == "127.0.0.1")
        fetcher = Fetcher(hosts, max_bytes, is_allowed=allowed)
        try:
            return await fetcher.fetch(f"http://images.test:{port}{path}", "image"), asked
        except ApiError as error:
            return error, asked
        finally:
            await runner.cleanup()

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of this test, and which were looked up, in order."""
    looked_up: list[str] = []
    known = {"images.test": "127.0.0.1", "moved.test": "127.0.0.1", "inside.test": "10.0.0.7"}
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *given: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host)
        looked_up.append(name)
        if name.endswith((".test", ".org")) and name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return real(known.get(name, host), port, *given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return looked_up


async def picture(request: web.Request) -> web.Response:
    return web.Response(body=png(image()))


def test_an_image_is_fetched_and_its_host_looked_up_once(names: list[str]) -> None:
    found, asked = fetched(picture)
    assert found == png(image())
    assert asked == ["images.test/a.png"]
    assert names.count("images.test") == 1


def test_a_host_that_changes_its_address_is_not_asked_again(names: list[str]) -> None:
    """DNS rebinding: what was checked is what is connected to."""
    answers = iter([True])
    found, _ = fetched(picture, is_allowed=lambda ip: next(answers))
    assert found == png(image())


def redirect(*locations: str) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        step = int(request.query.get("step", "0"))
        if step == len(locations):
            return await picture(request)
        target = (
            locations[step].replace("PORT", str(request.url.port)).replace("STEP", str(step + 1))
        )
        return web.Response(status=302, headers={"Location": target})

    return handle


def test_redirects_are_followed_to_allowed_hosts_three_times() -> None:
    found, asked = fetched(redirect("/b.png?step=STEP", "http://moved.test:PORT/c.png?step=STEP"))
    assert found == png(image())
    assert asked == ["images.test/a.png", "images.test/b.png", "moved.test/c.png"]
    found, asked = fetched(redirect(*["/b.png?step=STEP"] * 4))
    assert isinstance(found, ApiError)
    assert found.code == "fetch_failed"
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("http://inside.test:PORT/", "address_not_public"),
        ("http://evil.test:PORT/", "host_not_allowed"),
        ("http://127.0.0.1:PORT/", "host_not_allowed"),
        ("file:///etc/passwd", "host_not_allowed"),
        ("data:image/png;base64,AAAA", "host_not_allowed"),
        ("ftp://images.test:PORT/", "host_not_allowed"),
        ("//user@images.test:PORT/", "host_not_allowed"),
        ("http://[", "fetch_failed"),
    ],
)
def test_a_redirect_is_an_address_like_any_other(target: str, code: str) -> None:
    found, asked = fetched(redirect(target))
    assert isinstance(found, ApiError)
    assert found.code == code
    assert asked == ["images.test/a.png"]


async def missing(request: web.Request) -> web.Response:
    return web.Response(status=404)


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(bytes(1000))


async def silent(request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def bomb(request: web.Request) -> web.Response:
    return web.Response(body=b"\x1f\x8b" + bytes(50), headers={"Content-Encoding": "gzip"})


def test_answers_that_are_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SECONDS", 0.5)
    codes = {}
    for handler in (missing, endless, silent):
        found, _ = fetched(handler)
        assert isinstance(found, ApiError)
        codes[handler.__name__] = found.code
    assert codes == {
        "missing": "fetch_failed",
        "endless": "image_too_large",
        "silent": "fetch_failed",
    }
    assert fetched(bomb)[0] == b"\x1f\x8b" + bytes(50)  # nothing is unpacked on the way


def test_a_service_captions_what_it_fetches(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = make(fetch_from=["images.example.org"])
    path = "/v1/chat/completions"

    async def get(self: Fetcher, url: object, places: object, name: str) -> bytes:
        return png(image(3))

    async def look_up(self: Fetcher, url: object, name: str) -> list[tuple[int, str]]:
        return [(socket.AF_INET, "8.8.8.8")]

    monkeypatch.setattr(Fetcher, "_get", get)
    monkeypatch.setattr(Fetcher, "_look_up", look_up)
    found = asked.one(path, chat("https://images.example.org/a.png")).json()
    monkeypatch.undo()
    same = asked.one(path, chat(data_url(png(image(3))))).json()
    assert found["choices"] == same["choices"]
    assert_refused(asked.one(path, chat("http://evil.test/")), 400, "host_not_allowed")
    assert_refused(make().one(path, chat("http://evil.test/")), 400, "fetching_is_off")
