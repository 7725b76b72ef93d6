"""The frozen decoder as a judge of captions: how well they explain their images, and which sentences are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, Unpack, overload

import torch

from vlv.errors import ConfigError
from vlv.models.arguments import named
from vlv.models.calibration import Calibration
from vlv.models.doubts import Evidence, ReadClaims, Verdict, gather_evidence, judge, no_claims
from vlv.models.embedding import EmbeddingPipeline
from vlv.models.pixels import ImageLike, OneImage, as_list, is_single
from vlv.models.placement import at_work
from vlv.models.scoring import Scores, Scoring, ScoringOptions, score_captions

I = TypeVar("I", bound=ImageLike)  # noqa: E741


class JudgingPipeline(EmbeddingPipeline):
    """Components with the frozen decoder's judgement of captions."""

    @overload
    def score(
        self, images: OneImage, captions: str | Sequence[str], **scoring: Unpack[ScoringOptions]
    ) -> Scores: ...
    @overload
    def score(
        self,
        images: list[I] | tuple[I, ...],
        captions: Sequence[str | Sequence[str]],
        **scoring: Unpack[ScoringOptions],
    ) -> list[Scores]: ...
    @named(Scoring)
    @torch.no_grad()
    def score(
        self,
        images: ImageLike | Sequence[ImageLike],
        captions: str | Sequence[str | Sequence[str]],
        **scoring: Unpack[ScoringOptions],
    ) -> Scores | list[Scores]:
        """Ask the frozen decoder how well captions, by whomever, explain their images.

        Where the model has an encoder, the image's own caption embedding is scored beside them.

        Args:
            images: One image or several.
            captions: Of one image, a text or several; of several images, one text or list of texts for each.
            **scoring: The fields of `Scoring`: timesteps, lowest, highest, seed, batch_size.

        Returns:
            Scores for one image, a list for several.

        Raises:
            ConfigError: Images and captions do not match, or a loss is not finite.
            DataError: A caption is empty.
        """
        self._require("generate")
        single = is_single(images)
        texts = _texts([captions] if single else captions)
        given, how = as_list(images), Scoring(**scoring)
        c = None if self.encoder is None else self.context(self.embed(given))
        with at_work(self, *self.decoder.components):
            scores = score_captions(self.decoder, self._latents(given), texts, how, c=c)
        return scores[0] if single else scores

    @named(Scoring)
    @torch.no_grad()
    def weigh(
        self,
        images: ImageLike | Sequence[ImageLike],
        captions: str | Sequence[str],
        *,
        read_claims: ReadClaims = no_claims,
        **scoring: Unpack[ScoringOptions],
    ) -> list[Evidence]:
        """Like `verify`, but the evidence alone: what leaving out and exchanging words changes; no calibration is needed."""
        self._require("generate")
        given, how = as_list(images), Scoring(**scoring)
        texts = [
            one for (one,) in _texts([captions] if isinstance(captions, str) else captions, most=1)
        ]
        c = None if self.encoder is None else self.context(self.embed(given))
        with at_work(self, *self.decoder.components):
            latents = self._latents(given)
            return gather_evidence(self.decoder, latents, texts, how, read_claims=read_claims, c=c)

    @overload
    def verify(
        self,
        images: OneImage,
        captions: str,
        *,
        read_claims: ReadClaims = no_claims,
        calibration: Calibration | None = None,
        **scoring: Unpack[ScoringOptions],
    ) -> Verdict: ...
    @overload
    def verify(
        self,
        images: list[I] | tuple[I, ...],
        captions: Sequence[str],
        *,
        read_claims: ReadClaims = no_claims,
        calibration: Calibration | None = None,
        **scoring: Unpack[ScoringOptions],
    ) -> list[Verdict]: ...
    @named(Scoring)
    def verify(
        self,
        images: ImageLike | Sequence[ImageLike],
        captions: str | Sequence[str],
        *,
        read_claims: ReadClaims = no_claims,
        calibration: Calibration | None = None,
        **scoring: Unpack[ScoringOptions],
    ) -> Verdict | list[Verdict]:
        """Ask the frozen decoder which sentences of captions, by whomever, are wrong.

        Args:
            images: One image or several.
            captions: One of each image.
            read_claims: Finds the claims that are exchanged for their alternatives, in the grammar that the model was
                calibrated with; by default words are left out, and none is exchanged.
            calibration: From evidence to probabilities; None is that of the model.
            **scoring: The fields of `Scoring`: timesteps, lowest, highest, seed, batch_size.

        Returns:
            A verdict for one image, a list for several.

        Raises:
            ConfigError: Images and captions do not match, a loss is not finite, or there is no calibration.
            DataError: A caption is empty.
        """
        calibration = calibration or self.calibration
        if not isinstance(calibration, Calibration):
            raise ConfigError(
                f"the model {self._name()} has no calibration of doubts; pass another model's as calibration="
            )
        found = self.weigh(images, captions, read_claims=read_claims, **scoring)
        verdicts = [judge(evidence, calibration) for evidence in found]
        return verdicts[0] if is_single(images) else verdicts


def _texts(captions: object, most: int | None = None) -> list[list[str]]:
    """The captions of each image, at least one and at most so many.

    Raises:
        ConfigError: They are something else.
    """
    rows = captions if isinstance(captions, list | tuple) else []
    lists = [[x] if isinstance(x, str) else x for x in rows]
    fit = [
        isinstance(x, list | tuple)
        and 0 < len(x) <= (most or len(x))
        and all(isinstance(text, str) for text in x)
        for x in lists
    ]
    if not fit or not all(fit):
        wanted = "one text for each image" if most == 1 else "one text or several for each image"
        raise ConfigError(f"captions are {captions!r:.60}; give {wanted}")
    return [list(x) for x in lists]
