"""Stage 3, our addition: images alone make captions truer, with the frozen decoder as judge.

The caption decoder writes several captions of each image, a reward says how well each explains it (`vlv.training.rewards`),
and the captions that earn more become likelier. Nothing but images is needed: the loop vision, language, vision is closed.

Shapes: B images, N candidates of each, M of them learnt from, Q positions, D text width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlv.config import LoopConfig, Stage3Config
from vlv.models.asking import check_answers
from vlv.models.captioner import CaptionDecoder
from vlv.models.decoding import Caption, Generation
from vlv.models.diffusion import DiffusionDecoder, Posterior
from vlv.models.draws import RowGenerator, mixed_seed
from vlv.models.encoder import VLVEncoder
from vlv.models.scoring import Scoring
from vlv.models.vision_encoder import VisionEncoder
from vlv.training.objective import Batch, Losses, to_device
from vlv.training.precision import compile_parts
from vlv.training.rewards import PASSES, REWARDS, Judges, Rollout, Seen
from vlv.training.stages import Stage1, Stage2, z_of


@dataclass(frozen=True)
class Method:
    """How rewards become a loss."""

    choose: Callable[[Tensor], Tensor]
    """From rewards (B, N) to the candidates that are learnt from, (B, M)."""
    loss: Callable[[Tensor, Tensor, Tensor, Stage3Config], Tensor]
    """From log-probabilities, those of stage 2's model and rewards, all (B, M), to losses (B,)."""


def rejection_loss(log_probs: Tensor, _: Tensor, clear: Tensor, config: Stage3Config) -> Tensor:
    """Likelihood of the best candidate (RAFT, expert iteration), where it is `clear`."""
    return -log_probs[:, 0] / config.max_caption_tokens


def dpo_loss(log_probs: Tensor, reference: Tensor, rewards: Tensor, config: Stage3Config) -> Tensor:
    """Direct preference optimisation (2305.18290) of the best candidate against the worst."""
    gained = log_probs - reference
    return -F.logsigmoid((config.beta or 0.1) * (gained[:, 0] - gained[:, 1]))


def rloo_loss(
    log_probs: Tensor, reference: Tensor, rewards: Tensor, config: Stage3Config
) -> Tensor:
    """Policy gradient with the mean reward of the other candidates as baseline (RLOO, 2402.14740).

    The sum over tokens is divided by a constant, not by the caption's length, which would favour long captions that are wrong.
    """
    earned = rewards - config.kl * (log_probs.detach() - reference)
    others = (earned.sum(1, keepdim=True) - earned) / (earned.shape[1] - 1)
    return -((earned - others) * log_probs).mean(1) / config.max_caption_tokens


METHODS = {
    "rejection": Method(lambda rewards: rewards.argmax(1, keepdim=True), rejection_loss),
    "dpo": Method(lambda rewards: torch.stack([rewards.argmax(1), rewards.argmin(1)], 1), dpo_loss),
    "rloo": Method(lambda rewards: torch.arange(rewards.shape[1]).expand_as(rewards), rloo_loss),
}
"""By the name that `stage3.method` has."""


