"""The sections of a run's settings that belong to one stage: its method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from vlv.config_sections import Settings

_STYLE = re.compile(r"[A-Za-z0-9][\w-]{0,39}")


class LoraConfig(Settings):
    """Low-rank adapters of the language models, in place of their own weights (docs/lora.md)."""

    rank: Annotated[int, Field(gt=0, le=1024)] = 8
    """Rank of the matrices that are added to each layer."""
    alpha: PositiveFloat = 16.0
    """Scale: alpha / rank times the product of the two matrices is added."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's inputs that its adapter does not see in a step."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter: all linear ones but the output layer, or a list of names such as [q_proj, v_proj]."""
    bits: Literal[4] | None = None
    """Of each weight of the caption decoder's language model while its adapters train (QLoRA); null keeps them as they are."""


class Stage1Config(Settings):
    """Stage 1: images alone."""

    trainable: Literal["language", "all"] = "language"
    """Florence-2's language model, queries and projector (the paper), or the vision tower too."""
    draws_per_image: Annotated[int, Field(gt=0, le=1024)] = 1
    """Draws of timestep and noise per encoded image; the paper's 1 spends a whole encoder pass on each."""
    timesteps: Literal["uniform", "text"] = "uniform"
    """Uniform (the paper), or more of the high noise, where the image has to come from the text."""
    warm_start_steps: int = Field(0, ge=0)
    """Our addition: steps that only move z to the text embeddings of the encoder's own caption; 0 is the paper."""
    warm_start_fade_steps: int = Field(0, ge=0)
    """Steps over which the denoising loss then takes over."""

    def contradictions(self) -> Iterator[str]:
        """A fade out of nothing."""
        if self.warm_start_fade_steps and not self.warm_start_steps:
            yield "warm_start_fade_steps has no effect while warm_start_steps is 0; set both or neither"


class Stage2Config(Settings):
    """Stage 2: captions."""

    trainable: Literal["mlp", "mlp+llm", "mlp+llm+encoder"] = "mlp+llm+encoder"
    """What trains (paper, Table 4); the encoder without its vision tower."""
    lora: LoraConfig | None = None
    """Of what trains, language models learn by adapters, which are saved without their base; null trains all their weights."""
    frozen_llm_steps: int = Field(0, ge=0)
    """Steps before the language model joins in: psi learns first (the paper unfreezes progressively)."""
    frozen_encoder_steps: int = Field(0, ge=0)
    """Steps before the encoder joins in, after the language model; they also do without denoising loss."""
    frozen_queries: bool = False
    """Whether queries and projector stay as stage 1 left them while the encoder trains (the authors' code)."""
    supervise_end: bool = True
    """Whether the end token is learnt; in the authors' code it is not, and their models never stop by themselves."""
    max_caption_tokens: Annotated[int, Field(gt=0, le=65_536)] | None = 300
    """Longest caption with its end token; a longer one is cut. Null cuts nothing."""
    batching: Literal["auto", "packed", "bucketed", "padded"] = "auto"
    """How captions share a pass: all in one row without padding, near lengths together, or padded; auto packs if it can."""
    caption_weight: float = Field(1.0, ge=0)
    """Our addition: how often the plain caption is taught, against the two weights below; alone it is the paper."""
    style_weights: dict[str, PositiveFloat] = Field({})
    """How often captions in other styles are taught, by the style's name (docs/instructions.md)."""
    style_instructions: dict[str, str] = Field({})
    """What is asked for a style, by its name; by default `Style: NAME.`"""
    question_weight: float = Field(0.0, ge=0)
    """How often questions about the image are taught, all of an image together."""
    length_share: float = Field(0.0, ge=0, le=1)
    """Share of the drawn captions whose instruction states how many words they have, which teaches `--words`."""
    context_column: str | None = None
    """Field of the records that tells what is known about an image, which captions learn to use (`--context-column`)."""
    context_share: float = Field(0.5, gt=0, le=1)
    """Share of the drawn captions that are told what is known."""
    texts_per_image: Annotated[int, Field(gt=0, le=1024)] = 1
    """Texts drawn for each image in each step, which share its encoding."""
    loss_mean: Literal["tokens", "texts"] = "tokens"
    """Over all tokens of a step (the paper); or over each text's first, so that an answer counts as much as a caption."""
    denoising_weight: float = Field(0.0, ge=0)
    """Our addition: weight of stage 1's loss, which keeps z readable for the diffusion decoder; 0 is the paper."""
    draws_per_image: Annotated[int, Field(gt=0, le=1024)] = 1
    """As in stage 1."""
    timesteps: Literal["uniform", "text"] = "uniform"
    """As in stage 1."""

    def contradictions(self) -> Iterator[str]:
        """Settings of a part that stays frozen, or of a loss that does not count."""
        for key in ("frozen_encoder_steps", "frozen_queries"):
            if getattr(self, key) and self.trainable != "mlp+llm+encoder":
                yield f"{key} has no effect with trainable {self.trainable}; remove it or train the encoder"
        if self.lora is not None and self.trainable == "mlp":
            yield "lora has no effect with trainable mlp; remove it or train the language model"
        if self.frozen_llm_steps and self.trainable == "mlp":
            yield "frozen_llm_steps has no effect with trainable mlp; remove it or train the language model"
        if self.denoising_weight and self.trainable != "mlp+llm+encoder":
            yield (
                f"denoising_weight is {self.denoising_weight}, but with trainable {self.trainable} the encoder is "
                "frozen and the loss moves nothing; set it to 0 or train the encoder"
            )
        if not self.denoising_weight and (self.draws_per_image, self.timesteps) != (1, "uniform"):
            yield "draws_per_image and timesteps have no effect while denoising_weight is 0; remove them or set it"
        yield from self._contradictions_of_styles()
        yield from self._contradictions_of_texts()

    def _contradictions_of_styles(self) -> Iterator[str]:
        """Styles that are never taught, or that could not be asked for."""
        for name in self.style_weights:
            if not _STYLE.fullmatch(name):
                yield f"style_weights names a style {name!r:.60}; give it a name of letters, digits and -"
        for name in self.style_instructions.keys() - self.style_weights.keys():
            yield f"style_instructions.{name} has no effect without style_weights.{name}; set both or neither"
        if len(set(self.style_instructions.values())) < len(self.style_instructions):
            yield "style_instructions asks for two styles in the same words; change one of them"

    def _contradictions_of_texts(self) -> Iterator[str]:
        """Texts that are never taught, and what is asked for of none."""
        if not self.caption_weight and not self.style_weights and not self.question_weight:
            yield "caption_weight, style_weights and question_weight are all 0; set one of them"
        for name in ("length_share", "context_column"):
            if getattr(self, name) and not self.caption_weight and not self.style_weights:
                yield f"{name} has no effect without captions; set caption_weight or style_weights, or remove it"
        if self.context_column is None and self.context_share != 0.5:
            yield "context_share has no effect without context_column; set both or neither"
        more = self.question_weight or self.length_share or self.context_column is not None
        if not self.style_weights and not more:
            if self.texts_per_image > 1:
                yield "texts_per_image has no effect on plain captions alone; set style_weights or question_weight"
        elif not self.supervise_end:
            yield (
                "style_weights, question_weight, length_share and context_column need supervise_end: an answer has to end"
            )


