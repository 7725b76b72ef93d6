"""A teacher behind an OpenAI-compatible address."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from PIL import Image

from vlv.endpoint import ChatRequest, Client, stream, user
from vlv.endpoint.client import UNKNOWN_LENGTH
from vlv.errors import ConfigError, RequestError
from vlv.jobs.inputs import open_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vlv.data.records import Record
    from vlv.endpoint import Budget, Endpoint, Ledger, Prices
    from vlv.jobs.inputs import Opened
    from vlv.jobs.teacher.job import Asking, Item, Question, TeacherJob

PREPARED_AHEAD = 4
"""Images that are opened and made small while all requests wait for their answers."""


@dataclass(frozen=True)
class Shrink:
    """How images are made smaller before they are sent.

    Attributes:
        max_side: Longest side, in pixels; smaller images stay as they are.
        quality: Of the JPEG, 1 to 100.
    """

    max_side: int = 1024
    quality: int = 90

    def __post_init__(self) -> None:
        if self.max_side < 16:
            raise ConfigError(
                f"an image of at most {self.max_side} pixels shows nothing; 16 is the least"
            )
        if not 1 <= self.quality <= 100:
            raise ConfigError(
                f"a JPEG quality of {self.quality} does not exist; it goes from 1 to 100"
            )

    def __call__(self, image: Image.Image) -> bytes:
        """An upright RGB image as a JPEG file, without EXIF: no place, no time, no camera."""
        side = max(image.size)
        if side > self.max_side:
            scale = self.max_side / side
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        return buffer.getvalue()


def prepare(record: Record, shrink: Shrink) -> tuple[Opened, bytes]:
    """Open a record and make its JPEG; for a bad file the bytes are empty and `Opened.error` says why."""
    opened = open_record(record)
    return opened, b"" if opened.image is None else shrink(opened.image)


class EndpointTeacher:
    """Asks an endpoint about many images at a time.

    Args:
        endpoint: Where, and how hard.
        shrink: How the images are made smaller.
        budget: What may be spent, over all runs of the job.
        prices: Of the model.
        seed: Of the jitter in the waits.
        on_spent: Receives the account, after each image.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        shrink: Shrink,
        budget: Budget,
        prices: Prices,
        seed: int = 0,
        on_spent: Callable[[Ledger], None] = lambda ledger: None,
    ) -> None:
        self.name = endpoint.model
        self.endpoint, self.budget, self.prices = endpoint, budget, prices
        self.on_spent = on_spent
        self._shrink, self._seed = shrink, seed
        endpoint.read_key()  # complain now, before anything is written

    def settings(self) -> dict[str, object]:
        """What the captions depend on; the address is no part of it, for servers move."""
        extra = dict(self.endpoint.extra)
        return {"model": self.name, "shrink": asdict(self._shrink), "extra": extra}

    def run(self, job: TeacherJob, items: Iterator[Item]) -> None:
        """Ask about all items, in any order."""
        with job.state.answers() as store:
            client = Client(
                self.endpoint,
                store=store,
                budget=self.budget,
                prices=self.prices,
                seed=self._seed,
            )

            async def work(item: Item) -> None:
                opened, jpeg = await asyncio.to_thread(prepare, item.record, self._shrink)
                for prompt in item.prompts:
                    if (question := job.ask(item, prompt, opened)) is not None:
                        await self._describe(client, job, question, jpeg)
                self.on_spent(client.ledger)
                if write := job.finish(item):
                    await asyncio.to_thread(write)

            stream(client, items, work, ahead=PREPARED_AHEAD)

    async def _describe(
        self, client: Client, job: TeacherJob, question: Question, jpeg: bytes
    ) -> None:
        try:
            while job.take(question, await client.ask(_request(job.asking, question, jpeg))):
                pass
        except RequestError as error:
            job.fail(question, f"{question.item.record.name}: {error}")

    def estimate(self, job: TeacherJob, num_images: int) -> tuple[int, float]:
        """The most tokens and USD that the images cost without second tries, by a guess of the prompt."""
        tokens = [0, 0]
        for prompt in job.prompts:
            request = ChatRequest([user(prompt.text, b"\xff\xd8\xff")], job.asking.max_tokens)
            tokens[0] += num_images * request.guess_prompt_tokens()
            tokens[1] += num_images * (job.asking.max_tokens or UNKNOWN_LENGTH)
        return sum(tokens), self.prices.cost(*tokens)


def _request(asking: Asking, question: Question, jpeg: bytes) -> ChatRequest:
    temperature, seed = asking.draw(question.tries)
    message = user(asking.text(question), jpeg)
    return ChatRequest([message], asking.max_tokens, temperature, seed)
