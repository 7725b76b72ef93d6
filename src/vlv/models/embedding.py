"""The pipeline's first half: image to caption embedding, to context, to latents; and embeddings mixed.

Shapes: B batch, Q queries, D text width, k h w latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from vlv.errors import ConfigError
from vlv.models.arguments import Embeddings, as_embeddings, named, present
from vlv.models.batching import chunks
from vlv.models.components import VLVComponents
from vlv.models.context import Context
from vlv.models.mixing import MixMode, mix_embeddings
from vlv.models.pixels import ImageLike, as_batch, as_list, is_single
from vlv.models.placement import at_work


class EmbeddingPipeline(VLVComponents):
    """Components with the way from images to caption embeddings and contexts."""

    def _embedding(
        self, images: ImageLike | Sequence[ImageLike] | None, z: Embeddings | None, batch_size: int
    ) -> Tensor:
        """(B, Q, D) from either argument."""
        if (images is None) == (z is None):
            raise ConfigError(
                "give either images or a caption embedding z=, not both and not neither"
            )
        if z is None:
            return self.embed(as_list(images), batch_size=batch_size)
        z = as_embeddings(z)
        return z if z.ndim == 3 else z[None]

    # --- image to embedding ----------------------------------------------------------------------

    @named()
    @torch.no_grad()
    def embed(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Tensor:
        """Encode images.

        Args:
            images: One image or several.
            batch_size: Images encoded together.
            progress: Show a bar on stderr.

        Returns:
            The caption embedding z: (Q, D) for one image, (B, Q, D) for several.
        """
        self._require("embed")
        encoder = present(self.encoder, "encoder")
        zs = []
        with at_work(self, "encoder"):
            for chunk in chunks(as_list(images), batch_size, progress, "encoding"):
                pixels = as_batch(chunk, self.image_size, self.framing)
                zs.append(encoder(pixels.to(encoder.device)))
        z = torch.cat(zs)
        if not z.isfinite().all():
            raise ConfigError(
                f"the caption embedding is not finite: {str(z.dtype).removeprefix('torch.')} overflows in this encoder; "
                "choose bfloat16 or float32"
            )
        return z[0] if is_single(images) else z

    def read_tokens(
        self, images: ImageLike | Sequence[ImageLike] | None = None, *, z: Embeddings | None = None
    ) -> list[str]:
        """What a discrete bottleneck says of images or caption embeddings, as texts; see `ImageEncoder.token_ids`."""
        tokenizer = present(self.tokenizer, "tokenizer")
        return present(self.encoder, "encoder").token_texts(
            self._embedding(images, z, 16), tokenizer
        )

    @torch.no_grad()
    def context(self, z: Embeddings) -> Context:
        """From caption embeddings to contexts, (B, Q, D), or (Q, D) for one."""
        z, tower = as_embeddings(z), present(self.text_encoder, "text_encoder")
        longest, width = self.decoder.num_positions, self.decoder.text_width
        if z.shape[-2] > longest or z.shape[-1] != width:
            raise ConfigError(
                f"z has the shape {tuple(z.shape)}, but this text tower reads up to {longest} tokens of width {width}"
            )
        with at_work(self, *self.decoder.towers):
            return self.decoder.context((z if z.ndim == 3 else z[None]).to(tower.device))

    @named()
    def mix(
        self,
        items: Sequence[ImageLike | Embeddings],
        *,
        keep: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        mode: MixMode = "concat",
    ) -> Tensor:
        """Mix images, or caption embeddings, into one caption embedding; see `mix_embeddings`.

        Args:
            items: Images and caption embeddings (Q, D), in any combination.
            keep: Leading tokens kept of each, for "concat".
            weights: For "average" and "slerp".
            mode: How to mix.

        Returns:
            z, to be handed to `reconstruct` or `caption` as ``z=``.
        """
        if not isinstance(items, Iterable):
            raise ConfigError(f"a mix is one of several images or embeddings, got {items!r:.60}")
        given = list(items)
        images = [cast("ImageLike", x) for x in given if not _is_embedding(x)]
        # in one batch: faster, and the same rounding wherever a mix is asked for
        embedded = iter(self.embed(images)) if images else iter(())
        zs = [
            as_embeddings(cast("Tensor", x)) if _is_embedding(x) else next(embedded) for x in given
        ]
        return mix_embeddings(zs, keep=keep, weights=weights, mode=mode)

    def _latents(self, images: Sequence[ImageLike]) -> Tensor:
        """Latents (B, k, h, w) of images, of the posterior's mean."""
        pixels = as_batch(images, self.image_size, self.framing)
        return self.decoder.encode(pixels.to(present(self.vae, "vae").device))


def _is_embedding(x: object) -> bool:
    """Whether an item of a mix is (Q, D); images have three dimensions, or none."""
    return getattr(x, "ndim", 0) == 2 or isinstance(x, list)
