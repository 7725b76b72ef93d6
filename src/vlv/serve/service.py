"""What each route does: checks the request, opens its images, asks the model, and writes the answer."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from vlv.models.draws import mixed_seed
from vlv.serve import answers
from vlv.serve.batching import Batcher
from vlv.serve.errors import ApiError, ClientLeftError, as_api_error
from vlv.serve.fetching import Fetcher
from vlv.serve.images import is_address, open_image
from vlv.serve.metrics import Metrics
from vlv.serve.schema import (
    ChatBody,
    EmbedBody,
    GenerateBody,
    ImagePart,
    MixBody,
    ReconstructBody,
    VerifyBody,
)
from vlv.serve.work import Describe, Doubt, Embed, Generate, Mix, Reconstruct, Sampling, Verify

if TYPE_CHECKING:
    from PIL import Image

    from vlv.models.pipeline import VLVPipeline
    from vlv.serve.settings import ServeSettings
    from vlv.serve.work import Work

I = TypeVar("I")  # noqa: E741
R = TypeVar("R")
_READERS = 2
"""Threads that open images."""


class Service:
    """The routes of one model.

    Args:
        pipe: The model.
        settings: How it is served.

    Attributes:
        batcher: Who asks the model.
        draining: Whether the server is about to end.
    """

    def __init__(self, pipe: VLVPipeline, settings: ServeSettings) -> None:
        self.settings, self.metrics, self.draining = settings, Metrics(), False
        self.batcher = Batcher(
            pipe,
            batch_size=settings.batch_size,
            queue_size=settings.queue_size,
            linger=settings.linger,
            report=self.metrics.batch,
        )
        self.metrics.watch_queue(lambda: self.batcher.num_waiting)
        self._size, self._framing = pipe.image_size, pipe.framing
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="vlv-images")
        self._fetcher = Fetcher(settings.fetch_from, settings.limits.image.max_bytes)
        self._created = int(time.time())

    def close(self) -> None:
        """Finish what waits, and end."""
        self.batcher.close()
        self._readers.shutdown(cancel_futures=True)

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
        deadline = self._begin(body.model)
        body.refuse_unknown()
        urls = [part.image_url.url for part in body.parts if isinstance(part, ImagePart)]
        texts = [part for part in body.parts if not isinstance(part, ImagePart) and part.text]
        if len(urls) != 1:
            raise ApiError(
                400,
                f"this model describes one image, and the messages hold {len(urls)}",
                param="messages",
                code="image_count",
            )
        work, count = self._caption_work(body), body.n or 1
        self._check_count("n", count, self.settings.limits.texts)
        (image,) = await self._open(urls, ["messages"], deadline)
        seed = self._seed(body.seed)
        seeded = [
            (image, mixed_seed(seed, choice)) for choice in range(count)
        ]  # as `VLVPipeline.caption`
        if work.temperature is None:  # all choices are the same caption
            found = await self._compute(request, work, seeded[:1], deadline) * count
        else:
            found = await self._compute(request, work, seeded, deadline)
        captions = [caption for caption, _ in found]
        usage = answers.token_usage(found[0][1], captions)
        self.metrics.tokens(usage["completion_tokens"])
        model = self.settings.model
        if body.stream:
            wanted = body.stream_options is not None and body.stream_options.include_usage
            events = answers.stream(model, captions, usage, include_usage=wanted)
            return Response(events, media_type="text/event-stream")
        return JSONResponse(answers.completion(model, captions, usage, text_given=bool(texts)))

    def _caption_work(self, body: ChatBody) -> Describe:
        longest = body.longest
        if longest is not None:
            self._check_count("max_tokens", longest, self.settings.limits.tokens)
        temperature = body.temperature
        if temperature is None and body.top_p not in (None, 1):
            temperature = 1.0
        if not temperature:
            return Describe(longest)
        return Describe(longest, temperature, body.top_p or 1.0)

    # --- the other abilities ---------------------------------------------------------------------

    async def embed(self, body: EmbedBody, request: Request) -> Response:
        """Give the caption embeddings of images."""
        deadline = self._begin(body.model)
        images = await self._open_all("images", body.images, deadline)
        zs = await self._compute(request, Embed(), images, deadline)
        return JSONResponse(answers.embeddings(self.settings.model, zs, body.encoding_format))

    async def reconstruct(self, body: ReconstructBody, request: Request) -> Response:
        """Draw an image anew from its embedding."""
        deadline, seed = self._begin(body.model), self._seed(body.seed)
        work = Reconstruct(self._sampling(body))
        (image,) = await self._open([body.image], ["image"], deadline)
        drawn = await self._compute(request, work, [(image, seed)], deadline)
        return JSONResponse(answers.images(self.settings.model, drawn, seed))

    async def generate(self, body: GenerateBody, request: Request) -> Response:
        """Draw an image from a text."""
        deadline, seed = self._begin(body.model), self._seed(body.seed)
        self._check_text("prompt", body.prompt)
        work = Generate(self._sampling(body))
        drawn = await self._compute(request, work, [(body.prompt, seed)], deadline)
        return JSONResponse(answers.images(self.settings.model, drawn, seed))

    async def mix(self, body: MixBody, request: Request) -> Response:
        """Draw an image from the mixed embeddings of several."""
        deadline, seed = self._begin(body.model), self._seed(body.seed)
        keep = None if body.keep is None else tuple(body.keep)
        weights = None if body.weights is None else tuple(body.weights)
        work = Mix(self._sampling(body), body.mode, keep, weights)
        images = await self._open_all("images", body.images, deadline)
        drawn = await self._compute(request, work, [(tuple(images), seed)], deadline)
        return JSONResponse(answers.images(self.settings.model, drawn, seed))

    async def verify(self, body: VerifyBody, request: Request) -> Response:
        """Say how well captions explain an image to the frozen decoder."""
        deadline = self._begin(body.model)
        self._check_count("captions", len(body.captions), self.settings.limits.texts)
        for text in body.captions:
            self._check_text("captions", text)
        (image,) = await self._open([body.image], ["image"], deadline)
        if body.doubts:
            items = [(image, text) for text in body.captions]
            verdicts = await self._compute(request, Doubt(), items, deadline)
            return JSONResponse(answers.verdicts(self.settings.model, verdicts))
        item = (image, tuple(body.captions))
        (found,) = await self._compute(request, Verify(), [item], deadline)
        return JSONResponse(answers.scores(self.settings.model, found))

    def _sampling(self, body: Any) -> Sampling:
        self._check_count("steps", body.steps, self.settings.limits.steps)
        return Sampling(body.steps, body.guidance, body.sampler)

    # --- shared ----------------------------------------------------------------------------------

    def _begin(self, model: str | None) -> float:
        """Check that this model is meant and that there is room; return when the answer has to be there."""
        if model not in (None, self.settings.model):
            raise ApiError(
                404,
                f"this server has no such model; it serves {self.settings.model}",
                param="model",
                code="model_not_found",
            )
        self.batcher.check_room()
        return time.monotonic() + self.settings.timeout

    def _seed(self, given: int | None) -> int:
        return self.settings.seed if given is None else given

    def _check_count(self, name: str, count: int, most: int) -> None:
        if count > most:
            raise ApiError(
                400,
                f"{name} is {count}, above this server's limit of {most}",
                param=name,
                code="limit_exceeded",
            )

    def _check_text(self, name: str, text: str) -> None:
        most = self.settings.limits.characters
        if len(text) > most or not text.strip():
            raise ApiError(
                400,
                f"a text has 1 to {most} characters, not only spaces",
                param=name,
                code="limit_exceeded",
            )

    async def _open_all(self, name: str, urls: Sequence[str], deadline: float) -> list[Image.Image]:
        if len(urls) > self.settings.limits.images:
            self._check_count(f"the number of {name}", len(urls), self.settings.limits.images)
        return await self._open(urls, [f"{name}.{i}" for i in range(len(urls))], deadline)

    async def _open(
        self, urls: Sequence[str], names: Sequence[str], deadline: float
    ) -> list[Image.Image]:
        """The images of data URLs and of addresses, opened by threads."""
        limits = self.settings.limits.image
        read = functools.partial(open_image, limits=limits, size=self._size, framing=self._framing)

        async def one(url: str, name: str) -> Image.Image:
            source = await self._fetcher.fetch(url, name) if is_address(url) else url
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._readers, read, source, name)

        opening = [
            asyncio.ensure_future(one(url, name)) for url, name in zip(urls, names, strict=True)
        ]
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.gather(*opening)
        except TimeoutError:
            raise self._late() from None
        finally:
            for future in opening:
                future.cancel()

    async def _compute(
        self, request: Request, work: Work[I, R], items: Sequence[I], deadline: float
    ) -> list[R]:
        """The results of the model, as long as somebody waits for them.

        Raises:
            ApiError: There was no room or no time, the client left, or the model refused.
        """
        futures = self.batcher.submit(work, items)
        results = asyncio.gather(*map(asyncio.wrap_future, futures))
        gone = asyncio.create_task(_left(request))
        try:
            await asyncio.wait(
                (results, gone),
                timeout=max(0.0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if results.done():
                return list(results.result())
        except Exception as error:
            raise as_api_error(error) from error
        finally:
            gone.cancel()
            results.cancel()
            for future in futures:
                future.cancel()
        raise ClientLeftError() if gone.done() and not gone.cancelled() else self._late()

    def _late(self) -> ApiError:
        return ApiError(
            504,
            f"there was no answer within {self.settings.timeout:g} s",
            code="deadline_exceeded",
        )


async def _left(request: Request) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
