"""Models of the real classes at a size that two cores can train: the shipped miniature, or random weights of middle size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from vlv.models.captioner import CaptionDecoder
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.encoder import VLVEncoder, VLVEncoderConfig
from vlv.models.pipeline import VLVPipeline

WORDS = [
    "a",
    "the",
    "of",
    "with",
    "and",
    "large",
    "small",
    "red",
    "blue",
    "green",
    "grey",
    "cube",
    "sphere",
    "cone",
    "stands",
    "lies",
    "behind",
    "left",
    "right",
    "light",
    "shadow",
    "floor",
    "wall",
    "bright",
    "dark",
    "soft",
    "sharp",
    "near",
    "far",
    "wooden",
    "metal",
    "glass",
    "two",
    "three",
    "four",
    "soft",
    "sunlight",
    "evening",
    "morning",
]


@dataclass(frozen=True)
class Sizes:
    """What is trained in a benchmark."""

    image_size: int
    """Side of the crop, which the VAE sees."""
    input_size: int
    """Side that the vision tower sees."""
    batch_size: int
    """Images of a step of stage 1."""
    captions: int
    """Images of a step of stage 2."""
    steps: int = 1
    """Steps of a round; short ones are timed several at a time."""


SIZES = {"mid": Sizes(192, 384, 8, 4), "miniature": Sizes(64, 64, 32, 16, steps=5)}


@dataclass(frozen=True)
class Models:
    """One set of weights."""

    encoder: VLVEncoder
    decoder: DiffusionDecoder
    caption_decoder: CaptionDecoder


def make_models(name: str) -> Models:
    """The models of a size; the same name gives the same weights."""
    if name == "miniature":
        return _shipped()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Models(_encoder(), _decoder(), _caption_decoder())


def _shipped() -> Models:
    """vlv-tiny; its vision tower has positions for its own input size only, so that nothing is resized."""
    pipe = VLVPipeline.from_pretrained("vlv-tiny")
    assert pipe.caption_decoder is not None
    return Models(pipe.encoder, pipe.decoder, pipe.caption_decoder)


def _encoder() -> VLVEncoder:
    """Florence-2 of 21.6 M parameters; dropout and drop path are off, so that two implementations give one loss."""
    florence = Florence2Config(
        vision_config={
            "embed_dim": [64, 128, 256, 512],
            "depths": [1, 1, 3, 1],
            "num_heads": [2, 4, 8, 16],
            "num_groups": [2, 4, 8, 16],
            "window_size": 12,
            "projection_dim": 256,
            "drop_path_rate": 0.0,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": 4096,
            "d_model": 256,
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 1024,
            "decoder_ffn_dim": 1024,
            "max_position_embeddings": 1024,
            "dropout": 0.0,
        },
        image_token_id=4,
    )
    config = VLVEncoderConfig(
        backbone_config=florence,
        num_queries=77,
        text_width=256,
        prompt_ids=list(range(5, 17)),
        image_size=SIZES["mid"].input_size,
    )
    encoder = VLVEncoder(config)
    encoder.backbone = Florence2ForConditionalGeneration(florence)
    return encoder


def _decoder() -> DiffusionDecoder:
    text = CLIPTextConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=77,
    )
    unet = UNet2DConditionModel(
        sample_size=24,
        block_out_channels=(96, 192, 352),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
    )
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )
    return DiffusionDecoder(CLIPTextModel(text), None, unet, vae, scheduler)


def _caption_decoder() -> CaptionDecoder:
    llm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    return CaptionDecoder.from_llm(llm, _tokenizer(), text_width=256, seed=0)


def _tokenizer() -> Qwen2Tokenizer:
    """One token for each of `WORDS`, so that a caption has as many tokens as words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges)


def make_batch(
    sizes: Sizes, tokenizer: Any, *, mean_tokens: int = 227, seed: int = 0
) -> dict[str, Any]:
    """A batch as the loader gives it, with captions about as long as the paper's (figure 8: 227 tokens on average).

    Args:
        sizes: Of images and batch.
        tokenizer: Counts the tokens.
        mean_tokens: Of a caption with its end token.
        seed: Of pixels and words.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch_size, 3, sizes.image_size, sizes.image_size)
    spread = torch.randn(sizes.batch_size, generator=generator)
    lengths = ((1 + 0.15 * spread) * mean_tokens).round().clamp(5, 299).int().tolist()
    captions = []
    for length in lengths:
        picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        ids = tokenizer(" ".join(WORDS[pick] for pick in picks)).input_ids[: length - 1]
        captions.append(tokenizer.decode(ids))
    return {
        "ids": [str(row) for row in range(sizes.batch_size)],
        "pixels": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        "captions": captions,
        "step": 10**6,
    }
