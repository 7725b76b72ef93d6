"""The straightforward way: what the authors' published code does in a step, written plainly on the same weights.

Their code was read, not copied. What costs time there and is kept here: float32 throughout; Florence-2's image processor
image by image with Pillow within the step; the vision tower's attention written out as matrix products; all hidden states
kept and a key-value cache filled for nothing; the VAE in every step; the U-Net and the language model always recomputed
in the backward pass; captions padded to 300 tokens with logits at all positions; the loss read in every step. What is left
out, as it would have made the two losses differ: noise of drop path in the frozen vision tower, and that the end of a
caption is not learnt. Their transformers run on SDPA, so they do here.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models import Models
    from vlv.models.encoder import VLVEncoder

PADDED_TOKENS = 300


def process(pixels: Tensor, encoder: VLVEncoder) -> Tensor:
    """Florence-2's image processor: Pillow resizes one image after the other, numpy normalises.

    Args:
        pixels: (B, 3, H, W), uint8.
        encoder: Says size, mean and standard deviation.

    Returns:
        (B, 3, S, S), float32.
    """
    config = encoder.config
    mean, std = np.float32(config.image_mean), np.float32(config.image_std)
    done = []
    for image in pixels:
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        pillow = pillow.resize((config.image_size, config.image_size), Image.Resampling.BICUBIC)
        levels = np.asarray(pillow).astype(np.float32) / 255
        done.append(torch.from_numpy((levels - mean) / std).permute(2, 0, 1))
    return torch.stack(done)


def encode(encoder: VLVEncoder, pixels: Tensor) -> Tensor:
    """Image to caption embedding, (B, 3, H, W) to (B, Q, D), with everything kept on the way."""
    backbone = encoder.backbone.model
    features = backbone.get_image_features(process(pixels, encoder)).pooler_output  # (B, N, d)
    language = backbone.language_model
    prompts = torch.tensor([list(encoder.config.prompt_ids)] * len(pixels))
    inputs = torch.cat([features, language.shared(prompts)], dim=1)  # (B, N + P, d)
    mask = torch.ones(inputs.shape[:2], dtype=torch.long)
    read = language.encoder(inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True)
    written = language.decoder(
        inputs_embeds=encoder.queries.expand(len(pixels), -1, -1),
        encoder_hidden_states=read.last_hidden_state,
        output_hidden_states=True,
        use_cache=True,
    )
    z: Tensor = encoder.projector(written.hidden_states[-1])
    return z


class Baseline(ABC):
    """One step of training, with forward and backward pass, clipping and AdamW.

    Args:
        models: Copied, so that another contestant starts from the same weights.
        lr: Of AdamW; 0 leaves the weights where they are.
    """

    def __init__(self, models: Models, lr: float = 1e-5) -> None:
        self.models = copy.deepcopy(models)
        self.encoder, self.decoder = self.models.encoder, self.models.decoder
        self.caption_decoder = self.models.caption_decoder
        self.encoder.trainable("language")
        self.encoder.backbone.model.vision_tower.set_attn_implementation("eager")
        self.prepare()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01)

    module: nn.Module

    @abstractmethod
    def prepare(self) -> None:
        """Say what trains and what is recomputed."""

    @abstractmethod
    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """The loss of a batch."""

    def step(self, batch: dict[str, Any], generator: torch.Generator) -> float:
        """Train on a batch; its loss."""
        loss = self.loss(batch, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class BaselineStage1(Baseline):
    """Denoising through the frozen U-Net."""

    def prepare(self) -> None:
        """The encoder's language model trains; the U-Net is recomputed."""
        self.module = self.encoder
        self.encoder.train()
        self.decoder.unet.enable_gradient_checkpointing()

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Equation 1, with the VAE in the step."""
        c = self.decoder.context(encode(self.encoder, batch["pixels"]))
        latents = self.decoder.encode(batch["pixels"], generator)
        return self.decoder.denoising_loss(latents, c, generator)


class BaselineStage2(Baseline):
    """Captions padded to `PADDED_TOKENS`."""

    def prepare(self) -> None:
        """Encoder, projector and language model train; the language model is recomputed."""
        self.caption_decoder.trainable("mlp+llm")
        self.module = nn.ModuleList([self.encoder, self.caption_decoder])
        self.module.train()
        self.caption_decoder.llm.activation_checkpointing_enable()

    def loss(self, batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        """Cross-entropy over the whole padded sequence, as the language model computes it from labels."""
        del generator
        c = self.decoder.context(encode(self.encoder, batch["pixels"]))
        prefix = self.caption_decoder.mlp(c.sequence)  # (B, Q, E)
        ids, labels, mask = self.padded(batch["captions"], prefix.shape[1])
        llm = self.caption_decoder.llm
        inputs = torch.cat([prefix, llm.get_input_embeddings()(ids)], dim=1)  # (B, Q + 300, E)
        loss: Tensor = llm(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
        return loss

    def padded(self, captions: Sequence[str], num_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, 300), labels (B, Q + 300) with -100 where nothing is learnt, and the mask of what is read."""
        tokens = self.caption_decoder.tokenize(captions, PADDED_TOKENS)
        missing = PADDED_TOKENS - tokens.ids.shape[1]
        ids = nn.functional.pad(tokens.ids, (0, missing))
        read = torch.arange(PADDED_TOKENS) < tokens.lengths[:, None]
        labels = ids.masked_fill(~read, -100)
        labels = nn.functional.pad(labels, (num_prefix, 0), value=-100)
        return ids, labels, nn.functional.pad(read.long(), (num_prefix, 0), value=1)
