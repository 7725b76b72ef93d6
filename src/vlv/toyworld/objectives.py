"""What the small pretrained parts learn, one objective each; `vlv.training.loop.fit` trains them.

Shapes: B batch, H W pixels, k h w latents, L text tokens, D text width.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    Florence2ForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from vlv.models.diffusion import DiffusionDecoder, Posterior
from vlv.models.text_tower import tokenize
from vlv.toyworld.components import IMAGE_SIZE, PROMPTS, TASKS
from vlv.toyworld.inspector import Inspector, InspectorConfig, encode_scenes, inspection_loss
from vlv.toyworld.questions import ask
from vlv.toyworld.scene import Scene
from vlv.toyworld.writing import FORMS, Form, describe
from vlv.training.objective import Batch, Losses

FOREGROUND_WEIGHT = 10.0
"""Weight of a pixel inside an object's box in the VAE's loss: objects cover a tenth of a picture."""
LATENT_WEIGHT = 3.0
"""Weight of a latent position inside an object's box in the teacher's loss."""


def scenes_of(batch: Batch) -> list[Scene]:
    """The scenes behind a batch of rendered images."""
    return [Scene.from_dict(meta["scene"]) for meta in batch["meta"]]


def pixels_of(batch: Batch) -> Tensor:
    """Float pixels (B, 3, H, W) in [0, 1] of a batch."""
    return cast("Tensor", batch["pixels"]).float() / 255


def draw_captions(
    scenes: list[Scene], shares: dict[Form, float], generator: torch.Generator
) -> list[str]:
    """A fresh caption of every scene, its form drawn with the given shares."""
    rng = _numpy(generator)
    forms = rng.choice(len(FORMS), size=len(scenes), p=[shares.get(f, 0.0) for f in FORMS])
    return [describe(scene, FORMS[i], rng) for scene, i in zip(scenes, forms, strict=True)]


def _numpy(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def foreground_weights(batch: Batch) -> Tensor:
    """Loss weights (B, 1, H, W): `FOREGROUND_WEIGHT` inside the objects' boxes, 1 elsewhere."""
    weights = torch.ones(len(batch["meta"]), 1, *batch["pixels"].shape[-2:])
    for row, meta in enumerate(batch["meta"]):
        for left, top, right, bottom in meta["boxes"]:
            weights[row, :, top:bottom, left:right] = FOREGROUND_WEIGHT
    return weights


