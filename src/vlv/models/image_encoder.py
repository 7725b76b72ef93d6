"""What every encoder is, whatever reads the image. Shapes: B batch, N image tokens, Q queries, d their width, D text width, H W pixels."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

EncoderParts = Literal["none", "language", "all"]


class ImageEncoder(PreTrainedModel):
    """Image to caption embedding, in two halves.

    ``forward`` is ``encode_features(image_features(pixels))``; the halves are public so that the
    features of a frozen vision tower can be cached.
    """

    base_model_prefix = ""
    main_input_name = "pixels"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    @abstractmethod
    def image_features(self, pixels: Tensor) -> Tensor:
        """The image tokens, (B, N, d), of pixels (B, 3, H, W), float in [0, 1] or uint8, any size."""

    @abstractmethod
    def encode_features(self, features: Tensor) -> Tensor:
        """From image tokens (B, N, d) to the caption embedding z, (B, Q, D)."""

    @abstractmethod
    def vision(self) -> tuple[nn.Module, ...]:
        """The modules that read the image, which are frozen unless everything trains."""

    @property
    def num_queries(self) -> int:
        """Q, the length of the caption embedding."""
        return int(self.config.num_queries)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels: (B, 3, H, W), float in [0, 1] or uint8, any size.

        Returns:
            The caption embedding z, (B, Q, D).
        """
        return self.encode_features(self.image_features(pixels))

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
