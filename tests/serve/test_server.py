"""A real server on loopback: the official client, our own client, slow and strange connections, and the end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.cli.conftest import Vlv, start, vlv
from tests.serve.conftest import KEY, MODEL, chat, image, url
from vlv.errors import DeviceLostError
from vlv.jobs.formats import read_rows
from vlv.models.pipeline import VLVPipeline
from vlv.serve.server import Server, serve
from vlv.serve.service import Service
from vlv.serve.settings import Keys, Limits, ServeSettings
from vlv.serve.sockets import listen

__all__ = ["vlv"]  # a fixture


class Running:
    """A server in a thread."""

    def __init__(self, pipe: Any, *keys: str, model: str = MODEL, **settings: Any) -> None:
        self.service = Service(pipe, ServeSettings(model, **settings))
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.server = Server(self.service, Keys(*keys), listener)
        self.url = self.server.url
        self.thread = threading.Thread(target=self.server.serve_until_signal)
        self.thread.start()

    def end(self) -> None:
        self.server.drain()
        self.thread.join(20)
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(10)
        return connection


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


@pytest.fixture(scope="module")
def running(tiny_pipeline: VLVPipeline) -> Iterator[Running]:
    """One server for the tests that leave it running."""
    limits = Limits(header_seconds=0.2, connections=40, body_bytes=1_000_000)
    server = Running(tiny_pipeline, KEY, limits=limits)
    yield server
    server.end()


def test_the_official_client(running: Running, tiny_pipeline: VLVPipeline) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]
    body: dict[str, Any] = chat()
    wanted = tiny_pipeline.caption(image(), max_new_tokens=8)
    answer = client.chat.completions.create(**body)
    assert answer.choices[0].message.content == wanted
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 8
    pieces = client.chat.completions.create(**body, stream=True)
    assert "".join(x.choices[0].delta.content or "" for x in pieces) == wanted
    body = chat("http://127.0.0.1:1/a.png")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**body)
    assert refused.value.code == "fetching_is_off"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**chat(model="other"))


def test_the_client_of_lmms_eval(running: Running, tiny_pipeline: VLVPipeline) -> None:
    """What its model openai_compatible sends for a task that asks a question about an image."""
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0)
    content = [
        {"type": "image_url", "image_url": {"url": url()}},
        {"type": "text", "text": "Describe this image in detail."},
    ]
    payload: dict[str, Any] = {
        "messages": [{"role": "user", "content": content}],
        "model": MODEL,
        "max_tokens": 16,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**payload)
    assert answer.choices[0].message.content == tiny_pipeline.caption(image(), max_new_tokens=16)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16


def test_a_large_body_gets_its_answer(running: Running) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    for content in (bytes(3_000_000), iter([bytes(100_000)] * 30)):
        answer = httpx.post(f"{running.url}/v1/embed", content=content, headers=key)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_slow_headers_and_strange_bytes(running: Running) -> None:
    with running.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a")
        assert b"slow_headers" in read_all(connection)
    with running.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)
        connection.sendall(b"GET /he")  # the second request of a connection may dawdle no more
        assert b"slow_headers" in read_all(connection)
    with running.connect() as connection:
        assert b"slow_headers" in read_all(connection)
    for strange in (b"\x16\x03\x01\x02\x00\x01\x00" + bytes(100), b"GET / HTTP/9\r\n\r\n"):
        with running.connect() as connection:
            connection.sendall(strange)
            assert b"this is no HTTP request" in read_all(connection)
    with running.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000)
        assert b"this is no HTTP request" in read_all(connection)
    assert httpx.get(f"{running.url}/health").status_code == 200


def test_too_many_connections(running: Running) -> None:
    idle = [running.connect() for _ in range(60)]
    refused = sum(b"too_many_connections" in read_all(connection) for connection in idle)
    assert 15 <= refused <= 25
    for connection in idle:
        connection.close()
    assert httpx.get(f"{running.url}/health").status_code == 200


class Large:
    """A model that draws more than a socket takes in at once."""

    image_size, framing = 32, "cut"

    def generate(self, texts: list[str], **options: Any) -> list[Any]:
        return [image(0, (2500, 2500)) for _ in texts]


@pytest.mark.slow
def test_who_does_not_read_the_answer_is_cut_off() -> None:
    running = Running(Large(), limits=Limits(patience_seconds=0.3))
    body = b'{"prompt": "a"}'
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    try:
        with running.connect() as connection:
            connection.sendall(f"POST /v1/generate HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
            assert connection.recv(15) == b"HTTP/1.1 200 OK"
            began = time.monotonic()
            while running.server.server_state.connections and time.monotonic() - began < 8:
                time.sleep(0.02)
            assert not running.server.server_state.connections
        assert httpx.get(f"{running.url}/health").status_code == 200
    finally:
        running.end()


class Slow:
    """A model that holds on until it is let go."""

    image_size, framing = 32, "cut"

    def __init__(self) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()

    def generate(self, texts: list[str], **options: Any) -> list[Any]:
        self.began.set()
        assert self.may_end.wait(10)
        return [image(len(text)) for text in texts]


def test_the_end_finishes_what_runs_and_refuses_what_comes() -> None:
    pipe = Slow()
    running = Running(pipe, batch_size=1)
    with ThreadPoolExecutor() as pool, httpx.Client(base_url=running.url) as client:
        assert client.get("/ready").status_code == 200
        works = [
            pool.submit(httpx.post, f"{running.url}/v1/generate", json={"prompt": "a" * number})
            for number in (1, 2)
        ]
        assert pipe.began.wait(10)
        while running.service.batcher.num_waiting < 1:
            time.sleep(0.001)
        running.server.drain()
        pipe.may_end.set()
        assert [work.result().status_code for work in works] == [200, 200]
    running.thread.join(20)
    assert not running.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


@pytest.mark.slow
def test_our_own_client_captions_a_folder(vlv: Vlv, tmp_path: Path) -> None:
    assert vlv("toyworld", "render", tmp_path / "scenes", "--num", 3, "--split", "test").code == 0
    pipe = VLVPipeline.from_pretrained("vlv-tiny", parts=["caption"])
    running = Running(pipe, model="vlv-tiny")
    try:
        asked = ("--endpoint", f"{running.url}/v1", "--model", "vlv-tiny")
        where = (tmp_path / "scenes", "--output", tmp_path / "out", "--format", "jsonl")
        result = vlv("data", "caption", *where, *asked)
    finally:
        running.end()
    assert result.code == 0, result.err
    (table,) = (tmp_path / "out").glob("*.jsonl")
    captions = [row["caption"] for row in read_rows(table)]
    assert len(captions) == 3
    assert all(len(caption.split()) > 5 for caption in captions)


# --- the command ------------------------------------------------------------------------------------


def free_port() -> int:
    with listen("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_a_signal_ends_the_command_well(tiny_folder: Path) -> None:
    port = free_port()
    process = start("serve", "--model", tiny_folder, "--port", port, "--device", "cpu")
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            assert httpx.get(f"{address}/ready").status_code == 200
            break
        except httpx.TransportError:
            time.sleep(0.05)
    body = {"images": [url()], "model": tiny_folder.name}
    assert httpx.post(f"{address}/v1/embed", json=body).status_code == 200
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    assert process.exitcode == 0


def test_a_lost_device_ends_the_server_with_an_answer_for_everybody(
    tiny_pipeline: VLVPipeline,
) -> None:
    class Broken:
        """A pipeline whose GPU is gone."""

        image_size, framing = tiny_pipeline.image_size, tiny_pipeline.framing

        def embed(self, images: list[Any], **options: Any) -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    listener = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/embed"
    settings = ServeSettings(MODEL, batch_size=4)
    with ThreadPoolExecutor(8) as pool:
        server = pool.submit(serve, Broken(), settings, Keys(), listener)  # type: ignore[arg-type]
        asked = [pool.submit(httpx.post, address, json={"images": [url(i)]}) for i in range(6)]
        statuses = {answer.result().status_code for answer in asked if not answer.exception()}
        with pytest.raises(DeviceLostError, match="start the server anew"):
            server.result(30)
    assert statuses <= {500, 503}
    assert 500 in statuses


def test_the_command_refuses_before_it_loads(vlv: Vlv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLV_API_KEYS", raising=False)
    assert "there is no key" in vlv("serve", "--host", "0.0.0.0").err
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert "cannot be served" in vlv("serve", "--port", port).err
    monkeypatch.setenv("VLV_API_KEYS", "short")
    result = vlv("serve")
    assert result.code == 1
    assert "key 1 of VLV_API_KEYS" in result.err
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    assert 'pip install "vlv[serve]"' in vlv("serve").err
