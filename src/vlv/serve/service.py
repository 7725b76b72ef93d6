"""What each route does: hands the request on, and writes the answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from vlv.serve import answers
from vlv.serve.errors import ApiError
from vlv.serve.metrics import Metrics
from vlv.serve.requests import Requests
from vlv.serve.schema import (
    AskBody,
    CaptionBody,
    ChatBody,
    DrawBody,
    EmbedBody,
    GenerateBody,
    ImagePart,
    MixBody,
    ReconstructBody,
    SearchBody,
    VerifyBody,
)

if TYPE_CHECKING:
    from PIL import Image

    from vlv.models.pipeline import VLVPipeline
    from vlv.search.index import Index
    from vlv.serve.requests import Leaving
    from vlv.serve.settings import ServeSettings


class Service:
    """The routes of one model.

    Args:
        pipe: The model.
        settings: How it is served.
        index: What can be searched, of this model.

    Attributes:
        batcher: Who asks the model.
        draining: Whether the server is about to end.
    """

    def __init__(
        self, pipe: VLVPipeline, settings: ServeSettings, index: Index | None = None
    ) -> None:
        self.settings, self.metrics, self.draining = settings, Metrics(), False
        self._requests = Requests(pipe, settings, index=index, report=self.metrics.batch)
        self.batcher = self._requests.batcher
        self.metrics.watch_queue(lambda: self.batcher.num_waiting)
        self._created = int(time.time())

    def close(self) -> None:
        """Finish what waits, and end."""
        self._requests.close()

    # --- about the server ------------------------------------------------------------------------

    async def health(self) -> Response:
        """Whether the process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """Whether requests would be worked on."""
        if self.draining:
            return JSONResponse({"status": "draining"}, 503)
        healthy = self.batcher.is_healthy
        return JSONResponse(
            {"status": "ready" if healthy else "the model fails"}, 200 if healthy else 503
        )

    async def show_metrics(self) -> Response:
        """Counts for Prometheus."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        """What can be named as model."""
        return JSONResponse(answers.models(self.settings.model, self._created))

    # --- captions --------------------------------------------------------------------------------

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Describe the image of a chat."""
        self._requests.begin(body.model)
        body.refuse_unknown()
        urls = [part.image_url.url for part in body.parts if isinstance(part, ImagePart)]
        texts = [p for p in body.parts if not isinstance(p, ImagePart) and p.text.strip()]
        if len(urls) != 1:
            raise ApiError(
                400,
                f"this model describes one image, and the messages hold {len(urls)}",
                param="messages",
                code="image_count",
            )
        reads_text = texts and body.style is None and self._requests.takes_instructions
        prompt = "\n".join(part.text for part in texts) if reads_text else None
        asked = CaptionBody(
            image=urls[0],
            style=body.style,
            prompt=prompt,
            words=body.words,
            known=body.known,
            json_schema=None if body.response_format is None else body.response_format.content,
            include=body.include,
            exclude=body.exclude,
            max_tokens=body.longest,
            temperature=body.temperature,
            top_p=body.top_p,
            n=body.n,
            seed=body.seed,
        )
        found = await self._requests.captions(asked, _leaving(request), name="messages")
        captions = [caption for caption, _ in found]
        usage = answers.token_usage(found[0][1], captions)
        self.metrics.tokens(usage["completion_tokens"])
        model = self.settings.model
        if body.stream:
            wanted = body.stream_options is not None and body.stream_options.include_usage
            events = answers.stream(model, captions, usage, include_usage=wanted)
            return Response(events, media_type="text/event-stream")
        unused = bool(texts) and prompt is None
        return JSONResponse(answers.completion(model, captions, usage, text_unused=unused))

    # --- the other abilities ---------------------------------------------------------------------

    async def ask(self, body: AskBody, request: Request) -> Response:
        """Answer a question about an image."""
        found = await self._requests.ask(body, _leaving(request))
        return JSONResponse(answers.answered(self.settings.model, found))

    async def embed(self, body: EmbedBody, request: Request) -> Response:
        """Give the caption embeddings of images."""
        zs = await self._requests.embed(body, _leaving(request))
        return JSONResponse(answers.embeddings(self.settings.model, zs, body.encoding_format))

    async def reconstruct(self, body: ReconstructBody, request: Request) -> Response:
        """Draw an image anew from its embedding."""
        return self._drawn(body, await self._requests.reconstruct(body, _leaving(request)))

    async def generate(self, body: GenerateBody, request: Request) -> Response:
        """Draw an image from a text."""
        return self._drawn(body, await self._requests.generate(body, _leaving(request)))

    async def mix(self, body: MixBody, request: Request) -> Response:
        """Draw an image from the mixed embeddings of several."""
        return self._drawn(body, await self._requests.mix(body, _leaving(request)))

    async def verify(self, body: VerifyBody, request: Request) -> Response:
        """Say how well captions explain an image to the frozen decoder."""
        if body.doubts:
            verdicts = await self._requests.doubts(body, _leaving(request))
            return JSONResponse(answers.verdicts(self.settings.model, verdicts))
        found = await self._requests.verify(body, _leaving(request))
        return JSONResponse(answers.scores(self.settings.model, found))

    async def search(self, body: SearchBody, request: Request) -> Response:
        """Find the images of the index that are nearest to a text or to an image."""
        found = await self._requests.search(body, _leaving(request))
        return JSONResponse(answers.hits(self.settings.model, found))

    def _drawn(self, body: DrawBody, image: Image.Image) -> Response:
        seed = self._requests.seed(body.seed)
        return JSONResponse(answers.images(self.settings.model, [image], seed))


def _leaving(request: Request) -> Leaving:
    """Waits until the client has left."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return left
