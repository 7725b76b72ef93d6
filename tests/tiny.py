"""Miniature, randomly initialised components of the real transformers and diffusers classes.

Every function builds one component in a few milliseconds; the same seed gives the same weights.
Shapes: images 3x32x32, latents 4x8x8, Q = 8 queries, text width D = 32 with 16 positions,
language-model width E = 48.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BartTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlv.models.captioner import CaptionDecoder
    from vlv.models.diffusion import DiffusionDecoder
    from vlv.models.encoder import VLVEncoder
    from vlv.models.pipeline import VLVPipeline

IMAGE_SIZE = 32
LATENT_SHAPE = (4, 8, 8)
NUM_QUERIES = 8
TEXT_WIDTH = 32
TEXT_POSITIONS = 16
LLM_WIDTH = 48
PROMPT = "Describe with a paragraph what is shown in the image."

CAPTIONS = (
    "A large red cube stands to the left of a small blue sphere on a grey floor.",
    "Two shiny cylinders, one green and one yellow, under a low evening sun.",
    "A pencil sketch of a cone in front of a wall.",
    "A striped purple cube lies far back; the light comes from the right.",
    "Describe with a paragraph what is shown in the image.",
    "It's night: 3 matte objects, an orange cone, a white sphere and a cyan cube!",
)


def _seeded(build: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval()


@cache
def _train_bpe(
    vocab_size: int, special: tuple[str, ...], suffix: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a byte-level BPE on CAPTIONS; return (vocabulary, merges), special tokens first."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    if suffix:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if suffix:
        # CLIP ends each word with a suffixed token: every byte also exists with the suffix.
        special = (*special, *(byte + suffix for byte in alphabet))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=alphabet,
        **({"end_of_word_suffix": suffix} if suffix else {}),
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def make_clip_tokenizer() -> CLIPTokenizer:
    """A real CLIPTokenizer with 16 positions; byte-level, so any text has ids."""
    vocab, merges = _train_bpe(700, ("<|startoftext|>", "<|endoftext|>"), "</w>")
    return CLIPTokenizer(vocab=dict(vocab), merges=list(merges), model_max_length=TEXT_POSITIONS)


def make_llm_tokenizer() -> Qwen2Tokenizer:
    """A real Qwen2Tokenizer whose pad token is its end token, as in Qwen2.5 base."""
    vocab, merges = _train_bpe(400, ("<|endoftext|>",))
    return Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges))


def make_florence_tokenizer() -> BartTokenizer:
    """A BART tokenizer: ``<s> text </s>``."""
    vocab, merges = _train_bpe(400, ("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    return BartTokenizer(vocab=dict(vocab), merges=list(merges))


def make_florence(
    seed: int = 0, *, dropout: float = 0.0, drop_path_rate: float = 0.1
) -> Florence2ForConditionalGeneration:
    """Florence-2 of width 32: a 32-pixel image becomes 4x4 + 1 = 17 tokens."""
    config = Florence2Config(
        vision_config={
            "embed_dim": [16, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "patch_stride": [4, 2, 1, 1],
            "window_size": 4,
            "projection_dim": 32,
            "drop_path_rate": drop_path_rate,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": len(make_florence_tokenizer()),
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 96,
            "dropout": dropout,
        },
        image_token_id=4,
    )
    return _seeded(lambda: Florence2ForConditionalGeneration(config), seed)


def make_text_encoder(seed: int = 1, *, attention: str = "sdpa") -> CLIPTextModel:
    """CLIP text transformer of width 32 with 16 positions; larger weights than CLIP's at birth."""
    tokenizer = make_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        initializer_factor=5.0,
        attn_implementation=attention,
    )
    return _seeded(lambda: CLIPTextModel(config), seed)


def make_unet(seed: int = 2) -> UNet2DConditionModel:
    """Two levels on 4x8x8 latents, cross-attention at the lower one."""
    return _seeded(
        lambda: UNet2DConditionModel(
            sample_size=LATENT_SHAPE[-1],
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        seed,
    )


def make_vae(
    seed: int = 3, *, scaling_factor: float = 0.7, shift_factor: float | None = None
) -> AutoencoderKL:
    """Factor 4: 3x32x32 pixels to 4x8x8 latents."""
    return _seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=LATENT_SHAPE[0],
            norm_num_groups=4,
            sample_size=IMAGE_SIZE,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        ),
        seed,
    )


