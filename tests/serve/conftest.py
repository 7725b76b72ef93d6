"""Requests to a service in this process, and images for them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from vlv.serve.app import build_app
from vlv.serve.service import Service
from vlv.serve.settings import Keys, ServeSettings

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline
    from vlv.serve.guard import Guard

MODEL = "vlv-random"
JSON = {"Content-Type": "application/json"}
KEY = "a-key-that-nobody-guesses"


def image(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def url(seed: int = 0) -> str:
    return data_url(png(image(seed)))


def chat(address: str | None = None, **more: Any) -> dict[str, Any]:
    """The body of a request for a caption."""
    part = {"type": "image_url", "image_url": {"url": url() if address is None else address}}
    messages = [{"role": "user", "content": [part]}]
    return {"model": MODEL, "messages": messages, "max_tokens": 8, **more}


class Asked:
    """A service, and requests to it that need no socket."""

    def __init__(self, service: Service, app: Guard) -> None:
        self.service, self.app = service, app

    def __call__(self, *requests: tuple[str, Any], **headers: str) -> list[httpx.Response]:
        """Answers to requests that are made at the same time: path and body, no body is a GET."""
        return asyncio.run(self.ask(*requests, **headers))

    async def ask(self, *requests: tuple[str, Any], **headers: str) -> list[httpx.Response]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            sent = [
                client.get(path, headers=headers)
                if body is None
                else client.post(path, content=json.dumps(body), headers=JSON | headers)
                for path, body in requests
            ]
            return list(await asyncio.gather(*sent))

    def one(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        (answer,) = self((path, body), **headers)
        return answer


def assert_refused(answer: httpx.Response, status: int, code: str) -> str:
    """An error in OpenAI's shape, which tells nothing of the inside; return its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "Traceback" not in answer.text
    assert "/" not in error["message"].replace("application/json", "").replace("image/png", "")
    return str(error["message"])


Make = Callable[..., Asked]


@pytest.fixture
def make(tiny_pipeline: VLVPipeline) -> Iterator[Make]:
    """Make services of the miniature model; `start=False` leaves all work waiting."""
    made: list[Service] = []

    def build(*keys: str, start: bool = True, pipe: Any = tiny_pipeline, **settings: Any) -> Asked:
        service = Service(pipe, ServeSettings(MODEL, **settings))
        if start:
            service.batcher.start()
        made.append(service)
        return Asked(service, build_app(service, Keys(*keys)))

    yield build
    for service in made:
        service.close()


@pytest.fixture
def asked(make: Make) -> Asked:
    """A service without keys."""
    return make()
