"""What each kind of request asks of the model: checked against the limits, images opened, computed in batches with others.

HTTP (`service`) and the Model Context Protocol (`tools`) are two doors to this.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vlv.errors import ConfigError
from vlv.models.decoding import Generation
from vlv.models.draws import mixed_seed
from vlv.serve.batching import Batcher
from vlv.serve.errors import ApiError, ClientLeftError, as_api_error
from vlv.serve.fetching import Fetcher
from vlv.serve.images import is_address, open_image
from vlv.serve.schema import (
    AskBody,
    CaptionBody,
    DrawBody,
    EmbedBody,
    GenerateBody,
    MixBody,
    ReconstructBody,
    SearchBody,
    VerifyBody,
)
from vlv.serve.work import (
    Ask,
    Describe,
    Doubt,
    Embed,
    Generate,
    Mix,
    Reconstruct,
    Sampling,
    Search,
    Verify,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vlv.models.asking import Answer
    from vlv.models.decoding import Caption
    from vlv.models.doubts import Verdict
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.scoring import Scores
    from vlv.search.index import Hit, Index
    from vlv.serve.settings import ServeSettings
    from vlv.serve.work import Work

I = TypeVar("I")  # noqa: E741
R = TypeVar("R")
Finder = Callable[[str, str], Awaitable[str | bytes | Path]]
"""What `open_image` opens, for what stands for an image in a request and for the name of its field."""
Leaving = Callable[[], Coroutine[object, object, None]]
"""Waits until nobody waits for the answer any more."""
_READERS = 2
"""Threads that open images."""


class Requests:
    """Requests to one model.

    Args:
        pipe: The model.
        settings: How it is served.
        find_image: Finds the images of requests; by default data URLs, and addresses of allowed hosts.
        index: What can be searched, of this model.
        report: Receives kind, items and seconds of every batch.

    Attributes:
        batcher: Who asks the model.
    """

    def __init__(
        self,
        pipe: VLVPipeline,
        settings: ServeSettings,
        *,
        find_image: Finder | None = None,
        index: Index | None = None,
        report: Callable[[str, int, float], None] = lambda kind, count, seconds: None,
    ) -> None:
        self.settings, self._index = settings, index
        self.batcher = Batcher(
            pipe,
            batch_size=settings.batch_size,
            queue_size=settings.queue_size,
            linger=settings.linger,
            report=report,
        )
        self._fetcher = Fetcher(settings.fetch_from, settings.limits.image.max_bytes)
        self._find_image = find_image or self._fetched
        self._size, self._framing = pipe.image_size, pipe.framing
        self._pipe = pipe
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="vlv-images")

    def close(self) -> None:
        """Finish what waits, and end."""
        self.batcher.close()
        self._readers.shutdown(cancel_futures=True)

    # --- what can be asked -----------------------------------------------------------------------

    async def captions(
        self, body: CaptionBody, left: Leaving | None = None, *, name: str = "image"
    ) -> list[tuple[Caption, int]]:
        """Captions of an image, and the number of tokens that each was read from.

        Args:
            body: The request.
            left: Tells that nobody waits any more.
            name: What the image is called in a refusal.
        """
        deadline = self.begin(body.model)
        work, count = self._caption_work(body), body.n or 1
        prompt = self._instruction(body)
        self._check_count("n", count, self.settings.limits.texts)
        (image,) = await self._open([body.image], [name], deadline)
        seed = self.seed(body.seed)
        seeded = [
            (image, mixed_seed(seed, choice), prompt) for choice in range(count)
        ]  # as `VLVPipeline.caption`
        if work.temperature is None:  # all choices are the same caption
            return await self._compute(left, work, seeded[:1], deadline) * count
        return await self._compute(left, work, seeded, deadline)

    async def ask(self, body: AskBody, left: Leaving | None = None) -> Answer:
        """The answer to a question about an image."""
        deadline = self.begin(body.model)
        self._check_text("question", body.question)
        self._check_count("max_tokens", body.max_tokens or 1, self.settings.limits.tokens)
        (image,) = await self._open([body.image], ["image"], deadline)
        item = (image, body.question)
        (found,) = await self._compute(left, Ask(body.max_tokens), [item], deadline)
        return found

    async def embed(self, body: EmbedBody, left: Leaving | None = None) -> list[Tensor]:
        """The caption embeddings of images, (Q, D) each."""
        deadline = self.begin(body.model)
        images = await self._open_all("images", body.images, deadline)
        return await self._compute(left, Embed(), images, deadline)

    async def reconstruct(self, body: ReconstructBody, left: Leaving | None = None) -> Image.Image:
        """An image drawn anew from its embedding."""
        deadline = self.begin(body.model)
        work = Reconstruct(self._sampling(body))
        (image,) = await self._open([body.image], ["image"], deadline)
        return await self._draw(left, work, (image, self.seed(body.seed)), deadline)

    async def generate(self, body: GenerateBody, left: Leaving | None = None) -> Image.Image:
        """An image drawn from a text."""
        deadline = self.begin(body.model)
        self._check_text("prompt", body.prompt)
        work = Generate(self._sampling(body))
        return await self._draw(left, work, (body.prompt, self.seed(body.seed)), deadline)

    async def mix(self, body: MixBody, left: Leaving | None = None) -> Image.Image:
        """An image drawn from the mixed embeddings of several."""
        deadline = self.begin(body.model)
        keep = None if body.keep is None else tuple(body.keep)
        weights = None if body.weights is None else tuple(body.weights)
        work = Mix(self._sampling(body), body.mode, keep, weights)
        images = await self._open_all("images", body.images, deadline)
        return await self._draw(left, work, (tuple(images), self.seed(body.seed)), deadline)

    async def verify(self, body: VerifyBody, left: Leaving | None = None) -> Scores:
        """How well captions explain an image to the frozen decoder."""
        image, deadline = await self._to_judge(body)
        item = (image, tuple(body.captions))
        (found,) = await self._compute(left, Verify(), [item], deadline)
        return found

    async def doubts(self, body: VerifyBody, left: Leaving | None = None) -> list[Verdict]:
        """Which sentences and claims of captions are doubtful."""
        image, deadline = await self._to_judge(body)
        items = [(image, text) for text in body.captions]
        return await self._compute(left, Doubt(), items, deadline)

    async def search(self, body: SearchBody, left: Leaving | None = None) -> list[Hit]:
        """The images of the index that are nearest to a text or to an image."""
        deadline = self.begin(body.model)
        if self._index is None:
            raise ApiError(
                404, "this server has no index; it is started with --index", code="no_index"
            )
        if (body.text is None) == (body.image is None):
            raise ApiError(
                400, "give one query, a text or an image", param="text", code="invalid_request"
            )
        query: str | Image.Image
        if body.image is not None:
            (query,) = await self._open([body.image], ["image"], deadline)
        else:
            query = body.text or ""
            self._check_text("text", query)
        (found,) = await self._compute(left, Search(self._index, body.k), [query], deadline)
        return found

    async def _to_judge(self, body: VerifyBody) -> tuple[Image.Image, float]:
        deadline = self.begin(body.model)
        self._check_count("captions", len(body.captions), self.settings.limits.texts)
        for text in body.captions:
            self._check_text("captions", text)
        (image,) = await self._open([body.image], ["image"], deadline)
        return image, deadline

    # --- shared ----------------------------------------------------------------------------------

    def begin(self, model: str | None) -> float:
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

    def seed(self, given: int | None) -> int:
        """The seed of a request."""
        return self.settings.seed if given is None else given

    @property
    def takes_instructions(self) -> bool:
        """Whether the model was taught to follow any."""
        captioner = self._pipe.caption_decoder
        return captioner is not None and captioner.config.takes_instructions

    def _instruction(self, body: CaptionBody) -> str | None:
        """What is wanted of an image; None is the plain caption."""
        if body.prompt is not None:
            self._check_text("prompt", body.prompt)
        if body.known is not None:
            self._check_text("known", body.known)
        given = {"style": body.style, "prompt": body.prompt, "words": body.words}
        given["known"] = body.known
        name = next((name for name, value in given.items() if value is not None), None)
        if name is None:
            return None
        captioner = self._pipe.caption_decoder
        if captioner is None:
            return None  # which the model says itself
        try:
            how = Generation(
                style=body.style, prompt=body.prompt, words=body.words, known=body.known
            )
            (prompt,) = captioner.instructions(how, 1)
        except ConfigError as error:
            raise ApiError(400, str(error), param=name, code="invalid_value") from error
        return prompt

    def _caption_work(self, body: CaptionBody) -> Describe:
        longest = body.max_tokens
        if longest is not None:
            self._check_count("max_tokens", longest, self.settings.limits.tokens)
        temperature = body.temperature
        if temperature is None and body.top_p not in (None, 1):
            temperature = 1.0
        try:
            how = Generation(include=body.include, exclude=body.exclude, schema=body.json_schema)
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value") from error
        work = Describe(
            longest,
            include=tuple(how.include),
            exclude=tuple(how.exclude),
            schema=None if how.schema is None else str(how.schema),
        )
        if not temperature:
            return work
        return replace(work, temperature=temperature, top_p=body.top_p or 1.0)

    def _sampling(self, body: DrawBody) -> Sampling:
        self._check_count("steps", body.steps, self.settings.limits.steps)
        return Sampling(body.steps, body.guidance, body.sampler)

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

    async def _open_all(
        self, name: str, given: Sequence[str], deadline: float
    ) -> list[Image.Image]:
        if len(given) > self.settings.limits.images:
            self._check_count(f"the number of {name}", len(given), self.settings.limits.images)
        return await self._open(given, [f"{name}.{i}" for i in range(len(given))], deadline)

    async def _open(
        self, given: Sequence[str], names: Sequence[str], deadline: float
    ) -> list[Image.Image]:
        """The images of a request, opened by threads."""
        limits = self.settings.limits.image
        read = functools.partial(open_image, limits=limits, size=self._size, framing=self._framing)

        async def one(text: str, name: str) -> Image.Image:
            source = await self._find_image(text, name)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._readers, read, source, name)

        opening = [
            asyncio.ensure_future(one(text, name)) for text, name in zip(given, names, strict=True)
        ]
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await asyncio.gather(*opening)
        except TimeoutError:
            raise self._late() from None
        finally:
            for future in opening:
                future.cancel()

    async def _fetched(self, given: str, name: str) -> str | bytes:
        return await self._fetcher.fetch(given, name) if is_address(given) else given

    async def _draw(
        self, left: Leaving | None, work: Work[I, Image.Image], item: I, deadline: float
    ) -> Image.Image:
        (drawn,) = await self._compute(left, work, [item], deadline)
        return drawn

    async def _compute(
        self, left: Leaving | None, work: Work[I, R], items: Sequence[I], deadline: float
    ) -> list[R]:
        """The results of the model, as long as somebody waits for them.

        Raises:
            ApiError: There was no room or no time, the client left, or the model refused.
        """
        futures = self.batcher.submit(work, items)
        results = asyncio.gather(*map(asyncio.wrap_future, futures))
        gone = asyncio.create_task((left or _forever)())
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
            results.add_done_callback(_look_at)
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


def _look_at(results: asyncio.Future[list[R]]) -> None:
    """Take note of how it ended, or asyncio would write an error for each answer that nobody waited for."""
    if not results.cancelled():
        results.exception()


async def _forever() -> None:
    await asyncio.Event().wait()
