"""What every encoder is, whatever reads the image. Shapes: B batch, N image tokens, Q queries, d their width, D text width, H W pixels."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlv.errors import ConfigError
from vlv.models.bottleneck import BottleneckSettings, DiscreteBottleneck, Draw, as_dictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncoderParts = Literal["none", "language", "all"]

_PIXELS_AT_ONCE = 16 * 768 * 768


class ImageEncoder(PreTrainedModel):
    """Image to caption embedding, in two halves.

    ``forward`` is ``encode_features(image_features(pixels))``; the halves are public so that the
    features of a frozen vision tower can be cached. Where the encoder has a discrete bottleneck, z
    passes it at the end of the second half.
    """

    bottleneck: DiscreteBottleneck | None
    """What makes z discrete; None, as in the paper, leaves it continuous."""

    base_model_prefix = ""
    main_input_name = "pixels"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def image_features(self, pixels: Tensor) -> Tensor:
        """The image tokens of the vision tower.

        Where no gradient passes through the tower it reads a few images at a time: what it makes of large images in between
        fills a GPU long before the language models do.

        Args:
            pixels: (B, 3, H, W), float in [0, 1] or uint8, any size.

        Returns:
            (B, N, d).
        """
        learns = any(p.requires_grad for part in self.vision() for p in part.parameters())
        if learns and torch.is_grad_enabled():
            return self.look(pixels)
        count = max(1, _PIXELS_AT_ONCE // self.config.image_size**2)
        pieces = [self.look(piece) for piece in torch.split(pixels, count)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    @abstractmethod
    def look(self, pixels: Tensor) -> Tensor:
        """`image_features` of all images at once."""

    @abstractmethod
    def project_features(self, features: Tensor) -> Tensor:
        """From image tokens (B, N, d) to z (B, Q, D) before any bottleneck."""

    @abstractmethod
    def vision(self) -> tuple[nn.Module, ...]:
        """The modules that read the image, which are frozen unless everything trains; the first is called as such."""

    @abstractmethod
    def language(self) -> tuple[nn.Module, ...]:
        """The transformers between the image tokens and the projector, each called as such."""

    @property
    def num_queries(self) -> int:
        """Q, the length of the caption embedding."""
        return int(self.config.num_queries)

    def encode_features(self, features: Tensor, draw: Draw | None = None) -> Tensor:
        """From image tokens to the caption embedding.

        Args:
            features: (B, N, d), from `image_features`.
            draw: Of a training step, for a bottleneck that draws.

        Returns:
            z, (B, Q, D).
        """
        z = self.project_features(features)
        return z if self.bottleneck is None else self.bottleneck(z, draw)

    def forward(self, pixels: Tensor, draw: Draw | None = None) -> Tensor:
        """Encode images.

        Args:
            pixels: (B, 3, H, W), float in [0, 1] or uint8, any size.
            draw: Of a training step, for a bottleneck that draws.

        Returns:
            The caption embedding z, (B, Q, D).
        """
        return self.encode_features(self.image_features(pixels), draw)

    def discretize(self, codebook: Tensor, settings: BottleneckSettings) -> None:
        """Put a discrete bottleneck behind the projector of a fresh encoder.

        Args:
            codebook: The text tower's token table, (V, D); it is copied.
            settings: Kind and schedule.
        """
        bottleneck = DiscreteBottleneck(settings, codebook.shape[1])
        bottleneck.codebook = codebook.detach().clone()
        self.bottleneck = bottleneck
        self.config.bottleneck = as_dictionary(settings)

    def token_ids(self, z: Tensor) -> Tensor:
        """What a discrete z says, as ids of the text tower's tokens.

        Args:
            z: (..., Q, D).

        Returns:
            (..., Q); of a z that is no longer rows of the table, such as an average, the best-fitting tokens.

        Raises:
            ConfigError: The encoder's z is continuous.
        """
        if self.bottleneck is None:
            raise ConfigError(
                "the encoder's z is continuous and has no token ids; train one with model.bottleneck "
                "nearest or gumbel"
            )
        return self.bottleneck.ids(z.to(self.bottleneck.codebook.device))

    def token_texts(self, z: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """What discrete z (B, Q, D) say, as B texts by the text tower's tokenizer, special tokens left out."""
        ids = self.token_ids(z).tolist()
        return [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in ids]

    def trainable(self, parts: EncoderParts) -> list[nn.Parameter]:
        """Choose what trains, by setting ``requires_grad``.

        Args:
            parts: "language" is the paper's choice, all but what reads the image: of Florence-2 its
                language encoder and decoder, of another backbone the small transformer, and of both
                the queries and the projector. "all" trains everything, "none" nothing.

        Returns:
            The trainable parameters.
        """
        self.requires_grad_(parts != "none")
        if parts == "language":
            for module in self.vision():
                module.requires_grad_(False)
        self.train(self.training)
        return [p for p in self.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> Self:
        """Switch modes; frozen vision modules stay in eval mode, for drop path would blur them."""
        super().train(mode)
        for module in self.vision():
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self
