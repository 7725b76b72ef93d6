"""Who may use the workbench."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from vlv.ui.guard import Guard


async def secret_page(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


@pytest.fixture
def guard() -> Guard:
    return Guard(secret_page)


def ask(guard: Guard, path: str = "/", cookie: str | None = None, **headers: str) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=guard)
        sent = {"host": "127.0.0.1:7860", **headers}
        if cookie is not None:
            sent["cookie"] = cookie
        async with httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:7860"
        ) as client:
            return await client.get(path, headers=sent)

    return asyncio.run(go())


def test_the_address_opens_the_page_once_and_the_cookie_afterwards(guard: Guard) -> None:
    first = ask(guard, f"/?token={guard.secret}")
    assert (first.status_code, first.headers["location"]) == (303, "/")
    cookie = first.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(cookie.split("; "))
    page = ask(guard, cookie=cookie.partition(";")[0])
    assert (page.status_code, page.text) == (200, "inside")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    ("path", "cookie"),
    [
        ("/", None),
        ("/?token=", None),
        ("/?token=wrong", None),
        ("/?token=%C3%A4", None),
        ("/vlv/image/a/0/192?token=SECRET", None),
        ("/", "vlv_ui_7860=wrong"),
        ("/", "vlv_ui_1=SECRET"),
        ("/", "vlv_ui_7860"),
        ("/", "%80=;;;=;vlv_ui_7860"),
    ],
)
def test_everybody_else_is_refused(guard: Guard, path: str, cookie: str | None) -> None:
    known = guard.secret
    answer = ask(guard, path.replace("SECRET", known), cookie and cookie.replace("SECRET", known))
    assert answer.status_code == 403
    assert "inside" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1234"},
    ],
)
def test_pages_of_others_are_refused_even_with_the_cookie(
    guard: Guard, headers: dict[str, str]
) -> None:
    answer = ask(guard, cookie=f"vlv_ui_7860={guard.secret}", **headers)
    assert answer.status_code == 403
