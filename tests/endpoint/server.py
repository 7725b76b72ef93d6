"""A server on loopback that speaks OpenAI's chat form and misbehaves as its script says.

In a test it runs in a thread (`ScriptedServer`); as a process: ``python tests/endpoint/server.py --port 0``, which
prints its address, and its counts when it is ended by SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import random
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

from aiohttp import web

Body = dict[str, Any]
Script = Callable[[Body, int], str]
"""From the body of a request, and how often it came before, to a behaviour."""

WORDS = [
    "red",
    "cube",
    "left",
    "small",
    "blue",
    "sphere",
    "on",
    "a",
    "grey",
    "floor",
    "under",
    "the",
    "evening",
    "sun",
    "near",
    "one",
    "tall",
]


def key_of(body: dict[str, Any]) -> str:
    """What a request is about: its images and texts, without settings such as the seed."""
    return hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()[:16]


def images_of(body: dict[str, Any]) -> list[bytes]:
    parts = [part for message in body["messages"] for part in _parts(message)]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.split(",", 1)[1]) for url in urls]


def text_of(body: dict[str, Any]) -> str:
    parts = [part for message in body["messages"] for part in _parts(message)]
    return "\n".join(part["text"] for part in parts if part["type"] == "text")


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def caption_of(body: dict[str, Any]) -> str:
    """The well-behaved answer: a sentence that only these messages have."""
    key = key_of(body)
    draw = random.Random(key)
    words = " ".join(draw.choice(WORDS) for _ in range(12))
    return f"The {words} is marked {key}."


def always(behaviour: str) -> Script:
    return lambda body, times: behaviour


def faults(shares: dict[str, float], seed: int = 0) -> Script:
    """Each request draws its behaviour by its content and its try, so that the order does not matter."""

    def script(body: dict[str, Any], times: int) -> str:
        draw = random.Random(f"{seed} {key_of(body)} {times}").random()
        for behaviour, share in shares.items():
            draw -= share
            if draw < 0:
                return behaviour
        return "ok"

    return script


class Scripted:
    """The application: behaviours, and counts of what was asked and delivered.

    Attributes:
        requests: Requests that came in.
        behaviours: How often each behaviour was shown.
        delivered: Good answers that went out completely, by content.
        most_at_once: Largest number of requests in work at the same time.
        keys: Authorization headers that were seen.
        bodies: The last requests.
    """

    def __init__(
        self, script: Script, *, slow: float = 0.2, per_second: float | None = None, keep: int = 50
    ) -> None:
        self.script, self.slow, self._keep = script, slow, keep
        self.requests = self.most_at_once = self._at_once = 0
        self.behaviours: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.bodies: list[dict[str, Any]] = []
        self._per_second, self._window, self._in_window = per_second, 0.0, 0

    def key_of(self, body: Body) -> str:
        """What a request is about."""
        return key_of(body)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/chat/completions", self.chat)
        return app

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._chat(request)
        finally:
            self._at_once -= 1

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.keys.add(request.headers.get("Authorization"))
        self.bodies = [*self.bodies, body][-self._keep :]
        if self._too_fast():
            self.behaviours["limited"] += 1
            return self._status(429, {"Retry-After": "1"})
        key = self.key_of(body)
        behaviour = self.script(body, self.seen[key])
        self.seen[key] += 1
        self.behaviours[behaviour] += 1
        return await self._behave(behaviour, request, body)

    def _too_fast(self) -> bool:
        if self._per_second is None:
            return False
        if time.monotonic() - self._window >= 1:
            self._window, self._in_window = time.monotonic(), 0
        self._in_window += 1
        return self._in_window > self._per_second

    async def _behave(
        self, behaviour: str, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        name, _, value = behaviour.partition(" ")
        if name.isdigit():  # "500", "429 2" with seconds to wait, "301 http://elsewhere"
            headers = {"Location": value} if name.startswith("3") else {"Retry-After": value}
            if value == "date":
                headers = {"Retry-After": formatdate(time.time() + 1, usegmt=True)}
            return self._status(int(name), headers if value else {})
        if name == "hang":
            await asyncio.sleep(3600)
        if name == "slow":
            await asyncio.sleep(self.slow)
        if name == "reset":
            assert request.transport is not None
            request.transport.abort()
        if name == "malformed":
            return web.Response(text='{"choices": [{"mess', content_type="application/json")
        if name == "missing":
            return web.json_response({"choices": [{"index": 0}]})
        if name == "truncated":
            return await self._cut(request, body)
        if name in ("bomb", "endless"):
            return await self._flood(name, request)
        return await self._deliver(request, body, self._answer(name, value, body))

    async def _flood(self, name: str, request: web.Request) -> web.StreamResponse:
        """64 MiB in a few kilobytes, or zeros without end."""
        zeros = bytes(2**20)
        if name == "bomb":
            packer = zlib.compressobj(1, zlib.DEFLATED, 31)
            data = b"".join(packer.compress(zeros) for _ in range(64)) + packer.flush()
            return web.Response(body=data, headers={"Content-Encoding": "gzip"})
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(zeros)

    def _status(self, status: int, headers: dict[str, str]) -> web.Response:
        error = {"error": {"message": f"scripted {status}", "code": str(status)}}
        return web.json_response(error, status=status, headers=headers)

    def _answer(self, name: str, value: str, body: dict[str, Any]) -> dict[str, Any]:
        text = caption_of(body)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        finish = "stop"
        if name == "say":
            message["content"] = value
        elif name == "empty":
            message["content"] = "  "
        elif name == "repeat":
            message["content"] = "The " + "red cube and the " * 40
        elif name == "german":
            message["content"] = (
                "Das Bild zeigt eine rote Kugel und einen Würfel, die auf dem Boden liegen."
            )
        elif name == "length":
            message["content"], finish = text[:-12], "length"
        elif name == "refusal":
            message |= {"content": None, "refusal": "I can't help with that."}
        elif name == "sorry":
            message["content"] = "I'm sorry, but I can't assist with describing this image."
        return {
            "id": "scripted",
            "object": "chat.completion",
            "model": f"scripted/{body['model']}",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }

    async def _cut(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        content = json.dumps(self._answer("ok", "", body)).encode()
        response = web.StreamResponse(headers={"Content-Length": str(len(content))})
        await response.prepare(request)
        await response.write(content[: len(content) // 2])
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _deliver(
        self, request: web.Request, body: dict[str, Any], answer: dict[str, Any]
    ) -> web.StreamResponse:
        response = web.json_response(answer)
        await response.prepare(request)
        await response.write_eof()
        if request.transport is not None and not request.transport.is_closing():
            self.delivered[self.key_of(body)] += 1
        return response

    def counts(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "behaviours": dict(self.behaviours),
            "contents": len(self.delivered),
            "delivered": sum(self.delivered.values()),
            "most_delivered": max(self.delivered.values(), default=0),
            "most_at_once": self.most_at_once,
        }


async def _start(scripted: Scripted, port: int) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(scripted.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


class ScriptedServer(Scripted):
    """The server in a thread of its own: ``with ScriptedServer(always("ok")) as server: server.url``."""

    url = ""

    def __enter__(self) -> ScriptedServer:
        ready = threading.Event()

        async def serve() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            runner, self.url = await _start(self, 0)
            ready.set()
            await self._stop.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        assert ready.wait(60)
        return self

    def __exit__(self, *rest: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)


async def _main(arguments: argparse.Namespace) -> None:
    shares = dict(share.split("=") for share in arguments.fault)
    script = faults({name: float(share) for name, share in shares.items()}, arguments.seed)
    scripted = Scripted(script, per_second=arguments.per_second)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    runner, url = await _start(scripted, arguments.port)
    sys.stdout.write(f"{url}\n")
    sys.stdout.flush()
    await stop.wait()
    sys.stdout.write(json.dumps(scripted.counts()) + "\n")
    sys.stdout.flush()
    await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-second", type=float, help="more than that gets 429")
    parser.add_argument("--fault", action="append", default=[], help="share by behaviour: 500=0.1")
    asyncio.run(_main(parser.parse_args()))
