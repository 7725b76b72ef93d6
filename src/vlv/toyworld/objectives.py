"""What the small pretrained parts learn, one objective each; `vlv.training.loop.fit` trains them.

Their batches come from `vlv.toyworld.table` and lie on the device, where everything random is drawn as well, from a
generator that the given one seeds. Shapes: B batch, H W pixels, k h w latents, L text tokens, D text width, K columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartTokenizer,
    CLIPTextModel,
    Florence2ForConditionalGeneration,
    Qwen2ForCausalLM,
)

from vlv.models.arguments import present
from vlv.models.diffusion import DiffusionDecoder, Posterior
from vlv.models.text_tower import tokenize
from vlv.toyworld.components import IMAGE_SIZE, PROMPTS, TASKS, Task
from vlv.toyworld.inspector import Inspector, InspectorConfig, inspection_loss
from vlv.toyworld.table import labels_of
from vlv.toyworld.writing import Form
from vlv.training.objective import Batch, Losses

FOREGROUND_WEIGHT = 10.0
"""Weight of a pixel inside an object's box in the VAE's loss: objects cover a tenth of an image."""
LATENT_WEIGHT = 3.0
"""Weight of a latent position inside an object's box in the teacher's loss."""


def pixels_of(batch: Batch) -> Tensor:
    """Float pixels (B, 3, H, W) in [0, 1] of a batch."""
    pixels: Tensor = batch["pixels"]
    return pixels.float() / 255


def beside(generator: torch.Generator, tensor: Tensor) -> torch.Generator:
    """A generator on a tensor's device, seeded by the given one."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(tensor.device).manual_seed(seed)


def box_weights(boxes: Tensor, side: int, image: int, weight: float) -> Tensor:
    """Loss weights (B, 1, side, side) with mean 1: `weight` times as much where an object is.

    Args:
        boxes: Pixel boxes (B, K, 4) of left, top, right, bottom; zeros where there is no object.
        side: Positions along an edge of what is weighted.
        image: Pixels along an edge.
        weight: Of the positions that a box touches.
    """
    factor = image // side
    place = torch.arange(side, device=boxes.device)
    left, top, right, bottom = boxes.long().unbind(-1)  # (B, K) each
    across = _between(place, left, right, factor)
    down = _between(place, top, bottom, factor)
    inside = (down[..., :, None] & across[..., None, :]).any(1, keepdim=True)
    weights = torch.where(inside, weight, 1.0)
    return weights / weights.mean()


def _between(place: Tensor, low: Tensor, high: Tensor, factor: int) -> Tensor:
    """Which positions (side) a stretch of pixels touches, (B, K, side)."""
    first, last = low // factor, -(-high // factor)
    return (place >= first[..., None]) & (place < last[..., None])


class VaeObjective:
    """Reconstruction, weighted towards the objects, and a weak pull of the latents to the normal.

    With a frozen encoder the latents stay what they are, and the decoder alone gets better.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float = 1e-4) -> None:
        self.module: nn.Module = vae
        self.vae = vae
        self.kl_weight = kl_weight

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Absolute plus squared error of the pixels, and the Kullback-Leibler term."""
        target = pixels_of(batch) * 2 - 1
        posterior = self.vae.encode(target).latent_dist
        noise = torch.empty_like(posterior.mean).normal_(generator=beside(generator, target))
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - target
        side = target.shape[-1]
        weights = box_weights(batch["boxes"], side, side, FOREGROUND_WEIGHT)
        reconstruction = (weights * (error.abs() + 5 * error.square())).mean()
        kl = posterior.kl().mean() / noise[0].numel()
        squared = (error.detach() / 2).square().mean()
        return Losses(
            reconstruction + self.kl_weight * kl, {"kl": kl.detach(), "psnr": -10 * squared.log10()}
        )


class InspectorObjective:
    """Everything that is in an image; blurred and noisy copies keep it from judging sharpness."""

    def __init__(self, inspector: Inspector) -> None:
        self.module: nn.Module = inspector
        self.inspector = inspector

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Cross-entropies of all facts plus the box error."""
        pixels = pixels_of(batch)
        pixels = _degrade(pixels, beside(generator, pixels))
        return Losses(inspection_loss(self.inspector(pixels), labels_of(batch)))


def _degrade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by a random amount and add a little noise; (B, 3, H, W) in and out."""
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    one_each = pixels.new_empty(len(pixels), 1, 1, 1)
    share = torch.empty_like(one_each).uniform_(generator=generator)
    level = 0.04 * torch.empty_like(one_each).uniform_(generator=generator)
    mixed = pixels + (blurred - pixels) * share.square()
    return (mixed + level * torch.empty_like(pixels).normal_(generator=generator)).clamp(0, 1)


