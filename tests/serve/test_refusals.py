"""What a service refuses: requests, images, floods, strangers; always in OpenAI's shape, and lives on."""

from __future__ import annotations

import asyncio
import gc
import struct
import zlib
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Any

import httpx
import pytest

from tests.serve.conftest import (
    KEY,
    MODEL,
    Asked,
    Make,
    assert_refused,
    chat,
    data_url,
    image,
    png,
    url,
)
from vlv.errors import ConfigError
from vlv.serve.settings import Keys, Limits, Rates, ServeSettings, check_access

CHAT = "/v1/chat/completions"
OPEN = {"/health", "/ready"}
POSTS = [f"/v1/{name}" for name in ("embed", "reconstruct", "generate", "mix", "verify")]


def bare_png(width: int, height: int) -> bytes:
    """A file of a few bytes that says it is large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        whole = name + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def addresses() -> dict[str, tuple[str, str]]:
    good = data_url(png(image()))
    return {
        "http": ("http://169.254.169.254/latest", "fetching_is_off"),
        "https": ("HTTPS://example.org/a.png", "fetching_is_off"),
        "file": ("file:///etc/passwd", "invalid_image_url"),
        "nothing": ("", "invalid_image_url"),
        "no base64": ("data:image/png,abc", "invalid_image_url"),
        "no comma": ("data:image/png;base64", "invalid_image_url"),
        "no alphabet": (good[:60] + "!" + good[60:], "invalid_image_url"),
        "no padding": (good.rstrip("=")[:-1], "invalid_image_url"),
        "line feeds": (good[:60] + "\n" + good[60:], "invalid_image_url"),
        "no image": (data_url(b"<svg/>", "image/svg+xml"), "invalid_image"),
        "empty": ("data:image/png;base64,", "invalid_image"),
        "truncated": (data_url(png(image(0, (200, 200)))[:5000]), "invalid_image"),
        "aspect bomb": (data_url(bare_png(1, 16_000)), "invalid_image"),
        "pixel bomb": (data_url(bare_png(16_000, 16_000)), "invalid_image"),
        "long side": (data_url(bare_png(2**31 - 1, 2**31 - 1)), "invalid_image"),
    }


@pytest.mark.parametrize("kind", addresses())
def test_bad_images(asked: Asked, kind: str) -> None:
    address, code = addresses()[kind]
    answer = asked.one(CHAT, chat(address))
    message = assert_refused(answer, 400, code)
    assert "passwd" not in message
    assert answer.json()["error"]["param"] == "messages"
    assert asked.service.batcher.num_waiting == 0


def test_the_limit_on_an_image_is_checked_before_it_is_decoded(asked: Asked) -> None:
    assert_refused(asked.one(CHAT, chat(data_url(bytes(20_100_000)))), 413, "image_too_large")


BODIES: dict[str, tuple[str, Any, str]] = {
    "no image": (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}, "image_count"),
    "no messages": (CHAT, {"model": MODEL}, "invalid_request"),
    "a list": (CHAT, [1], "invalid_request"),
    "no such role": (CHAT, {"model": MODEL, "messages": [{"role": "x", "content": "a"}]}, "invalid_request"),
    "seed": (CHAT, chat(seed=-1), "invalid_request"),
    "seed of another kind": (CHAT, chat(seed=1.0), "invalid_request"),
    "seed beyond": (CHAT, chat(seed=2**63), "invalid_request"),
    "temperature": (CHAT, chat(temperature=-1), "invalid_request"),
    "top_p": (CHAT, chat(top_p=0), "invalid_request"),
    "tokens": (CHAT, chat(max_completion_tokens=1_000_000), "limit_exceeded"),
    "choices": (CHAT, chat(n=1000), "limit_exceeded"),
    "tools": (CHAT, chat(tools=[{"type": "function"}]), "unsupported_parameter"),
    "embeddings of a client": (CHAT, chat(prompt_embeds="AAAA"), "unsupported_parameter"),
    "unknown field": ("/v1/embed", {"images": [url()], "z": [1]}, "invalid_request"),
    "no images": ("/v1/embed", {"images": []}, "invalid_request"),
    "too many images": ("/v1/embed", {"images": [url()] * 9}, "limit_exceeded"),
    "steps": ("/v1/generate", {"prompt": "a", "steps": 10_000}, "limit_exceeded"),
    "sampler": ("/v1/generate", {"prompt": "a", "sampler": "x"}, "invalid_request"),
    "long prompt": ("/v1/generate", {"prompt": "a" * 20_001}, "limit_exceeded"),
    "empty prompt": ("/v1/generate", {"prompt": " "}, "limit_exceeded"),
    "one image to mix": ("/v1/mix", {"images": [url()]}, "invalid_request"),
    "weights": ("/v1/mix", {"images": [url()] * 2, "weights": [1, 1]}, "invalid_value"),
    "half a character in a caption": ("/v1/verify", {"image": url(), "captions": ["a\ud83d"]}, "invalid_request"),
    "half a character in a name": ("/v1/embed", {"images": [url()], "\ud83d": 1}, "invalid_request"),
    "half a character in a part": (CHAT, {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "\ud83d"}]}]}, "invalid_request"),
    "half a character in a setting": (CHAT, chat(**{"\ud83d": 1}), "invalid_request"),
    "too many captions": ("/v1/verify", {"image": url(), "captions": ["a"] * 17}, "limit_exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BODIES)
def test_bad_bodies(asked: Asked, kind: str) -> None:
    path, body, code = BODIES[kind]
    assert_refused(asked.one(path, body), 400, code)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b'{"model": "a\\ud83d", "messages": []}', "application/json"),
        (b'{"model": "a", "messages": [], "temperature": NaN}', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"", "application/json"),
        (b"{}", "text/plain"),
        (b"a=b", "application/x-www-form-urlencoded"),
    ],
)
def test_bodies_that_are_no_json(asked: Asked, content: bytes, kind: str) -> None:
    answer = post(asked, content, {"Content-Type": kind})
    assert_refused(answer, 400, "invalid_request")


def test_other_models_routes_and_methods(asked: Asked) -> None:
    message = assert_refused(asked.one(CHAT, chat(model="gpt-4o")), 404, "model_not_found")
    assert MODEL in message
    assert_refused(asked.one("/v1/files"), 404, "invalid_request")
    assert_refused(asked.one(CHAT), 405, "invalid_request")
    assert_refused(asked.one("/docs"), 404, "invalid_request")


# --- bodies -----------------------------------------------------------------------------------------


def post(asked: Asked, content: Any, headers: dict[str, str]) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(asked.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post(CHAT, content=content, headers=headers)

    return asyncio.run(send())


def test_large_bodies_with_and_without_a_length(make: Make) -> None:
    asked = make(limits=Limits(body_bytes=1000))
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100_000:
            sent += 100
            yield bytes(100)

    assert_refused(post(asked, bytes(2000), {}), 413, "request_too_large")
    assert_refused(post(asked, pieces(), {}), 413, "request_too_large")
    assert sent <= 5000  # what is thrown away is limited, too
    assert asked.one("/health").status_code == 200


def test_a_slow_body_is_cut_off(make: Make) -> None:
    asked = make(limits=Limits(patience_seconds=0.05))

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    assert_refused(post(asked, pieces(), {}), 408, "slow_body")


def test_bodies_in_work_are_limited_together(make: Make) -> None:
    body = chat()
    asked = make(limits=Limits(held_bytes=6000))
    answers = asked(*[(CHAT, body)] * 12)
    refused = [answer for answer in answers if answer.status_code != 200]
    for answer in refused:
        assert_refused(answer, 429, "queue_full")
    assert 1 <= len(refused) < 12
    assert asked.one(CHAT, body).status_code == 200, "what was held is released"


# --- load -------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_come_again(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    asked = make(start=False, queue_size=3, timeout=0.3)
    answers = asked(*[("/v1/generate", {"prompt": "a"})] * 5)
    assert sorted(answer.status_code for answer in answers) == [429, 429, 504, 504, 504]
    for answer in answers:
        if answer.status_code == 429:
            assert_refused(answer, 429, "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        else:
            assert_refused(answer, 504, "deadline_exceeded")
    gc.collect()
    assert "never retrieved" not in caplog.text, "a late answer is no error of ours"
    asked.service.batcher.start()
    answer = asked.one("/v1/generate", {"prompt": "a", "steps": 1})
    assert answer.status_code in {200, 504}, "those that were given up make room"


def test_no_image_is_opened_for_which_there_is_no_room(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object, **more: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr("vlv.serve.requests.open_image", broken)
    asked = make(start=False, queue_size=1, timeout=0.2)
    full, refused = asked(("/v1/generate", {"prompt": "a"}), (CHAT, chat()))
    assert_refused(full, 504, "deadline_exceeded")
    assert_refused(refused, 429, "queue_full")


def test_a_request_with_more_items_than_the_queue_is_refused_whole(make: Make) -> None:
    asked = make(start=False, queue_size=2)
    assert_refused(asked.one("/v1/embed", {"images": [url()] * 3}), 429, "queue_full")
    assert asked.service.batcher.num_waiting == 0


def test_work_of_who_left_is_not_done(make: Make) -> None:
    asked = make(start=False)
    computed: list[list[str]] = []

    class Recorder:
        kind = "record"

        def run(self, pipe: object, items: list[str]) -> list[str]:
            computed.append(list(items))
            return list(items)

    stays, leaves = asked.service.batcher.submit(Recorder(), ["stays", "leaves"])
    leaves.cancel()
    sent = leave(asked, "/v1/generate", b'{"prompt": "a"}')
    assert not [message for message in sent if message.get("status") == 200]
    asked.service.batcher.start()
    assert stays.result(10) == "stays"
    asked.service.batcher.close()
    assert computed == [["stays"]]
    metrics = asked.one("/metrics").text
    assert 'vlv_requests_total{path="/v1/generate",status="499"} 1.0' in metrics
    assert 'kind="generate"' not in metrics


def leave(asked: Asked, path: str, body: bytes) -> list[dict[str, Any]]:
    """What is sent to a client that leaves once its request is in the queue."""
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        while asked.service.batcher.num_waiting < 2:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "http_version": "1.1",
        "scheme": "http",
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "root_path": "",
    }
    asyncio.run(asked.app(scope, receive, send))  # type: ignore[arg-type]
    return sent


def test_a_server_that_ends_refuses(make: Make) -> None:
    asked = make()
    asked.service.draining = True
    answer = asked.one(CHAT, chat())
    assert_refused(answer, 503, "draining")
    assert "retry-after" in answer.headers
    assert asked.one("/ready").json() == {"status": "draining"}
    assert asked.one("/health").status_code == 200


# --- strangers --------------------------------------------------------------------------------------


def test_every_route_but_health_needs_the_key(make: Make) -> None:
    asked = make(KEY, "another-key-of-someone")
    paths = [*OPEN, "/metrics", "/v1/models", "/openapi.json", "/nowhere", CHAT, *POSTS]
    for path in paths:
        body = {} if path in {CHAT, *POSTS} else None
        for authorization in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", f"Bearer {KEY[:-1]}"):
            answer = asked.one(path, body, Authorization=authorization)
            if path in OPEN:
                assert answer.status_code == 200
            else:
                assert_refused(answer, 401, "invalid_api_key")
        answer = asked.one(path, body, Authorization=f"Bearer {KEY}")
        assert answer.status_code != 401
    assert asked.one("/v1/models", Authorization="Bearer another-key-of-someone").is_success


def test_each_key_has_a_rate_of_its_own(make: Make) -> None:
    asked = make(KEY, "another-key-of-someone", rate=2)
    statuses = [
        asked.one("/v1/models", Authorization=f"{scheme} {KEY}").status_code
        for scheme in ("Bearer", "bearer", "BEARER ")
    ]
    assert statuses == [200, 200, 429]
    answer = asked.one(CHAT, chat(), Authorization=f"Bearer {KEY}")
    assert_refused(answer, 429, "rate_limit_exceeded")
    assert 20 <= int(answer.headers["retry-after"]) <= 30
    assert asked.one("/v1/models", Authorization="Bearer another-key-of-someone").is_success
    assert asked.one("/health").status_code == 200
    assert_refused(asked.one("/v1/models", Authorization="Bearer x"), 401, "invalid_api_key")


def test_a_rate_fills_up_again_and_no_further() -> None:
    now = 0.0
    rates = Rates(6, lambda: now)
    assert [rates.wait(b"a") for _ in range(7)] == [0] * 6 + [10]
    now = 10.0
    assert [rates.wait(b"a") for _ in range(2)] == [0, 10]
    assert rates.wait(b"b") == 0
    now = 1e6
    assert [rates.wait(b"a") for _ in range(7)] == [0] * 6 + [10]
    assert [Rates(None).wait(b"a") for _ in range(100)] == [0] * 100
    for bad in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="rate is"):
            ServeSettings(MODEL, rate=bad)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8000"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_without_a_key_no_page_asks_through_the_browser(
    make: Make, headers: dict[str, str]
) -> None:
    asked = make()
    assert_refused(asked.one("/v1/models", **headers), 403, "foreign_origin")
    assert asked.one("/v1/models", Host="localhost:8000", Origin="http://localhost:8000").is_success
    assert make(KEY).one("/v1/models", Authorization=f"Bearer {KEY}", **headers).is_success


def test_every_answer_has_the_headers(asked: Asked) -> None:
    for answer in asked(("/health", None), ("/nowhere", None), (CHAT, {}), (CHAT, chat())):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert len(answer.headers["x-request-id"]) == 32
        assert "server" not in answer.headers


def test_a_log_line_tells_of_a_request_and_nothing_of_its_content(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    asked = make(KEY)
    with caplog.at_level("INFO", "vlv.serve.requests"):
        asked.one(CHAT, chat(), Authorization=f"Bearer {KEY}")
        asked.one(f"/{KEY}?token={KEY}", Authorization=f"Bearer {KEY}")
    first, second = (record.fields for record in caplog.records if hasattr(record, "fields"))
    assert (first["path"], first["status"], first["method"]) == (CHAT, 200, "POST")
    assert first["body_bytes"] > 1000
    assert (second["path"], second["status"]) == ("other", 404)
    assert KEY not in str(first) + str(second) + caplog.text


def test_keys_are_read_and_checked() -> None:
    keys = Keys.from_environment({"VLV_API_KEYS": f" {KEY} , {'b' * 16},"})
    assert keys.find(b"bearer " + KEY.encode()) == keys.find(b"Bearer  " + KEY.encode()) is not None
    assert keys.find(b"Bearer " + b"b" * 16) not in (None, keys.find(b"bearer " + KEY.encode()))
    assert keys.find(b"Bearer ") is None
    assert not Keys.from_environment({})
    for bad in ("short", "with a space in the middle", "schl\u00fcssel-schl\u00fcssel"):
        with pytest.raises(ConfigError, match="openssl") as caught:
            Keys(bad)
        assert bad not in str(caught.value)


def test_the_network_is_reached_with_a_key_only() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="no key"):
            check_access(host, Keys(), no_auth=False)
        check_access(host, Keys(KEY), no_auth=False)
        check_access(host, Keys(), no_auth=True)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.0.1"):
        check_access(host, Keys(), no_auth=False)
    with pytest.raises(ConfigError, match="no effect"):
        check_access("127.0.0.1", Keys(KEY), no_auth=True)


@pytest.mark.parametrize("kind", [ServeSettings, Limits])
def test_a_silly_value_of_any_setting_is_named(kind: Any) -> None:
    given = {"model": MODEL} if kind is ServeSettings else {}
    for name in (x.name for x in fields(kind) if x.type in ("int", "float")):
        for value in (
            float("nan"),
            float("inf"),
            -1,
            "x",
            None,
            True,
            1.5 if name == "seed" else [],
        ):
            with pytest.raises(ConfigError, match=name) as caught:
                kind(**given, **{name: value})
            assert len(str(caught.value)) < 200
        if name not in ("seed", "linger"):
            with pytest.raises(ConfigError, match=name):
                kind(**given, **{name: 0})