def make_scheduler(
    prediction_type: str = "epsilon", *, ddim: bool = False
) -> DDPMScheduler | DDIMScheduler:
    """The training scheduler: 1,000 steps, scaled-linear betas, as Stable Diffusion's."""
    settings: dict[str, Any] = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
        "clip_sample": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**settings) if ddim else DDPMScheduler(**settings)


def make_llm(seed: int = 4) -> Qwen2ForCausalLM:
    """Qwen2 of width 48, two layers; pad = eos = 0."""
    tokenizer = make_llm_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 3,  # Qwen pads its vocabulary too
        hidden_size=LLM_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,  # random weights end no caption by themselves
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    return _seeded(lambda: Qwen2ForCausalLM(config), seed)


@dataclass(frozen=True)
class TinyParts:
    """The raw components, before vlv's classes wrap them."""

    florence: Florence2ForConditionalGeneration
    florence_tokenizer: BartTokenizer
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler | DDIMScheduler
    llm: Qwen2ForCausalLM
    llm_tokenizer: Qwen2Tokenizer


def make_parts(prediction_type: str = "epsilon") -> TinyParts:
    """A fresh set of components."""
    return TinyParts(
        florence=make_florence(),
        florence_tokenizer=make_florence_tokenizer(),
        text_encoder=make_text_encoder(),
        tokenizer=make_clip_tokenizer(),
        unet=make_unet(),
        vae=make_vae(),
        scheduler=make_scheduler(prediction_type),
        llm=make_llm(),
        llm_tokenizer=make_llm_tokenizer(),
    )


def make_encoder(
    seed: int = 5, *, image_size: int = IMAGE_SIZE, dropout: float = 0.0
) -> VLVEncoder:
    """VLVEncoder around `make_florence`."""
    return deepcopy(_encoder(seed, image_size, dropout))


@cache  # a copy takes a quarter of the time
def _encoder(seed: int, image_size: int, dropout: float) -> VLVEncoder:
    from vlv.models.encoder import VLVEncoder

    return VLVEncoder.from_florence(
        make_florence(dropout=dropout),
        make_florence_tokenizer(),
        num_queries=NUM_QUERIES,
        text_width=TEXT_WIDTH,
        image_size=image_size,
        seed=seed,
    )


def make_decoder(prediction_type: str = "epsilon") -> DiffusionDecoder:
    """DiffusionDecoder around the frozen parts."""
    from vlv.models.diffusion import DiffusionDecoder

    decoder = DiffusionDecoder(
        text_encoder=make_text_encoder(),
        tokenizer=make_clip_tokenizer(),
        unet=make_unet(),
        vae=make_vae(),
        scheduler=make_scheduler(prediction_type),
    )
    decoder.freeze()
    return decoder


def make_caption_decoder(seed: int = 6) -> CaptionDecoder:
    """CaptionDecoder around `make_llm`."""
    return deepcopy(_caption_decoder(seed))


@cache
def _caption_decoder(seed: int) -> CaptionDecoder:
    from vlv.models.captioner import CaptionDecoder

    return CaptionDecoder.from_llm(
        make_llm(), make_llm_tokenizer(), text_width=TEXT_WIDTH, seed=seed
    )


def make_pipeline(prediction_type: str = "epsilon") -> VLVPipeline:
    """A complete VLVPipeline of fresh random components."""
    from vlv.models.pipeline import VLVPipeline

    parts = make_parts(prediction_type)
    return VLVPipeline(
        encoder=make_encoder(),
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        vae=parts.vae,
        scheduler=parts.scheduler,
        caption_decoder=make_caption_decoder(),
    )


def num_parameters(parts: TinyParts) -> int:
    """Parameters of all components together."""
    modules = [getattr(parts, field.name) for field in fields(parts)]
    return sum(p.numel() for m in modules if isinstance(m, torch.nn.Module) for p in m.parameters())
