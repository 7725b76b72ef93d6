"""Miniature diffusion decoders of every family, from the real classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests import tiny
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.two_towers import make_diffusion_decoder

NAMES = ("sd1", "sd2", "sd2-v", "sdxl", "sd3", "sd3-t5")
T5_LENGTH = 24
JOINT_WIDTH = 64


def tower(kind: Any, width: int, projection: int, seed: int, **changes: Any) -> Any:
    tokenizer = tiny.make_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=projection,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tiny.TEXT_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        initializer_factor=5.0,
        **changes,
    )
    return tiny._seeded(lambda: kind(config), seed)


def second_tokenizer() -> Any:
    """Padded with "!", as that of OpenCLIP's tower."""
    tokenizer = tiny.make_clip_tokenizer()
    tokenizer.pad_token = "!"
    return tokenizer


def sd1() -> dict[str, Any]:
    return {
        "text_encoder": tower(CLIPTextModel, 32, 32, 1, hidden_act="quick_gelu"),
        "tokenizer": tiny.make_clip_tokenizer(),
        "unet": tiny.make_unet(),
        "vae": tiny.make_vae(),
        "scheduler": PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
    }


def sd2(prediction_type: str) -> dict[str, Any]:
    text_encoder = tower(CLIPTextModel, 32, 32, 1, hidden_act="gelu")
    return sd1() | {
        "text_encoder": text_encoder,
        "tokenizer": second_tokenizer(),
        "scheduler": tiny.make_scheduler(prediction_type, ddim=True),
    }


def sdxl() -> dict[str, Any]:
    def unet() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32 + 48,
            attention_head_dim=4,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=40 + 6 * 8,
            use_linear_projection=True,
        )

    return {
        "text_encoder": tower(CLIPTextModel, 32, 32, 1),
        "tokenizer": tiny.make_clip_tokenizer(),
        "text_encoder_2": tower(CLIPTextModelWithProjection, 48, 40, 2, hidden_act="gelu"),
        "tokenizer_2": second_tokenizer(),
        "unet": tiny._seeded(unet, 3),
        "vae": tiny.make_vae(),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }


def sd3(*, t5: bool = False) -> dict[str, Any]:
    def transformer() -> SD3Transformer2DModel:
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=JOINT_WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )

    parts = {
        "text_encoder": tower(CLIPTextModelWithProjection, 16, 16, 1),
        "tokenizer": tiny.make_clip_tokenizer(),
        "text_encoder_2": tower(CLIPTextModelWithProjection, 24, 24, 2, hidden_act="gelu"),
        "tokenizer_2": second_tokenizer(),
        "transformer": tiny._seeded(transformer, 3),
        "vae": tiny.make_vae(scaling_factor=1.5, shift_factor=0.06),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return parts | (long_tower() if t5 else {})


def long_tower() -> dict[str, Any]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny.make_llm_tokenizer().backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    )
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=JOINT_WIDTH,
        d_kv=16,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return {
        "text_encoder_3": tiny._seeded(lambda: T5EncoderModel(config), 7),
        "tokenizer_3": tokenizer,
    }


def make_components(name: str) -> dict[str, Any]:
    match name:
        case "sd1":
            return sd1()
        case "sd2" | "sd2-v":
            return sd2("v_prediction" if name == "sd2-v" else "epsilon")
        case "sdxl":
            return sdxl()
        case _:
            return sd3(t5=name == "sd3-t5")


def make_decoder(name: str) -> DiffusionDecoder:
    return make_diffusion_decoder(make_components(name))


def sharpen(decoder: DiffusionDecoder, seed: int = 0) -> None:
    """Make a random denoiser listen: its last layers are born as zeros or near them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in decoder.denoiser.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