def latent_weights(batch: Batch, side: int) -> Tensor:
    """Loss weights of latents (B, 1, side, side): `LATENT_WEIGHT` where an object is, with mean 1."""
    weights = torch.ones(len(batch["meta"]), 1, side, side)
    factor = IMAGE_SIZE // side
    for row, meta in enumerate(batch["meta"]):
        for left, top, right, bottom in meta["boxes"]:
            rows = slice(top // factor, -(-bottom // factor))
            weights[row, :, rows, left // factor : -(-right // factor)] = LATENT_WEIGHT
    return weights / weights.mean()


class VaeObjective:
    """Reconstruction, weighted towards the objects, and a weak pull of the latents to the normal.

    With a frozen encoder the latents stay what they are, and the decoder alone gets better.
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float = 1e-4) -> None:
        self.module = cast("nn.Module", vae)
        self.vae: Any = vae
        self.kl_weight = kl_weight

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Absolute plus squared error of the pixels, and the Kullback-Leibler term."""
        target = pixels_of(batch) * 2 - 1
        posterior = self.vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded - target
        weights = foreground_weights(batch)
        weights = weights / weights.mean()
        reconstruction = (weights * (error.abs() + 5 * error.square())).mean()
        kl = posterior.kl().mean() / noise[0].numel()
        squared = (error.detach() / 2).square().mean()
        return Losses(
            reconstruction + self.kl_weight * kl,
            {"kl": kl.detach(), "psnr": -10 * squared.log10()},
        )


class InspectorObjective:
    """Everything that is in a picture; blurred and noisy copies keep it from judging sharpness."""

    def __init__(self, inspector: Inspector) -> None:
        self.module: nn.Module = inspector
        self.inspector = inspector

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Cross-entropies of all facts plus the box error."""
        pixels = _degrade(pixels_of(batch), generator)
        return Losses(inspection_loss(self.inspector(pixels), encode_scenes(scenes_of(batch))))


def _degrade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by a random amount and add a little noise; (B, 3, H, W) in and out."""
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(len(pixels), 1, 1, 1, generator=generator)
    level = 0.04 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    mixed = pixels + (blurred - pixels) * share.square()
    return (mixed + level * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)


class ImageTower(nn.Module):
    """The image side of the contrastive pretraining; it is thrown away afterwards."""

    def __init__(self, inspector_like: Inspector, width: int) -> None:
        super().__init__()
        self.body = inspector_like
        features = 4 * inspector_like.config.channels[-1]
        self.project = nn.Linear(features, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] to image embeddings (B, D)."""
        return cast("Tensor", self.project(self.body.features(pixels).flatten(1)))


class TextReader(Inspector):
    """The inspector's questions put to the text tower's tokens instead of a picture."""

    def __init__(self) -> None:
        super().__init__(InspectorConfig())
        self.body = nn.Sequential()


class TextTowerObjective:
    """CLIP's contrastive loss between captions and images, and reading.

    What a caption says of each object must stand in its tokens: the real tower learns that from
    billions of pairs.
    """

    shares: dict[Form, float] = {"tags": 0.4, "detailed": 0.6}  # noqa: RUF012

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        images: ImageTower,
        reader: TextReader,
    ) -> None:
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.images, self.reader = images, reader
        self.scale = nn.Parameter(torch.tensor(2.6))
        self.module: nn.Module = nn.ModuleDict(
            {"text_encoder": text_encoder, "images": images, "reader": reader}
        )
        self.module.register_parameter("scale", self.scale)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Symmetric cross-entropy over the batch, plus a share of the reading loss."""
        scenes = scenes_of(batch)
        captions = draw_captions(scenes, self.shares, generator)
        ids, _ = tokenize(self.tokenizer, self.text_encoder, captions)
        output = self.text_encoder(input_ids=ids)
        texts = F.normalize(output.pooler_output, dim=-1)
        images = F.normalize(self.images(pixels_of(batch)), dim=-1)
        logits = self.scale.exp().clamp(max=100) * texts @ images.T
        labels = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        reading = self._reading(output.last_hidden_state, scenes)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        parts = {"contrast": contrast, "reading": reading, "accuracy": accuracy}
        return Losses(contrast + reading, {k: v.detach() for k, v in parts.items()})

    def _reading(self, tokens: Tensor, scenes: list[Scene]) -> Tensor:
        """Cross-entropy of all facts but the boxes, read from tokens (B, L, D)."""
        targets = encode_scenes(scenes)
        del targets["box"]
        return inspection_loss(self.reader.answer(self.reader.read(tokens)), targets)


class TeacherObjective:
    """The U-Net, told by the frozen text tower what is in the picture.

    Captions are dropped for one image in ten, so that guidance has its unconditional branch.
    """

    shares: dict[Form, float] = {"short": 0.1, "tags": 0.35, "detailed": 0.55}  # noqa: RUF012

    def __init__(self, decoder: DiffusionDecoder, dropout: float = 0.1) -> None:
        assert decoder.unet is not None
        decoder.freeze()
        cast("nn.Module", decoder.unet).requires_grad_(True)
        self.decoder, self.dropout = decoder, dropout
        self.module: nn.Module = decoder

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Denoising loss of cached latents (posterior mean and standard deviation)."""
        mean, std = batch["latents_mean"].float(), batch["latents_std"].float()
        latents = self.decoder.draw_latents(Posterior(mean, std), generator)
        captions = draw_captions(scenes_of(batch), self.shares, generator)
        dropped = (torch.rand(len(captions), generator=generator) < self.dropout).tolist()
        texts = ["" if d else c for c, d in zip(captions, dropped, strict=True)]
        with torch.no_grad():
            c = self.decoder.encode_text(texts).c
        weights = latent_weights(batch, latents.shape[-1])
        # High noise is where a picture has to come from its text, and the words take longest to learn.
        return Losses(
            self.decoder.denoising_loss(latents, c, generator, sampling="text", weights=weights)
        )


class VisionReader(Inspector):
    """The inspector's questions put to Florence-2's image tokens."""

    def __init__(
        self, florence: Florence2ForConditionalGeneration, normalise: tuple[Tensor, Tensor]
    ) -> None:
        super().__init__(InspectorConfig())
        self.body = nn.Sequential()
        self.florence, self.normalise = florence, normalise

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 64, 64) in [0, 1] to features (B, 1 + K, F)."""
        mean, std = self.normalise
        tokens = self.florence.model.get_image_features((pixels - mean) / std).pooler_output
        return self.read(tokens[:, 1:])


class FlorenceObjective:
    """Florence-2's captioning tasks: each batch is one task with its prompt."""

    shares: dict[Form, float] = {"short": 0.1, "tags": 0.7, "detailed": 0.2}  # noqa: RUF012

    def __init__(
        self,
        florence: Florence2ForConditionalGeneration,
        tokenizer: BartTokenizer,
        normalise: tuple[Tensor, Tensor],
    ) -> None:
        self.module: nn.Module = florence
        self.florence, self.tokenizer, self.normalise = florence, tokenizer, normalise

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Cross-entropy of the caption tokens and the end token."""
        rng = _numpy(generator)
        form = TASKS[int(rng.choice(len(TASKS), p=[self.shares[f] for f in TASKS]))]
        captions = [describe(scene, form, rng) for scene in scenes_of(batch)]
        rows = self.tokenizer(captions, padding=True, return_tensors="pt")
        labels = rows.input_ids[:, 1:].masked_fill(rows.attention_mask[:, 1:] == 0, -100)
        logits = caption_logits(
            self.florence, self.tokenizer, self._inputs(batch), form, rows.input_ids[:, :-1]
        )
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        right = ((logits.argmax(-1) == labels) & (labels >= 0)).sum() / (labels >= 0).sum()
        return Losses(loss, {f"accuracy_{form}": right.detach()})

    def _inputs(self, batch: Batch) -> Tensor:
        mean, std = self.normalise
        return (pixels_of(batch) - mean) / std


def caption_logits(
    florence: Florence2ForConditionalGeneration,
    tokenizer: BartTokenizer,
    inputs: Tensor,
    form: Form,
    decoder_ids: Tensor,
) -> Tensor:
    """Next-token logits (B, L, vocabulary) of Florence-2 for one task.

    Args:
        florence: The model.
        tokenizer: Its tokenizer.
        inputs: Normalised pixels (B, 3, H, W).
        form: The captioning task.
        decoder_ids: What was written so far (B, L), from the start token on.
    """
    memory = caption_memory(florence, tokenizer, inputs, form)
    hidden = florence.model.language_model.decoder(
        input_ids=decoder_ids, encoder_hidden_states=memory, use_cache=False
    ).last_hidden_state
    return cast("Tensor", florence.lm_head(hidden))


def caption_memory(
    florence: Florence2ForConditionalGeneration,
    tokenizer: BartTokenizer,
    inputs: Tensor,
    form: Form,
) -> Tensor:
    """What Florence-2's decoder looks at: image tokens and the task's prompt, encoded."""
    image = florence.model.get_image_features(inputs).pooler_output
    ids = torch.tensor(tokenizer(PROMPTS[form]).input_ids)
    prompt = florence.get_input_embeddings()(ids).expand(len(image), -1, -1)
    encoder = florence.model.language_model.encoder
    return cast("Tensor", encoder(inputs_embeds=torch.cat((image, prompt), 1)).last_hidden_state)


class LlmObjective:
    """A language model of the world's texts alone: it never sees an image.

    Captions of all forms, some followed by questions and answers, some by the same scene in other
    words: from that it learns to say in prose what stands tersely before it.
    """

    shares: dict[Form, float] = {"short": 0.1, "tags": 0.2, "detailed": 0.7}  # noqa: RUF012

    def __init__(self, llm: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
        self.module: nn.Module = llm
        self.llm, self.tokenizer = llm, tokenizer

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Next-token cross-entropy of whole texts with their end token."""
        scenes = scenes_of(batch)
        captions = draw_captions(scenes, self.shares, generator)
        rng = _numpy(generator)
        texts = [_with_more(s, t, rng) for s, t in zip(scenes, captions, strict=True)]
        end = cast("str", self.tokenizer.eos_token)
        rows = self.tokenizer([t + end for t in texts], padding=True, return_tensors="pt")
        logits = self.llm(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
        labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)[:, 1:]
        return Losses(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()))


def _with_more(scene: Scene, caption: str, rng: np.random.Generator) -> str:
    """Half of the texts say their scene twice, tersely and in prose; a quarter go on with questions."""
    draw = rng.random()
    if draw < 0.5:
        return f"{describe(scene, 'tags', rng)}\n{describe(scene, 'detailed', rng)}"
    if draw < 0.75:
        return caption
    questions = ask(scene, rng)
    chosen = [questions[i] for i in rng.permutation(len(questions))[:2]]
    return caption + "".join(f"\n{q.question} {q.answer}" for q in chosen)