class ImageTower(nn.Module):
    """The image side of the contrastive pretraining; it is thrown away afterwards."""

    def __init__(self, inspector_like: Inspector, width: int) -> None:
        super().__init__()
        self.body = inspector_like
        features = 4 * inspector_like.config.channels[-1]
        self.project = nn.Linear(features, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to image embeddings (B, D)."""
        embeddings: Tensor = self.project(self.body.features(pixels).flatten(1))
        return embeddings


class TextReader(Inspector):
    """The inspector's questions put to the text tower's tokens instead of an image."""

    def __init__(self, width: int) -> None:
        super().__init__(InspectorConfig(channels=[16, 16, width]))
        self.body = nn.Sequential()


class TextTowerObjective:
    """CLIP's contrastive loss between captions and images, and reading.

    What a caption says of each object must stand in its tokens: the real tower learns that from
    billions of pairs.
    """

    shares: dict[Form, float] = {"tags": 0.4, "detailed": 0.6}  # noqa: RUF012

    def __init__(self, text_encoder: CLIPTextModel, images: ImageTower, reader: TextReader) -> None:
        self.text_encoder, self.images, self.reader = text_encoder, images, reader
        self.scale = nn.Parameter(torch.tensor(2.6))
        self.module: nn.Module = nn.ModuleDict(
            {"text_encoder": text_encoder, "images": images, "reader": reader}
        )
        self.module.register_parameter("scale", self.scale)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Symmetric cross-entropy over the batch, plus the reading loss."""
        del generator
        output = self.text_encoder(input_ids=batch["texts"].long())
        texts = F.normalize(output.pooler_output.float(), dim=-1)
        images = F.normalize(self.images(pixels_of(batch)).float(), dim=-1)
        logits = self.scale.exp().clamp(max=100) * texts @ images.T
        labels = torch.arange(len(logits), device=logits.device)
        contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        reading = self._reading(output.last_hidden_state, labels_of(batch))
        accuracy = (logits.argmax(-1) == labels).float().mean()
        parts = {"contrast": contrast, "reading": reading, "accuracy": accuracy}
        return Losses(contrast + reading, {k: v.detach() for k, v in parts.items()})

    def _reading(self, tokens: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of all facts but the boxes, read from tokens (B, L, D)."""
        said = {fact: values for fact, values in labels.items() if fact != "box"}
        return inspection_loss(self.reader.answer(self.reader.read(tokens)), said)


class TeacherObjective:
    """The U-Net and its text tower, told in words what is in the image.

    They learn together: unseen pairs and relations need a tower that says what the U-Net has to draw. Captions are
    dropped for one image in ten, so that guidance has its unconditional branch.
    """

    shares: dict[Form, float] = {"short": 0.05, "tags": 0.2, "detailed": 0.35, "plain": 0.4}  # noqa: RUF012

    def __init__(self, decoder: DiffusionDecoder, dropout: float = 0.1) -> None:
        assert decoder.unet is not None
        decoder.freeze()
        for part in (decoder.unet, decoder.text_encoder):
            part.requires_grad_(True)
        self.decoder, self.dropout = decoder, dropout
        self.module: nn.Module = decoder
        self.empty, _ = tokenize(
            present(decoder.tokenizer, "tokenizer"), decoder.text_encoder, [""]
        )

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Denoising loss of cached latents (posterior mean and standard deviation), given `texts`."""
        mean, std = batch["latents_mean"].float(), batch["latents_std"].float()
        generator = beside(generator, mean)
        latents = self.decoder.draw_latents(Posterior(mean, std), generator)
        c = self.decoder.context(self.decoder.token_embeddings(self._texts(batch, generator)))
        # Objects cover little of an image, and shape and surface stand in few of their positions.
        weights = box_weights(batch["boxes"], latents.shape[-1], IMAGE_SIZE, LATENT_WEIGHT)
        # High noise is where an image has to come from its text, and the words take longest to learn.
        return Losses(
            self.decoder.denoising_loss(latents, c, generator, sampling="text", weights=weights)
        )

    def _texts(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Token ids (B, L), some of them those of the empty text."""
        ids = batch["texts"].long()
        self.empty = self.empty.to(ids.device)
        draw = torch.empty(len(ids), 1, device=ids.device).uniform_(generator=generator)
        return torch.where(draw < self.dropout, self.empty, ids)


class VisionReader(Inspector):
    """The inspector's questions put to Florence-2's image tokens."""

    def __init__(
        self, florence: Florence2ForConditionalGeneration, normalise: tuple[Tensor, Tensor]
    ) -> None:
        vision: Any = florence.config.vision_config
        super().__init__(InspectorConfig(channels=[16, 16, vision.projection_dim]))
        self.body = nn.Sequential()
        self.florence, self.normalise = florence, normalise

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 64, 64) in [0, 1] to features (B, 1 + K, F)."""
        mean, std = (values.to(pixels.device) for values in self.normalise)
        tokens = self.florence.model.get_image_features((pixels - mean) / std).pooler_output
        return self.read(tokens[:, 1:])


class FlorenceObjective:
    """Florence-2's captioning tasks: each batch is one task with its prompt."""

    shares: dict[Task, float] = {"short": 0.15, "tags": 0.5, "detailed": 0.35}  # noqa: RUF012

    def __init__(
        self,
        florence: Florence2ForConditionalGeneration,
        tokenizer: BartTokenizer,
        normalise: tuple[Tensor, Tensor],
    ) -> None:
        self.module: nn.Module = florence
        self.florence, self.tokenizer, self.normalise = florence, tokenizer, normalise

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Cross-entropy of the caption tokens and the end token; the texts of every task are a column of its name."""
        draw = torch.rand((), generator=generator).item()
        bounds = np.cumsum([self.shares[task] for task in TASKS])
        task = TASKS[min(int(np.searchsorted(bounds, draw)), len(TASKS) - 1)]
        ids = batch[task].long()
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == self.tokenizer.pad_token_id, -100)
        pixels = pixels_of(batch)
        mean, std = (values.to(pixels.device) for values in self.normalise)
        inputs = (pixels - mean) / std
        logits = caption_logits(self.florence, self.tokenizer, inputs, task, ids[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        right = ((logits.argmax(-1) == labels) & (labels >= 0)).sum() / (labels >= 0).sum()
        return Losses(loss, {"accuracy": right.detach()})


def caption_logits(
    florence: Florence2ForConditionalGeneration,
    tokenizer: BartTokenizer,
    inputs: Tensor,
    task: Task,
    decoder_ids: Tensor,
) -> Tensor:
    """Next-token logits (B, L, vocabulary) of Florence-2 for one task.

    Args:
        florence: The model.
        tokenizer: Its tokenizer.
        inputs: Normalised pixels (B, 3, H, W).
        task: The captioning task.
        decoder_ids: What was written so far (B, L), from the start token on.
    """
    memory = caption_memory(florence, tokenizer, inputs, task)
    hidden = florence.model.language_model.decoder(
        input_ids=decoder_ids, encoder_hidden_states=memory, use_cache=False
    ).last_hidden_state
    logits: Tensor = florence.lm_head(hidden)
    return logits


def caption_memory(
    florence: Florence2ForConditionalGeneration,
    tokenizer: BartTokenizer,
    inputs: Tensor,
    task: Task,
) -> Tensor:
    """What Florence-2's decoder looks at: image tokens and the task's prompt, encoded."""
    image = florence.model.get_image_features(inputs).pooler_output
    ids = torch.tensor(tokenizer(PROMPTS[task]).input_ids, device=image.device)
    prompt = florence.get_input_embeddings()(ids).expand(len(image), -1, -1)
    encoder = florence.model.language_model.encoder
    memory: Tensor = encoder(inputs_embeds=torch.cat((image, prompt), 1)).last_hidden_state
    return memory


class LlmObjective:
    """A language model of the world's texts alone: it never sees an image."""

    def __init__(self, llm: Qwen2ForCausalLM) -> None:
        self.module: nn.Module = llm
        self.llm = llm

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Next-token cross-entropy of whole texts with their end token, which is the padding as well."""
        del generator
        ids = batch["texts"].long()
        is_end = ids == self.llm.config.eos_token_id
        is_text = (is_end.cumsum(1) - is_end.long()) == 0
        logits = self.llm(input_ids=ids, attention_mask=is_text.long()).logits
        labels = ids.masked_fill(~is_text, -100)[:, 1:]
        return Losses(F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten()))
