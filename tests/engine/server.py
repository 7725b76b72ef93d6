"""A server on loopback that speaks vLLM's completions with prompt embeddings; our own loop writes for it."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import TYPE_CHECKING, Any

import torch
from aiohttp import web
from transformers import AutoModelForCausalLM

from tests.endpoint.server import Body, Script, ScriptedServer, always
from vlv.models.decoding import Generation
from vlv.models.writers import OwnWriter, Writing

if TYPE_CHECKING:
    from vlv.models.captioner import CaptionDecoder


class EngineServer(ScriptedServer):
    """An engine with the language model of a caption decoder.

    Beside the behaviours of `Scripted` it knows "choices N", "foreign", "reason WHY", "short", "endless-caption" and "no-ids".

    Args:
        decoder: Whose language model.
        name: Under which it is served.
        script: How it behaves.
        max_length: Positions that it says it has.

    Attributes:
        reloads: How often it was given other weights.
    """

    def __init__(
        self,
        decoder: CaptionDecoder,
        name: str,
        script: Script | None = None,
        max_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(script or always("ok"), **options)
        self._llm, self._name, self._max_length = decoder.llm, name, max_length
        self.reloads = 0

    def app(self) -> web.Application:
        app = super().app()
        app.router.add_post("/v1/completions", self.chat)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/collective_rpc", self.reload)
        app.router.add_post("/reset_prefix_cache", self.forget)
        return app

    async def reload(self, request: web.Request) -> web.Response:
        """Take other weights; what was computed with the old ones is to be forgotten next."""
        body = await request.json()
        assert body["method"] == "reload_weights"
        path = body["kwargs"]["weights_path"]
        self._llm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return web.json_response({"results": [None]})

    async def forget(self, request: web.Request) -> web.Response:
        self.reloads += 1
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        self.keys.add(request.headers.get("Authorization"))
        model = {"id": self._name, "object": "model", "max_model_len": self._max_length}
        return web.json_response({"object": "list", "data": [model]})

    def key_of(self, body: Body) -> str:
        return hashlib.sha256(body["prompt_embeds"].encode()).hexdigest()[:16]

    def _answer(self, name: str, value: str, body: Body) -> dict[str, Any]:
        ids = self._write(body)
        ended = ids[-1] in body["stop_token_ids"]
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "token_ids": ids,
            "finish_reason": "stop" if ended else "length",
        }
        if name == "foreign":
            choice["token_ids"] = [*ids[:-1], 10**6]
        elif name == "reason":
            choice["finish_reason"] = value
        elif name == "short":
            choice |= {"token_ids": ids[:1], "finish_reason": "length"}
        elif name == "endless-caption":
            choice["token_ids"] = ids * body["max_tokens"] * 2
        elif name == "no-ids":
            del choice["token_ids"]
        count = int(value) if name == "choices" else 1
        return {"id": "cmpl-0", "object": "text_completion", "choices": [choice] * count}

    def _write(self, body: Body) -> list[int]:
        raw = base64.b64decode(body["prompt_embeds"])
        prefix = torch.load(io.BytesIO(raw), weights_only=True)
        samples = body["temperature"] > 0
        how = Generation(
            do_sample=samples,
            temperature=body["temperature"] if samples else 1.0,
            top_p=body["top_p"] if samples else 1.0,
            seed=[body["seed"]] if samples else 0,
        )
        (end,) = body["stop_token_ids"]
        assert body["ignore_eos"]
        with torch.no_grad():
            (row,) = OwnWriter(self._llm).write(
                prefix[None], Writing(how, body["max_tokens"], end, end), 1
            )
        return list(row[: row.index(end) + 1] if end in row else row)
