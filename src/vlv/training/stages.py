"""The method: two stages, each a choice of what trains and of which loss.

Shapes: B batch, R draws per image, Q queries, D text width, h w latents, L token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlv.config import LoopConfig, Stage1Config, Stage2Config
from vlv.data.texts import Text
from vlv.errors import DataError
from vlv.models.bottleneck import Draw
from vlv.models.captioner import CaptionDecoder
from vlv.models.context import Context
from vlv.models.diffusion import DiffusionDecoder, Posterior
from vlv.models.draws import RowGenerator
from vlv.models.encoder import VLVEncoder
from vlv.models.lora import let_train
from vlv.models.vision_encoder import VisionEncoder
from vlv.training.objective import Batch, Losses
from vlv.training.precision import compile_parts
from vlv.training.texts import captions_of, draw_texts, text_mix


class Stage1:
    """Images alone teach the encoder: z must tell the frozen diffusion decoder what the noise hides (paper, equation 1).

    Trains the encoder (Florence-2's language model, queries and projector; the vision tower too if `trainable` is "all").

    Args:
        encoder: Image to z.
        decoder: Frozen.
        config: What trains, timesteps, draws per image, warm start.
    """

    def __init__(
        self, encoder: VLVEncoder | VisionEncoder, decoder: DiffusionDecoder, config: Stage1Config
    ) -> None:
        encoder.trainable(config.trainable)
        decoder.freeze()
        self.encoder, self.decoder, self.config = encoder, decoder, config
        self.module = nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def compile(self, config: LoopConfig, device: torch.device) -> None:
        """Lay out and compile the parts as the settings say."""
        compile_parts(config, self.encoder, self.decoder, None, device)

    def phase(self, step: int) -> str:
        """Which losses count at a step: between two steps of one phase the work is the same."""
        warm = warm_start_share(step, self.config)
        return {0.0: "denoising", 1.0: "warm start"}.get(warm, "both")

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Denoising loss of `batch["pixels"]` (B, 3, H, W), with the latents from the batch where they are cached."""
        z = z_of(self.encoder, batch, generator)  # (B, Q, D)
        warm = warm_start_share(batch["step"], self.config)
        total, parts = z.new_zeros(()), {}
        if warm < 1:
            c = self.decoder.context(z)
            parts["denoising"] = denoising_loss(self.decoder, c, batch, generator, self.config)
            total = total + (1 - warm) * parts["denoising"]
        if warm > 0:
            parts["warm_start"] = warm_start_loss(self.decoder, z, batch)
            total = total + warm * parts["warm_start"]
        return Losses(total, parts)


class TextTokens(NamedTuple):
    """A text that is taught, as tokens."""

    instruction: list[int]
    """Empty for a plain caption."""
    answer: list[int]
    """With the end token where that is learnt."""


class Stage2:
    """Captions teach the caption decoder to read z (paper, equation 2), and the encoder if it trains.

    Our addition, off in the paper's preset: `denoising_weight` times the loss of stage 1 keeps the encoder's z readable
    for the diffusion decoder, so that one checkpoint both captions and reconstructs.

    Args:
        encoder: From stage 1; if it trains, all but the vision tower does.
        decoder: Frozen; without a denoising loss its text tower is enough.
        caption_decoder: psi and the language model.
        config: What trains, from when on, and the weight of the denoising loss.
    """

    def __init__(
        self,
        encoder: VLVEncoder | VisionEncoder,
        decoder: DiffusionDecoder,
        caption_decoder: CaptionDecoder,
        config: Stage2Config,
    ) -> None:
        encoder.trainable("language" if config.trainable == "mlp+llm+encoder" else "none")
        if config.frozen_queries:
            encoder.queries.requires_grad_(False)
            encoder.projector.requires_grad_(False)
        caption_decoder.trainable("mlp" if config.trainable == "mlp" else "mlp+llm")
        caption_decoder.config.ends_by_itself = config.supervise_end
        caption_decoder.find_head()
        decoder.freeze()
        self.encoder, self.decoder, self.caption_decoder = encoder, decoder, caption_decoder
        self.config, self.mix = config, text_mix(config)
        if not self.mix.is_plain or self.mix.lengths or self.mix.known:
            caption_decoder.config.styles = dict(self.mix.instructions)
            caption_decoder.config.answers_questions = self.mix.questions > 0
            caption_decoder.config.obeys_lengths = self.mix.lengths > 0
            caption_decoder.config.uses_known = self.mix.known > 0
        self.module = nn.ModuleDict(
            {"encoder": encoder, "decoder": decoder, "caption_decoder": caption_decoder}
        )

    def compile(self, config: LoopConfig, device: torch.device) -> None:
        """Lay out and compile the parts as the settings say."""
        compile_parts(config, self.encoder, self.decoder, self.caption_decoder, device)

    def phase(self, step: int) -> str:
        """Which parts are still frozen at a step."""
        until = {
            "language model": self.config.frozen_llm_steps,
            "encoder": self.config.frozen_encoder_steps,
        }
        return "frozen: " + ", ".join(name for name, steps in until.items() if step < steps)

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """Cross-entropy of the batch's texts given `batch["pixels"]` (B, 3, H, W), and the denoising loss."""
        self._freeze_llm(batch["step"] < self.config.frozen_llm_steps)
        frozen = batch["step"] < self.config.frozen_encoder_steps
        with torch.no_grad() if frozen else nullcontext():
            z = z_of(self.encoder, batch, generator)  # (B, Q, D)
            c = self.decoder.context(z)
        texts = [text for row in self._texts(batch) for text in row]  # M for each image
        cut = [self._cut(text.answer) for text in texts]
        before = [text.instruction for text in texts]
        how = self.config.batching
        caption = self.caption_decoder.loss_of_tokens(
            c.sequence, cut, instructions=before, batching=how, mean=self.config.loss_mean
        )
        total = caption = caption * batch.get("target_weight", 1.0)
        read = [[*i, *row] for i, row in zip(before, cut, strict=True)]
        shares = {
            "truncated_share": sum(len(x.answer) > len(y) for x, y in zip(texts, cut, strict=True))
            / len(texts),
            "padding_share": self.caption_decoder.padding_share(
                c.sequence.shape[1], read, batching=how
            ),
        }
        parts = {"caption": caption} | {k: caption.new_full((), v) for k, v in shares.items()}
        if self.config.denoising_weight > 0 and not frozen:
            parts["denoising"] = denoising_loss(self.decoder, c, batch, generator, self.config)
            total = total + self.config.denoising_weight * parts["denoising"]
        return Losses(total, parts)

    def prepare(self, batch: Batch, generator: RowGenerator) -> Batch:
        """The batch with `texts`, the tokens of M texts for each image: drawn, and made once for all passes."""
        return batch | {"texts": self._texts(batch, generator.row_seeds)}

    def num_targets(self, batch: Batch) -> list[int]:
        """Supervised tokens or texts of each image: the cross-entropy is a mean over all of a step, not of each pass."""
        if self.config.loss_mean == "texts":
            return [len(row) for row in self._texts(batch)]
        return [sum(len(self._cut(text.answer)) for text in row) for row in self._texts(batch)]

    def _texts(self, batch: Batch, row_seeds: Sequence[int] = ()) -> list[list[TextTokens]]:
        """(B, M); where nothing was drawn, plain captions."""
        if "texts" in batch:
            known: list[list[TextTokens]] = batch["texts"]
            return known
        count = self.config.texts_per_image
        if row_seeds:
            rows = draw_texts(batch, self.mix, count, row_seeds)
        else:
            rows = [[Text(None, caption)] * count for caption in captions_of(batch)]
        texts = [text for row in rows for text in row]
        answers = self.caption_decoder.token_rows(
            [text.answer for text in texts], with_end=self.config.supervise_end
        )
        before = self.caption_decoder.instruction_rows([text.instruction for text in texts])
        tokens = [TextTokens(*pair) for pair in zip(before, answers, strict=True)]
        return [tokens[start : start + count] for start in range(0, len(tokens), count)]

    def _cut(self, answer: list[int]) -> list[int]:
        return answer[: self.config.max_caption_tokens]

    def _freeze_llm(self, frozen: bool) -> None:
        """Let the gradient pass through the language model to psi, and leave none in it."""
        if self.config.trainable != "mlp":
            let_train(self.caption_decoder.llm, not frozen)


def z_of(encoder: VLVEncoder | VisionEncoder, batch: Batch, generator: torch.Generator) -> Tensor:
    """The caption embedding (B, Q, D) of the pixels, or of the features of a frozen vision tower that come along.

    Nothing is drawn unless the encoder has a bottleneck that draws.
    """
    draw = Draw(generator, batch["step"])
    if "features" not in batch:
        z: Tensor = encoder(batch["pixels"], draw)
        return z
    return encoder.encode_features(batch["features"].to(encoder.queries.dtype), draw)


def denoising_loss(
    decoder: DiffusionDecoder,
    c: Context,
    batch: Batch,
    generator: torch.Generator,
    config: Stage1Config | Stage2Config,
) -> Tensor:
    """Equation 1 with R draws of timestep and noise per image, all with the same c."""
    latents = latents_of(decoder, batch, generator).repeat_interleave(config.draws_per_image, 0)
    c = c.repeat_interleave(config.draws_per_image)  # B R rows
    return decoder.denoising_loss(latents, c, generator, sampling=config.timesteps)


def latents_of(decoder: DiffusionDecoder, batch: Batch, generator: torch.Generator) -> Tensor:
    """Scaled latents (B, 4, h, w), drawn from the VAE's posterior, which the batch may bring along."""
    if "latents_mean" not in batch:
        return decoder.encode(batch["pixels"], generator)
    mean, std = batch["latents_mean"].float(), batch["latents_std"].float()
    return decoder.draw_latents(Posterior(mean, std), generator)


def warm_start_share(step: int, config: Stage1Config) -> float:
    """Share of the warm start in the loss: 1, then a straight line to 0.

    Our addition, off in the paper's preset.
    """
    done = step - config.warm_start_steps
    if done < 0:
        return 1.0
    return max(0.0, 1 - (done + 1) / (config.warm_start_fade_steps + 1))


def warm_start_loss(decoder: DiffusionDecoder, z: Tensor, batch: Batch) -> Tensor:
    """Distance of z from the text tower's embeddings of the encoder's own caption, `batch["own_ids"]` (B, L).

    Mean squared error over the first L positions in units of the embeddings' mean square: 1 is what z = 0 would get.
    """
    if "own_ids" not in batch:
        raise DataError(
            'the warm start needs the encoder\'s own captions as batch["own_ids"]; supply them, or set '
            "stage1.warm_start_steps to 0"
        )
    target = decoder.token_embeddings(batch["own_ids"])  # (B, L, D)
    return F.mse_loss(z[:, : target.shape[1]], target) / target.square().mean()