class Stage3Config(Settings):
    """Stage 3: images alone, with the frozen decoder as judge of the captions that the model writes of them."""

    method: Literal["rejection", "dpo", "rloo"] = "rloo"
    """Learn the best candidate where it is clear, prefer the best to the worst, or follow the policy gradient."""
    reward: Literal["denoising", "drawing", "redrawing", "context", "answers", "log_prob"] = (
        "denoising"
    )
    """What judges a candidate (see vlv.training.rewards); log_prob is the control, which asks no judge."""
    questions: list[str] = []  # noqa: RUF012 - pydantic copies it
    """Of the reward answers: what is asked of the image and of its caption."""
    candidates: Annotated[int, Field(ge=2, le=1024)] = 8
    """N, samples of each image in each step."""
    temperature: PositiveFloat = 1.0
    """Of the samples; at 1 the policy gradient has no bias."""
    min_margin: float = Field(0.0, ge=0)
    """Of rejection and dpo: the best candidate must lead the mean of all by this much reward, or the image teaches nothing."""
    kl: float = Field(0.0, ge=0)
    """Of rloo: reward that a caption loses for each nat by which it is likelier than to the model of stage 2."""
    beta: PositiveFloat | None = None
    """Of dpo: how sharply preferences move log-probabilities away from those of stage 2; null is 0.1."""
    score_timesteps: Annotated[int, Field(gt=0, le=1000)] = 3
    """Of rewards that denoise: timesteps at which a candidate is scored; their noise is new in every step."""
    drawing_steps: Annotated[int, Field(gt=0, le=1000)] = 8
    """Of rewards that draw: sampler steps of each image."""
    trainable: Literal["mlp", "mlp+llm", "mlp+llm+encoder"] = "mlp+llm"
    """What trains; the encoder without its vision tower."""
    lora: LoraConfig | None = None
    """Of what trains, language models learn by adapters, which are saved without their base; null trains all their weights."""
    max_caption_tokens: Annotated[int, Field(gt=0, le=65_536)] = 300
    """Longest candidate with its end token; one that does not end by then is worth nothing."""
    engine: Literal["vllm"] | None = None
    """Who writes the candidates (see docs/engine.md); null is the training process itself."""
    batching: Literal["auto", "packed", "bucketed", "padded"] = "auto"
    """As in stage 2."""
    max_loss_rise: PositiveFloat | None = 0.5
    """Stop where the reward has risen but the held-out loss of true captions too, by this much; null never stops."""

    def contradictions(self) -> Iterator[str]:
        """Settings of another method, or of a part that stays frozen."""
        if self.lora is not None and self.trainable == "mlp":
            yield "lora has no effect with trainable mlp; remove it or train the language model"
        if self.lora is not None and self.engine is not None:
            yield "engine writes with whole weights and knows no adapters; remove engine or lora"
        if self.reward == "answers" and not self.questions:
            yield "reward answers asks questions; set stage3.questions"
        if self.questions and self.reward != "answers":
            yield f"questions have no effect with reward {self.reward}; remove them"
        if self.min_margin and self.method == "rloo":
            yield "min_margin has no effect with method rloo; set it to 0"
        if self.kl and self.method != "rloo":
            yield f"kl has no effect with method {self.method}; set it to 0"
        if self.beta is not None and self.method != "dpo":
            yield f"beta has no effect with method {self.method}; remove it"
