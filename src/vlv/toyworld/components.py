"""Small configurations of the real classes: what the pretraining starts from.

Widths: text D = 128, Florence-2 128, language model 192; images 3x64x64, latents 4x16x16, Q = 64
text positions. Every builder takes a seed and leaves the global random state untouched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BartTokenizer,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from vlv.models.encoder import VLVEncoderConfig
from vlv.storage import Json
from vlv.toyworld.questions import ask
from vlv.toyworld.scene import sample_scene
from vlv.toyworld.writing import FORMS, describe

IMAGE_SIZE = 64
LATENT_CHANNELS = 4
TEXT_WIDTH = 128
FLORENCE_WIDTH = 128
TEXT_POSITIONS = 64

Task = Literal["short", "tags", "detailed"]
TASKS: tuple[Task, ...] = ("short", "tags", "detailed")
"""The forms of text that Florence-2 writes."""

PROMPTS: dict[Task, str] = {
    "short": "What does the image describe?",
    "tags": "List what is shown in the image.",
    "detailed": "Describe with a paragraph what is shown in the image.",
}
"""The prompt of each captioning task of the small Florence-2; the last is Florence-2's own."""


T = TypeVar("T")


def seeded(build: Callable[[], T], seed: int) -> T:
    """Build something with the global generator seeded, and put the generator back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@cache  # three tokenizers read it
def corpus(num_scenes: int = 4000) -> tuple[str, ...]:
    """Texts of scenes in all forms, with questions and answers: what tokenizers see."""
    return tuple(_texts(num_scenes))


def _texts(num_scenes: int) -> Iterator[str]:
    for index in range(num_scenes):
        scene = sample_scene(0, index, "any")
        rng = np.random.default_rng([0, index])
        for form in FORMS:
            yield describe(scene, form, rng)
        for question in ask(scene, rng):
            yield f"{question.question} {question.answer}"
    yield from PROMPTS.values()


def _train_bpe(
    texts: Iterable[str], special: list[str], vocab_size: int, suffix: str = ""
) -> tuple[dict[str, int], Any]:
    """Vocabulary and merges (pairs, which transformers wants but annotates as strings)."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    if suffix:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if suffix:  # CLIP splits words before the byte level and marks their ends by the suffix
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + suffix for letter in alphabet] if suffix else []
    ending: Json = {"end_of_word_suffix": suffix} if suffix else {}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *ends],
        show_progress=False,
        initial_alphabet=alphabet,
        **ending,
    )
    tokenizer.train_from_iterator(texts, trainer)
    model: Json = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def make_text_tokenizer(
    texts: Iterable[str] | None = None, vocab_size: int = 900, positions: int = TEXT_POSITIONS
) -> CLIPTokenizer:
    """CLIP's tokenizer class over the words of some texts, or else of the world."""
    texts = corpus() if texts is None else texts
    vocab, merges = _train_bpe(texts, ["<|startoftext|>", "<|endoftext|>"], vocab_size, "</w>")
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=positions)


def make_florence_tokenizer() -> BartTokenizer:
    """BART's tokenizer class: `<s> text </s>`, with the image placeholder of Florence-2."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>"]
    vocab, merges = _train_bpe(corpus(), special, 700)
    tokenizer = BartTokenizer(vocab=vocab, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def make_llm_tokenizer(texts: Iterable[str] | None = None, vocab_size: int = 700) -> Qwen2Tokenizer:
    """Qwen2's tokenizer class over some texts, or else the world's; the pad token is the end token, as in Qwen2.5."""
    texts = corpus() if texts is None else texts
    vocab, merges = _train_bpe(texts, ["<|endoftext|>"], vocab_size)
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def make_vae(seed: int) -> AutoencoderKL:
    """Factor 4: 3x64x64 pixels to 4x16x16 latents."""
    vae: AutoencoderKL = seeded(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            sample_size=IMAGE_SIZE,
        ),
        seed,
    )
    return vae


def make_text_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """CLIP's text transformer of width 128, four layers, as long as its tokenizer's texts."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=TEXT_WIDTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seeded(lambda: CLIPTextModel(config), seed)


def make_unet(seed: int) -> UNet2DConditionModel:
    """Two levels on 4x16x16 latents; text enters at 8x8."""
    unet: UNet2DConditionModel = seeded(
        lambda: UNet2DConditionModel(
            sample_size=IMAGE_SIZE // 4,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,  # the number of heads, whatever it is called
            norm_num_groups=16,
        ),
        seed,
    )
    return unet


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule with v-prediction, ending at zero signal."""
    scheduler: DDIMScheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    return scheduler


def make_image_processor() -> CLIPImageProcessorPil:
    """What Florence-2 does to its images, kept beside it for whoever loads it alone."""
    return CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=list(VLVEncoderConfig.image_mean),
        image_std=list(VLVEncoderConfig.image_std),
    )


def make_florence(tokenizer: BartTokenizer, seed: int) -> Florence2ForConditionalGeneration:
    """Florence-2 of width 128: a 64-pixel image becomes 8x8 + 1 tokens."""
    config = Florence2Config(
        vision_config={
            "embed_dim": [32, 64, 96, 128],
            "depths": [1, 1, 1, 1],
            "num_heads": [2, 2, 3, 4],
            "num_groups": [2, 2, 3, 4],
            "patch_stride": [4, 2, 1, 1],
            "window_size": 4,
            "projection_dim": FLORENCE_WIDTH,
            "drop_path_rate": 0.0,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": len(tokenizer),
            "d_model": FLORENCE_WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 4 * FLORENCE_WIDTH,
            "decoder_ffn_dim": 4 * FLORENCE_WIDTH,
            "max_position_embeddings": 128,
            "init_std": 0.08,  # BART's 0.02 suits a width of 1024; here attention would start out flat
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "decoder_start_token_id": tokenizer.bos_token_id,
            "forced_eos_token_id": None,
        },
        image_token_id=tokenizer.get_vocab()["<image>"],
    )
    return seeded(lambda: Florence2ForConditionalGeneration(config), seed)


LlmSize = Literal["small", "medium", "large"]
LLM_SIZES: dict[LlmSize, tuple[int, int, int]] = {
    "small": (96, 3, 3),
    "medium": (192, 6, 6),
    "large": (288, 9, 9),
}
"""Width, layers and attention heads; medium is that of vlv-tiny."""


def make_llm(tokenizer: Qwen2Tokenizer, seed: int, size: LlmSize = "medium") -> Qwen2ForCausalLM:
    """Qwen2 of width 192 and six layers, or a smaller or larger one; pad = eos."""
    width, layers, heads = LLM_SIZES[size]
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        max_position_embeddings=256,
        initializer_range=0.06,  # as for Florence-2: the real one's 0.02 suits its width
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return seeded(lambda: Qwen2ForCausalLM(config), seed)
