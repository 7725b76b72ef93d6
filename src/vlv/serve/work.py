"""What the model computes for requests; pieces of work that are equal share a batch.

Shapes: B items, Q queries, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from vlv.errors import MissingPartError
from vlv.models.mixing import MixMode, mix_embeddings
from vlv.toyworld.claims import find_grammar

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vlv.models.asking import Answer
    from vlv.models.decoding import Caption, GenerationOptions
    from vlv.models.diffusion import Sampler
    from vlv.models.doubts import Verdict
    from vlv.models.pipeline import DrawingOptions, VLVPipeline
    from vlv.models.scoring import Scores
    from vlv.search.index import Hit, Index

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)
Seeded = tuple["Image.Image", int]
Asked = tuple["Image.Image", int, str | None]
"""An image, a seed, and what is wanted of it: None is the plain caption."""


class Work(Protocol[Item, Result]):
    """A kind of work with its settings; it can be hashed and compared."""

    @property
    def kind(self) -> str:
        """Its name in the metrics."""

    def run(self, pipe: VLVPipeline, items: Sequence[Item], /) -> Sequence[Result]:
        """One result for each item; none depends on the others."""


@dataclass(frozen=True)
class Describe:
    """Captions of images, each with its seed and its instruction, and the number of tokens that they were read from."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    """None takes the likeliest tokens."""
    top_p: float = 1.0
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    schema: str | None = None
    kind = "caption"

    def run(self, pipe: VLVPipeline, items: Sequence[Asked]) -> list[tuple[Caption, int]]:
        """Write them."""
        size = len(items)
        z = pipe.embed([image for image, *_ in items], batch_size=size)
        options: GenerationOptions = {
            "max_new_tokens": self.max_new_tokens,
            "seed": [seed for _, seed, _ in items],
            "prompt": [prompt for *_, prompt in items],
            "include": self.include,
            "exclude": self.exclude,
            "schema": self.schema,
        }
        if self.temperature is not None:
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return [(caption, z.shape[1]) for caption in pipe.describe(z=z, batch_size=size, **options)]


@dataclass(frozen=True)
class Ask:
    """Answers to questions, one about each image."""

    max_new_tokens: int | None = None
    kind = "ask"

    def run(self, pipe: VLVPipeline, items: Sequence[tuple[Image.Image, str]]) -> list[Answer]:
        """Answer them."""
        images, questions = [image for image, _ in items], [question for _, question in items]
        size, longest = len(items), self.max_new_tokens
        return pipe.ask(images, questions, max_new_tokens=longest, batch_size=size)  # type: ignore[return-value]


@dataclass(frozen=True)
class Embed:
    """Caption embeddings of images, (Q, D) each."""

    kind = "embed"

    def run(self, pipe: VLVPipeline, items: Sequence[Image.Image]) -> list[Tensor]:
        """Encode them."""
        return list(pipe.embed(list(items), batch_size=len(items)).float().cpu())


@dataclass(frozen=True)
class Sampling:
    """How images are sampled."""

    steps: int
    guidance: float
    sampler: Sampler

    def options(self, seeds: Sequence[int]) -> DrawingOptions:
        """For `VLVPipeline.draw`, with the seed of each image."""
        return {
            "seed": list(seeds),
            "steps": self.steps,
            "guidance": self.guidance,
            "sampler": self.sampler,
            "batch_size": len(seeds),
        }


@dataclass(frozen=True)
class Reconstruct:
    """Images out of images' embeddings."""

    sampling: Sampling
    kind = "reconstruct"

    def run(self, pipe: VLVPipeline, items: Sequence[Seeded]) -> list[Image.Image]:
        """Draw them."""
        options = self.sampling.options([seed for _, seed in items])
        return pipe.reconstruct([image for image, _ in items], **options)


@dataclass(frozen=True)
class Generate:
    """Images out of texts."""

    sampling: Sampling
    kind = "generate"

    def run(self, pipe: VLVPipeline, items: Sequence[tuple[str, int]]) -> list[Image.Image]:
        """Draw them."""
        options = self.sampling.options([seed for _, seed in items])
        return pipe.generate([text for text, _ in items], **options)


@dataclass(frozen=True)
class Mix:
    """Images out of mixes of several images' embeddings."""

    sampling: Sampling
    mode: MixMode
    keep: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    kind = "mix"

    def run(
        self, pipe: VLVPipeline, items: Sequence[tuple[tuple[Image.Image, ...], int]]
    ) -> list[Image.Image]:
        """Draw them."""
        images = [image for several, _ in items for image in several]
        z = pipe.embed(images, batch_size=len(images))
        parts = torch.split(z, [len(several) for several, _ in items])
        mixes = [
            mix_embeddings(list(part), keep=self.keep, weights=self.weights, mode=self.mode)
            for part in parts
        ]
        options = self.sampling.options([seed for _, seed in items])
        return pipe.reconstruct(z=torch.stack(mixes), **options)  # type: ignore[return-value]


@dataclass(frozen=True)
class Doubt:
    """Which sentences and claims of captions are doubtful, one caption for each image."""

    kind = "doubt"

    def run(self, pipe: VLVPipeline, items: Sequence[tuple[Image.Image, str]]) -> list[Verdict]:
        """Judge them."""
        if pipe.calibration is None:
            raise MissingPartError("the model has no calibration of doubts")
        read_claims = find_grammar(pipe.calibration.claims)
        images, texts = [image for image, _ in items], [text for _, text in items]
        return pipe.verify(images, texts, read_claims=read_claims)


@dataclass(frozen=True)
class Verify:
    """How well captions explain their images."""

    kind = "verify"

    def run(
        self, pipe: VLVPipeline, items: Sequence[tuple[Image.Image, tuple[str, ...]]]
    ) -> list[Scores]:
        """Score them."""
        return pipe.score([image for image, _ in items], [texts for _, texts in items])


@dataclass(frozen=True)
class Search:
    """The images of an index that are nearest to texts and images."""

    index: Index
    k: int
    kind = "search"

    def run(self, pipe: VLVPipeline, items: Sequence[str | Image.Image]) -> list[list[Hit]]:
        """Find them."""
        return [
            self.index.search(item, k=self.k)
            if isinstance(item, str)
            else self.index.search(image=item, k=self.k)
            for item in items
        ]