class Stage3:
    """Images alone teach the caption decoder, and by option the encoder, what the frozen decoder finds true.

    Args:
        encoder: Of stage 2.
        decoder: Frozen; the judge.
        caption_decoder: Of stage 2.
        config: Method, reward, number of candidates, what trains.

    Raises:
        ConfigError: The reward asks questions, and the model was taught to answer none.
    """

    def __init__(
        self,
        encoder: VLVEncoder | VisionEncoder,
        decoder: DiffusionDecoder,
        caption_decoder: CaptionDecoder,
        config: Stage3Config,
    ) -> None:
        if config.reward == "answers":
            check_answers(caption_decoder)
        encoder.trainable("language" if config.trainable == "mlp+llm+encoder" else "none")
        caption_decoder.trainable("mlp" if config.trainable == "mlp" else "mlp+llm")
        caption_decoder.find_head()
        decoder.freeze()
        self.encoder, self.decoder, self.caption_decoder = encoder, decoder, caption_decoder
        self.config = config
        parts: dict[str, nn.Module] = {
            "encoder": encoder,
            "decoder": decoder,
            "caption_decoder": caption_decoder,
        }
        self.reference: CaptionDecoder | None = None
        if config.method == "dpo" or config.kl:
            resting = {id(p): p for p in caption_decoder.parameters() if not p.requires_grad}
            self.reference = copy.deepcopy(caption_decoder, resting).requires_grad_(False)
            self.reference.tokenizer = caption_decoder.tokenizer
            parts["reference"] = self.reference
        self.module = nn.ModuleDict(parts)

    def compile(self, config: LoopConfig, device: torch.device) -> None:
        """Lay out and compile the parts as the settings say."""
        compile_parts(config, self.encoder, self.decoder, self.caption_decoder, device)

    # --- candidates and what they earn

    def prepare(self, batch: Batch, generator: RowGenerator) -> Batch:
        """The batch with candidates that the present model wrote, and what they earn.

        Adds `rollouts`, the tokens of M captions for each image; `rewards` and `reference`, the log-probabilities under
        stage 2's model, (B, M); `weights` (B,), 0 where an image teaches nothing; what is logged of all candidates; and
        `c` (B, Q, D) where the encoder rests.
        """
        if "rollouts" in batch:
            return batch
        config, method = self.config, METHODS[self.config.method]
        with self.at_rest():
            seen = self.look(batch)
            c = seen.c.sequence
            captions = self._write(c, generator)
            rewards = self.judge(seen, captions, generator.shared_seed)  # (B, N)
            chosen = method.choose(rewards)
            rows = [
                [self._tokens(texts[index]) for index in indices]
                for texts, indices in zip(captions, chosen.tolist(), strict=True)
            ]
            reference = torch.zeros(chosen.shape)
            if self.reference is not None:
                reference = self.reference.log_probs_of_tokens(
                    c, rows, batching=config.batching
                ).cpu()
        best, mean = rewards.amax(1), rewards.mean(1)
        clear = (best > rewards.amin(1)) & (best - mean >= config.min_margin)
        frozen = {} if config.trainable == "mlp+llm+encoder" else {"c": c}
        return (
            {name: value for name, value in batch.items() if not frozen or name in _KEPT}
            | frozen
            | {
                "rollouts": rows,
                "rewards": rewards.gather(1, chosen),
                "reference": reference,
                "weights": clear.float(),
            }
            | _figures(captions, rewards)
        )

    def stand_in(self, batch: Batch) -> Batch:
        """The batch as if its candidates were written already, as long as they may be: what memory is predicted with."""
        size, config = len(batch["pixels"]), self.config
        number = METHODS[config.method].choose(torch.zeros(1, config.candidates)).shape[1]
        rows = [[[0] * config.max_caption_tokens] * number] * size
        numbers = torch.zeros(size, number)
        return batch | {
            "rollouts": rows,
            "rewards": numbers,
            "reference": numbers,
            "weights": torch.ones(size),
        }

    @torch.no_grad()
    def rehearse(self, batch: Batch) -> None:
        """The passes of `prepare` for a batch as `stand_in` makes it, whose memory and FLOPs are predicted.

        A caption is read at once here, and written token by token there, which multiplies the same matrices.
        """
        config = self.config
        images, side = len(batch["pixels"]), batch["pixels"].shape[-1]
        c = self.decoder.context(z_of(self.encoder, batch, torch.Generator()))
        candidates = [[[0] * config.max_caption_tokens] * config.candidates] * images
        self.caption_decoder.log_probs_of_tokens(c.sequence, candidates, batching=config.batching)
        passes = images * config.candidates * PASSES[config.reward](config)
        size = side // self.decoder.downscale_factor
        channels = self.decoder.encode(batch["pixels"][:1]).shape[1] if passes else 0
        while passes > 0:
            number = min(passes, Scoring.batch_size)
            latents = c.sequence.new_zeros(number, channels, size, size)
            self.decoder.denoising_loss(
                latents, c.select(torch.zeros(number).long()), torch.Generator()
            )
            passes -= number

    def _write(self, c: Tensor, generator: RowGenerator) -> list[list[Caption]]:
        """N samples of each image, (B, N); each draws its own numbers."""
        number = self.config.candidates
        how = Generation(
            max_new_tokens=self.config.max_caption_tokens,
            do_sample=True,
            temperature=self.config.temperature,
            tidy=False,
            seed=[
                mixed_seed(seed, "candidate", index)
                for seed in generator.row_seeds
                for index in range(number)
            ],
        )
        written = self.caption_decoder.write(c, how, copies=number)
        return [written[start : start + number] for start in range(0, len(written), number)]

    def look(self, batch: Batch) -> Seen:
        """What the model knows of the images of a batch."""
        seen = to_device(batch, self.encoder.queries.device)
        if "features" not in seen:
            seen["features"] = self.encoder.image_features(seen["pixels"])
        seen["step"] = 0  # a bottleneck is annealed by now
        z = z_of(self.encoder, seen, torch.Generator())
        return Seen(self._latents(seen), seen["features"], z, self.decoder.context(z))

    def judge(self, seen: Seen, captions: Sequence[Sequence[Caption]], seed: int) -> Tensor:
        """Rewards (B, n) on the CPU of n captions of each image.

        One without text or end is worth nothing, and no more than the worst of its image.
        """
        good = [[x.finished and bool(x.text.strip()) for x in row] for row in captions]
        texts = [
            [x.text for x, is_good in zip(row, marks, strict=True) if is_good]
            for row, marks in zip(captions, good, strict=True)
        ]
        judges = Judges(self.encoder, self.decoder, self.caption_decoder, self.config)
        rewards = torch.full((len(captions), len(captions[0])), float("inf"))
        if any(map(any, good)):
            earned = REWARDS[self.config.reward](judges, Rollout(seen, texts, seed))
            rewards[torch.tensor(good)] = earned.float().cpu()
        worst = rewards.amin(1, keepdim=True).clamp(max=0.0)
        return torch.where(rewards.isinf(), worst, rewards)

    def _latents(self, batch: Batch) -> Tensor:
        """Of the posterior's mean."""
        if "latents_mean" not in batch:
            return self.decoder.encode(batch["pixels"])
        posterior = Posterior(batch["latents_mean"].float(), batch["latents_std"].float())
        return self.decoder.draw_latents(posterior, None)

    def _tokens(self, caption: Caption) -> list[int]:
        """What the model wrote, with the end token if it ended there."""
        end = [int(self.caption_decoder.tokenizer.eos_token_id)]
        return [*caption.ids, *(end if caption.finished else [])]

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Without dropout and gradients, in the precision of the step: what is frozen is held in it."""
        modes = {part: part.training for part in self.module.modules()}
        self.module.eval()
        weight = next(iter(self.decoder.text_encoder.parameters()))
        is_exact = weight.dtype == torch.float32
        dtype = torch.bfloat16 if is_exact else weight.dtype
        try:
            with torch.no_grad(), torch.autocast(weight.device.type, dtype, enabled=not is_exact):
                yield
        finally:
            for part, mode in modes.items():
                part.training = mode

    # --- the loss

    def loss(self, batch: Batch, generator: torch.Generator) -> Losses:
        """The method's loss of what `prepare` added."""
        c = batch["c"] if "c" in batch else self._context(batch, generator)  # (B, Q, D)
        log_probs = self.caption_decoder.log_probs_of_tokens(
            c, batch["rollouts"], batching=self.config.batching
        )  # (B, M)
        reference, rewards, weights = (batch[name] for name in ("reference", "rewards", "weights"))
        loss = METHODS[self.config.method].loss(log_probs, reference, rewards, self.config)
        parts = {name: batch[name].float().mean() for name in FIGURES if name in batch}
        parts["clear_share"] = weights.mean()
        if self.reference is not None:
            parts["kl"] = (log_probs.detach() - reference).mean()
        return Losses((loss * weights).mean(), parts)

    def _context(self, batch: Batch, generator: torch.Generator) -> Tensor:
        return self.decoder.context(z_of(self.encoder, batch, generator)).sequence


Stage = Stage1 | Stage2 | Stage3
"""What a run trains."""

FIGURES = ("reward", "best_reward", "tokens", "unfinished_share", "distinct_share")
_KEPT = ("ids", "step")


def _figures(captions: list[list[Caption]], rewards: Tensor) -> Batch:
    """What the log tells of all candidates, (B,) each."""
    number = rewards.shape[1]
    return {
        "reward": rewards.mean(1),
        "best_reward": rewards.amax(1),
        "tokens": torch.tensor([sum(x.num_tokens for x in row) / number for row in captions]),
        "unfinished_share": torch.tensor(
            [sum(not x.finished for x in row) / number for row in captions]
        ),
        "distinct_share": torch.tensor([len({x.text for x in row}) / number for row in captions]),
    }
