"""VLVPipeline: image to caption embedding, to image, to caption; and embeddings mixed.

Shapes: B batch, Q queries, D text width, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict, TypeVar, Unpack, overload

import diffusers
import torch
from PIL import Image
from torch import Tensor

from vlv.data.images import to_pil
from vlv.errors import ConfigError
from vlv.models.arguments import (
    MAX_SEED,
    Embeddings,
    as_embeddings,
    named,
    present,
    whole_number,
)
from vlv.models.asking import Answer, answer, check_answers
from vlv.models.batching import chunks
from vlv.models.context import Context
from vlv.models.decoding import Caption, Generation, GenerationOptions
from vlv.models.diffusion import Sampler
from vlv.models.judging import JudgingPipeline
from vlv.models.pixels import ImageArray, ImageLike, OneImage, as_list, is_single
from vlv.models.placement import at_work
from vlv.models.verification import Verification, verified_captions

logger = logging.getLogger(__name__)

I = TypeVar("I", bound=ImageLike)  # noqa: E741


@dataclass(frozen=True)
class Drawing:
    """How images are sampled from contexts."""

    seed: int | Sequence[int] = 0
    """One for all images, each of which then starts from the same noise, or one per image."""
    steps: int = 20
    """Sampler steps."""
    guidance: float = 2.0
    """Classifier-free guidance; 1 is none."""
    sampler: Sampler = "dpm"
    """"dpm", "ddim" or "ddpm"."""
    negative: Context | None = None
    """What guidance leads away from instead of the empty text: one context, of a text or an image."""
    batch_size: int = 16
    """Images sampled together."""
    progress: bool = False
    """Show a bar on stderr."""


class DrawingOptions(TypedDict, total=False):
    """The fields of `Drawing` as keywords."""

    seed: int | Sequence[int]
    steps: int
    guidance: float
    sampler: Sampler
    negative: Context | None
    batch_size: int
    progress: bool


class VLVPipeline(JudgingPipeline):
    """The Vision-Language-Vision auto-encoder as one object.

    Every component is optional: captioning needs no U-Net, reconstruction no language model. A
    method that lacks one says so with a MissingPartError. Wherever images are taken, one image
    gives one result and a list gives a list; images are PIL images, paths, arrays (H, W, 3) or
    tensors (3, H, W), and are brought to squares of `image_size`.

    The components are those of `VLVComponents`.
    """

    # --- embedding to caption --------------------------------------------------------------------

    @overload
    def caption(
        self,
        images: OneImage,
        *,
        verify: int | Verification | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **generation: Unpack[GenerationOptions],
    ) -> str: ...
    @overload
    def caption(
        self,
        images: list[I] | tuple[I, ...],
        *,
        verify: int | Verification | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **generation: Unpack[GenerationOptions],
    ) -> list[str]: ...
    @overload
    def caption(
        self,
        images: ImageArray | None = None,
        *,
        z: Embeddings | None = None,
        verify: int | Verification | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **generation: Unpack[GenerationOptions],
    ) -> str | list[str]: ...
    @named(Generation)
    def caption(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        z: Embeddings | None = None,
        verify: int | Verification | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **generation: Unpack[GenerationOptions],
    ) -> str | list[str]:
        """Describe images, or caption embeddings, in words.

        Args:
            images: One image or several.
            z: Instead of images, (Q, D) or (B, Q, D).
            verify: Write this many candidates, and keep the one that explains the image best to the frozen decoder.
            batch_size: Captions written together.
            progress: Show a bar on stderr.
            **generation: The fields of `Generation`: style, prompt, words, known, schema, include, exclude, max_new_tokens, num_beams, do_sample, ...

        Returns:
            A str for one image, a list of str for several.
        """
        captions = self.describe(
            images, z=z, verify=verify, batch_size=batch_size, progress=progress, **generation
        )
        single = _is_single(images, None if verify else z)
        return captions[0].text if single else [caption.text for caption in captions]

    @named(Generation)
    @torch.no_grad()
    def describe(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        z: Embeddings | None = None,
        verify: int | Verification | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **generation: Unpack[GenerationOptions],
    ) -> list[Caption]:
        """Like `caption`, with the number of tokens, whether the model ended the caption, and what verification found.

        Args:
            images: One image or several.
            z: Caption embeddings instead of images, (Q, D) or (B, Q, D); to verify captions of embeddings at hand, give both.
            verify: Candidates of each image among which the frozen decoder chooses, or how; None writes one caption.
            batch_size: Captions written together.
            progress: Show a bar on stderr.
            **generation: The fields of `Generation`: style, prompt, words, known, schema, include, exclude, max_new_tokens, num_beams, do_sample, ...
        """
        settings = Generation(**generation)
        if verify is not None:
            how = verify if isinstance(verify, Verification) else Verification(verify)
            return self._verified(images, z, settings, how, batch_size, progress)
        self._require("caption", given_z=z is not None)
        captioner = present(self.caption_decoder, "caption_decoder")
        z = self._embedding(images, z, batch_size)
        c = self._sequence(z, batch_size)
        seeds = settings.seeds(len(c))
        prompts, known = settings.prompts(len(c)), settings.known_of(len(c))
        captions: list[Caption] = []
        with at_work(self, "caption_decoder"):
            for rows in chunks(range(len(c)), batch_size, progress, "captioning"):
                part = slice(rows.start, rows.stop)
                own = replace(settings, seed=seeds[part], known=known[part])
                if settings.prompt is not None:
                    own = replace(own, prompt=prompts[part])
                captions += captioner.write(c[part], own)
        return captions

    def _sequence(self, z: Tensor, batch_size: int) -> Tensor:
        """What the caption decoder reads of caption embeddings (B, Q, D)."""
        parts = [self.context(chunk).sequence for chunk in chunks(z, batch_size, False, "")]
        return torch.cat(parts)

    @overload
    def ask(
        self,
        images: OneImage,
        questions: str,
        *,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> Answer: ...
    @overload
    def ask(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        questions: str | Sequence[str] = (),
        *,
        z: Embeddings | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> Answer | list[Answer]: ...
    @named()
    @torch.no_grad()
    def ask(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        questions: str | Sequence[str] = (),
        *,
        z: Embeddings | None = None,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> Answer | list[Answer]:
        """Answer questions about images, or about caption embeddings.

        Args:
            images: One image, which all questions are about, or as many as there are questions.
            questions: One question, about every image, or several.
            z: Instead of images, (Q, D) or (B, Q, D).
            max_new_tokens: Longest answer, in tokens.
            batch_size: Questions answered together.

        Returns:
            An answer, with the probability of yes where it is yes or no; a list where there are several questions or images.

        Raises:
            ConfigError: The model was not taught to answer, or there are as many questions as neither one nor the images.
        """
        self._require("caption", given_z=z is not None)
        captioner = present(self.caption_decoder, "caption_decoder")
        check_answers(captioner)
        asked = [questions] if isinstance(questions, str) else list(questions)
        if not asked:
            raise ConfigError("no question was given; ask one, or a list of them")
        c = self._sequence(self._embedding(images, z, batch_size), batch_size)
        if len(asked) == 1:
            asked *= len(c)
        if len(c) not in (1, len(asked)):
            raise ConfigError(
                f"{len(asked)} questions are about one image or as many, got {len(c)}; repeat the images"
            )
        c = c.expand(len(asked), *c.shape[1:])
        answers: list[Answer] = []
        with at_work(self, "caption_decoder"):
            for rows in chunks(range(len(asked)), batch_size, False, ""):
                part = slice(rows.start, rows.stop)
                answers += answer(captioner, c[part], asked[part], max_new_tokens=max_new_tokens)
        single = isinstance(questions, str) and _is_single(images, z)
        return answers[0] if single else answers

    def _verified(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        z: Embeddings | None,
        settings: Generation,
        how: Verification,
        batch_size: int,
        progress: bool,
    ) -> list[Caption]:
        if images is None:
            raise ConfigError("verification compares captions with their images; give the images")
        if not settings.is_plain:
            raise ConfigError(
                "plain captions are verified; leave style, prompt, words, known and schema out, or verify"
            )
        self._require("caption", given_z=z is not None)
        self._require("generate")
        captioner = present(self.caption_decoder, "caption_decoder")
        given = as_list(images)
        z = self.embed(given, batch_size=batch_size) if z is None else self._embedding(None, z, 1)
        if len(z) != len(given):
            raise ConfigError(f"{len(given)} images need as many caption embeddings, got {len(z)}")
        seeds = settings.seeds(len(z))
        captions: list[Caption] = []
        with at_work(self, "caption_decoder", *self.decoder.components):
            for rows in chunks(range(len(z)), batch_size, progress, "captioning"):
                part = slice(rows.start, rows.stop)
                captions += verified_captions(
                    captioner,
                    self.decoder,
                    self._latents(given[part]),
                    self.decoder.context(z[part].to(captioner.device)),
                    replace(settings, seed=seeds[part]),
                    how,
                )
        return captions

    # --- embedding or text to image --------------------------------------------------------------

    @overload
    def reconstruct(self, images: OneImage, **drawing: Unpack[DrawingOptions]) -> Image.Image: ...
    @overload
    def reconstruct(
        self, images: list[I] | tuple[I, ...], **drawing: Unpack[DrawingOptions]
    ) -> list[Image.Image]: ...
    @overload
    def reconstruct(
        self,
        images: ImageArray | None = None,
        *,
        z: Embeddings | None = None,
        **drawing: Unpack[DrawingOptions],
    ) -> Image.Image | list[Image.Image]: ...
    @named(Drawing)
    def reconstruct(
        self,
        images: ImageLike | Sequence[ImageLike] | None = None,
        *,
        z: Embeddings | None = None,
        **drawing: Unpack[DrawingOptions],
    ) -> Image.Image | list[Image.Image]:
        """Reconstruct images from their caption embeddings alone.

        Args:
            images: One image or several.
            z: Instead of images, (Q, D) or (B, Q, D).
            **drawing: The fields of `Drawing`: seed, steps, guidance, sampler, negative, batch_size, progress.

        Returns:
            A PIL image for one, a list for several.
        """
        self._require("reconstruct", given_z=z is not None)
        embedding = self._embedding(images, z, drawing.get("batch_size", Drawing.batch_size))
        drawn = self.draw(self.context(embedding), **drawing)
        return drawn[0] if _is_single(images, z) else drawn

    @overload
    def generate(self, texts: str, **drawing: Unpack[DrawingOptions]) -> Image.Image: ...
    @overload
    def generate(
        self, texts: list[str] | tuple[str, ...], **drawing: Unpack[DrawingOptions]
    ) -> list[Image.Image]: ...
    @named(Drawing)
    def generate(
        self, texts: str | Sequence[str], **drawing: Unpack[DrawingOptions]
    ) -> Image.Image | list[Image.Image]:
        """Generate images from text with the same frozen decoder.

        Args:
            texts: One text or several. Text beyond the text tower's length is cut, with a warning.
            **drawing: The fields of `Drawing`: seed, steps, guidance, sampler, negative, batch_size, progress.

        Returns:
            A PIL image for one text, a list for several.
        """
        self._require("generate")
        given = [texts] if isinstance(texts, str) else texts
        is_texts = isinstance(given, Sequence) and all(isinstance(text, str) for text in given)
        if not is_texts or not given:
            raise ConfigError(f"generate takes one text or a list of texts, got {texts!r:.40}")
        with at_work(self, *self.decoder.towers):
            encoded = self.decoder.encode_text(given)
        if encoded.num_truncated:
            logger.warning(
                "%d of %d texts are longer than the text tower's %d tokens and were cut",
                encoded.num_truncated,
                len(encoded.c),
                self.decoder.num_positions,
            )
        drawn = self.draw(encoded.c, **drawing)
        return drawn[0] if isinstance(texts, str) else drawn

    @named(Drawing)
    def draw(self, c: Context, **drawing: Unpack[DrawingOptions]) -> list[Image.Image]:
        """Sample one image per context.

        Args:
            c: B contexts.
            **drawing: The fields of `Drawing`: seed, steps, guidance, sampler, negative, batch_size, progress.

        Returns:
            B images of `image_size`.
        """
        how = Drawing(**drawing)
        _check_negative(how)
        given = list(how.seed) if isinstance(how.seed, Sequence) else [how.seed] * len(c)
        seeds = [whole_number("seed", value, 0, MAX_SEED) for value in given]
        if len(seeds) != len(c):
            raise ConfigError(f"{len(c)} images need as many seeds, got {len(seeds)}")
        size = self.image_size
        images: list[Image.Image] = []
        with at_work(self, *self.decoder.components):
            for rows in chunks(range(len(c)), how.batch_size, how.progress, "sampling"):
                part = slice(rows.start, rows.stop)
                pixels = self.decoder.sample(
                    c[part],
                    seeds=seeds[part],
                    steps=how.steps,
                    guidance=how.guidance,
                    sampler=how.sampler,
                    height=size,
                    width=size,
                    null=how.negative,
                )
                images += [to_pil(image) for image in pixels]
        return images


def _check_negative(how: Drawing) -> None:
    if how.negative is None:
        return
    if how.guidance == 1:
        raise ConfigError("guidance 1 leads away from nothing; raise it, or leave the negative out")
    if len(how.negative) != 1:
        raise ConfigError(f"the negative is one context, got {len(how.negative)}")


def _is_single(images: ImageLike | Sequence[ImageLike] | None, z: Embeddings | None) -> bool:
    return is_single(images) if z is None else as_embeddings(z).ndim == 2


# so that DiffusionPipeline.from_pretrained finds the class that a model folder names
setattr(diffusers, VLVPipeline.__name__, VLVPipeline)
