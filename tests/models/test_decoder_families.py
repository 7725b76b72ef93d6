"""Every family of diffusion decoders: what it computes, and that an encoder learns through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from transformers import Dinov2Config, Dinov2Model

from tests import tiny
from tests.models import families
from tests.models.families import NAMES, make_components, make_decoder
from vlv.config import PartSource, RunConfig, Stage1Config, parse_run
from vlv.data.images import to_pil
from vlv.errors import ConfigError, ModelFolderError
from vlv.models import two_towers
from vlv.models.captioner import CaptionDecoder
from vlv.models.encoder import VLVEncoder
from vlv.models.pipeline import VLVPipeline
from vlv.models.two_towers import SD3Decoder, SDXLDecoder
from vlv.models.vision_encoder import VisionEncoder
from vlv.training.assemble import train
from vlv.training.parts import load_decoder
from vlv.training.stages import Stage1

TEXT = "a red cube, a big one"


@pytest.fixture(autouse=True)
def _short_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_towers, "T5_LENGTH", families.T5_LENGTH)


def reference(name: str, scheduler: Any = None) -> Any:
    """The pipeline of diffusers with the same components."""
    parts = make_components(name)
    parts["scheduler"] = scheduler or parts["scheduler"]
    match name:
        case "sdxl":
            return StableDiffusionXLPipeline(**parts)
        case "sd3" | "sd3-t5":
            missing = {"text_encoder_3": None, "tokenizer_3": None}
            return StableDiffusion3Pipeline(**missing | parts)
        case _:
            extra = {"safety_checker": None, "feature_extractor": None}
            return StableDiffusionPipeline(**parts, **extra, requires_safety_checker=False)


def encoder_for(decoder: Any, seed: int = 5) -> VLVEncoder:
    return VLVEncoder.from_florence(
        tiny.make_florence(),
        tiny.make_florence_tokenizer(),
        num_queries=tiny.NUM_QUERIES,
        text_width=decoder.text_width,
        image_size=tiny.IMAGE_SIZE,
        seed=seed,
    )


def random_z(decoder: Any, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, tiny.NUM_QUERIES, decoder.text_width, generator=generator)


# --- against diffusers ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_texts_have_the_context_of_the_diffusers_pipeline(name: str) -> None:
    decoder, pipe = make_decoder(name), reference(name)
    c = decoder.encode_text([TEXT]).c
    with torch.no_grad():
        if name.startswith("sd3"):
            expected, null, pooled, _ = pipe.encode_prompt(
                TEXT, None, None, max_sequence_length=families.T5_LENGTH
            )
        elif name == "sdxl":
            expected, null, pooled, _ = pipe.encode_prompt(TEXT)
        else:
            expected, null = pipe.encode_prompt(TEXT, "cpu", 1, True)
            pooled = None
    if pooled is None:
        assert c.pooled is None
        assert torch.allclose(c.sequence, expected, atol=1e-5)
        assert torch.allclose(decoder.null_context().sequence, null, atol=1e-5)
        return
    length, width = c.sequence.shape[1], decoder.text_width
    assert torch.allclose(c.pooled, pooled, atol=1e-5)
    for ours, theirs in ((c, expected), (decoder._null_like(c), null)):
        assert torch.allclose(ours.sequence, theirs[:, :length, :width], atol=1e-5)
        assert (ours.t5 is not None) == (name == "sd3-t5")
        if ours.t5 is not None:
            assert torch.allclose(ours.t5, theirs[:, length:], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_from_text_is_that_of_the_diffusers_pipeline(name: str) -> None:
    decoder = make_decoder(name)
    scheduler = None
    if not name.startswith("sd3"):
        config = dict(decoder.scheduler.config) | {"clip_sample": False}
        config.pop("_use_default_values", None)
        scheduler = DDIMScheduler.from_config(config)
    pipe = reference(name, scheduler)
    pipe.set_progress_bar_config(disable=True)
    noise = decoder._first_noise([torch.Generator().manual_seed(3)], None, None)
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 32}
    if name.startswith("sd3"):
        settings["max_sequence_length"] = families.T5_LENGTH
    images = pipe(TEXT, latents=noise, width=32, output_type="pt", **settings).images
    c = decoder.encode_text([TEXT]).c
    ours = decoder.sample(c, seeds=[3], steps=4, guidance=3.0, sampler="ddim")
    assert torch.allclose(ours, images.float(), atol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "sd3-t5"])
def test_the_flow_loss_equals_the_hand_formula(name: str) -> None:
    decoder = make_decoder(name)
    c = decoder.context(random_z(decoder))
    generator = torch.Generator().manual_seed(1)
    x, noise = (torch.randn(2, *tiny.LATENT_SHAPE, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 700])
    # The schedule of diffusers counts down from pure noise.
    sigmas = decoder.scheduler.sigmas[999 - timesteps][:, None, None, None]
    clock = decoder.scheduler.timesteps[999 - timesteps]
    zeros = torch.zeros(2, families.T5_LENGTH, families.JOINT_WIDTH)
    missing = families.JOINT_WIDTH - decoder.text_width
    rows = torch.nn.functional.pad(c.sequence, (0, missing))
    prediction = decoder.transformer(
        hidden_states=(1 - sigmas) * x + sigmas * noise,
        timestep=clock,
        encoder_hidden_states=torch.cat([rows, zeros], 1),
        pooled_projections=c.pooled,
    ).sample
    expected = (prediction - (noise - x)).square().mean((1, 2, 3))
    known = {"timesteps": timesteps, "noise": noise}
    loss = decoder.denoising_loss(x, c, generator, **known, reduction="none")
    assert torch.allclose(loss, expected, atol=1e-5)


@pytest.mark.slow
def test_both_samplers_of_a_flow_end_at_the_same_picture() -> None:
    decoder = make_decoder("sd3")
    c = decoder.context(random_z(decoder, 1))
    dpm, euler = (decoder.sample(c, seeds=[0], steps=100, sampler=s) for s in ("dpm", "ddim"))
    few = decoder.sample(c, seeds=[0], steps=2, sampler="ddim")
    assert (dpm - euler).abs().max() < 0.02
    assert (few - euler).abs().max() > (dpm - euler).abs().max()


# --- where z enters -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_token_embeddings_as_z_give_the_context_of_the_text(name: str) -> None:
    """A text that ends with its end token at the last position is read like any z."""
    decoder = make_decoder(name)
    tokenizer = decoder.tokenizer
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    c = decoder.context(decoder.token_embeddings(ids))
    text = decoder.encode_text([TEXT]).c
    length = ids.shape[1]
    assert c.sequence.shape == (1, length, decoder.text_width)
    assert torch.allclose(c.sequence, text.sequence[:, :length], atol=1e-4)
    assert c.t5 is None
    assert (c.pooled is not None) == hasattr(decoder, "text_encoder_2")
    if c.pooled is not None:
        assert torch.allclose(c.pooled, text.pooled, atol=1e-4)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_both_towers_and_the_pooled_vector_hear_z(name: str) -> None:
    decoder = make_decoder(name)
    z = random_z(decoder, 1)
    c = decoder.context(z)
    first = decoder.text_encoder.config.hidden_size
    changed = z.clone()
    changed[:, 0, :first] += torch.randn(first)
    other = decoder.context(changed)
    moved = (other.sequence - c.sequence).abs()
    assert moved[..., :first].amax() > 1e-3
    assert moved[..., first:].amax() == 0
    pooled = (other.pooled - c.pooled).abs().amax()
    assert (pooled > 1e-3) == (name == "sd3")  # SDXL pools the second tower alone
    with pytest.raises(ValueError, match="two text towers read embeddings"):
        decoder.context(z[..., :-1])


def test_the_refiner_and_other_flow_schedules_are_refused() -> None:
    decoder = make_decoder("sdxl")
    assert isinstance(decoder, SDXLDecoder)
    latents = torch.zeros(1, *tiny.LATENT_SHAPE)
    assert decoder._size_conditions(latents).tolist() == [[32, 32, 0, 0, 32, 32]]
    decoder.unet.register_to_config(projection_class_embeddings_input_dim=40 + 5 * 8)
    with pytest.raises(ConfigError, match="as the refiner does"):
        decoder._size_conditions(latents)
    flow = make_decoder("sd3")
    assert isinstance(flow, SD3Decoder)
    flow.scheduler.register_to_config(use_dynamic_shifting=True)
    with pytest.raises(ConfigError, match="no flow-matching schedule with a fixed shift"):
        flow.add_noise(latents, latents, torch.tensor([1]))


# --- the whole method -----------------------------------------------------------------------------


def backbone_encoder_for(decoder: Any) -> VisionEncoder:
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    return VisionEncoder.from_backbone(
        tiny._seeded(lambda: Dinov2Model(config), 0),
        num_queries=tiny.NUM_QUERIES,
        text_width=decoder.text_width,
        image_size=32,
        image_mean=[0.5] * 3,
        image_std=[0.3] * 3,
        seed=5,
        num_layers=1,
    )


@pytest.mark.slow
@pytest.mark.parametrize("make_encoder", [encoder_for, backbone_encoder_for])
@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_learns_through_the_frozen_decoder(name: str, make_encoder: Any) -> None:
    decoder = make_decoder(name)
    families.sharpen(decoder)
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    encoder = make_encoder(decoder)
    stage = Stage1(encoder, decoder, Stage1Config())
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(5):
        optimizer.zero_grad()
        batch = {"pixels": pixels, "step": step}
        total = stage.loss(batch, torch.Generator().manual_seed(2)).total
        total.backward()
        if step == 0:
            assert encoder.queries.grad.abs().sum() > 0
            assert all(p.grad is None for p in decoder.parameters())
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_loaded_rebuilds_and_captions(name: str, tmp_path: Path) -> None:
    decoder = make_decoder(name)
    captioner = CaptionDecoder.from_llm(
        tiny.make_llm(), tiny.make_llm_tokenizer(), text_width=decoder.text_width, seed=0
    )
    pipe = VLVPipeline(
        encoder=encoder_for(decoder), caption_decoder=captioner, **make_components(name)
    )
    pipe.save_pretrained(tmp_path / "model")
    loaded = VLVPipeline.from_pretrained(tmp_path / "model")
    assert type(loaded.decoder) is type(decoder)
    assert loaded.image_size == 32
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    a, b, other = (
        p.reconstruct(pixels, steps=2, seed=s) for p, s in ((pipe, 0), (loaded, 0), (loaded, 1))
    )
    assert a[0].size == (32, 32)
    assert [x.tobytes() for x in a] == [x.tobytes() for x in b] != [x.tobytes() for x in other]
    captions = pipe.caption(pixels, max_new_tokens=5)
    assert loaded.caption(pixels, max_new_tokens=5) == captions
    assert loaded.generate(TEXT, steps=2).tobytes() == pipe.generate(TEXT, steps=2).tobytes()
    caption_only = VLVPipeline.from_pretrained(tmp_path / "model", parts=["caption"])
    assert caption_only.unet is caption_only.transformer is caption_only.vae is None
    assert caption_only.caption(pixels, max_new_tokens=5) == captions


@pytest.mark.parametrize("name", NAMES)
def test_a_caption_decoder_learns_the_context(name: str) -> None:
    decoder = make_decoder(name)
    captioner = CaptionDecoder.from_llm(
        tiny.make_llm(), tiny.make_llm_tokenizer(), text_width=decoder.text_width, seed=0
    )
    c = decoder.context(random_z(decoder)).sequence.detach()
    optimizer = torch.optim.AdamW(captioner.trainable("mlp+llm"), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = captioner.loss(c, list(tiny.CAPTIONS[:2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# --- training from folders ------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny.make_florence().save_pretrained(tmp_path / "florence")
    tiny.make_florence_tokenizer().save_pretrained(tmp_path / "florence")
    tiny.make_llm().save_pretrained(tmp_path / "llm")
    tiny.make_llm_tokenizer().save_pretrained(tmp_path / "llm")
    (tmp_path / "images").mkdir()
    for number, caption in enumerate(tiny.CAPTIONS[:4]):
        pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(number))
        to_pil(pixels).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(caption)
    return tmp_path


def run_settings(files: Path, stage: str, **changes: Any) -> RunConfig:
    models = {"decoder": str(files / "decoder")} | changes
    return parse_run(
        {
            "stage": stage,
            "model": models,
            "data": {
                "inputs": [str(files / "images")],
                "held_out": [str(files / "images")],
                "image_size": 32,
                "num_workers": 0,
            },
            "optim": {"lr": 0.001},
            "loop": {"steps": 2, "batch_size": 2, "trackers": []},
            stage: {"denoising_weight": 1} if stage == "stage2" else {},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3-t5"])
def test_both_stages_train_from_a_diffusers_folder(name: str, files: Path) -> None:
    reference(name).save_pretrained(files / "decoder")
    fresh = run_settings(files, "stage1", florence=str(files / "florence"))
    train(fresh, files / "run1")
    first = files / "run1" / "model"
    captions = run_settings(files, "stage2", encoder=str(first), llm=str(files / "llm"))
    result = train(captions, files / "run2")
    assert result.finished
    assert {"held_out_caption", "denoising_true"} <= result.metrics.keys()
    pipe = VLVPipeline.from_pretrained(files / "run2" / "model")
    assert type(pipe.decoder) is type(make_decoder(name))
    assert pipe.text_encoder_3 is None  # z never enters T5, so training does without
    assert pipe.encoder.config.text_width == pipe.decoder.text_width
    assert pipe.caption_decoder.config.text_width == pipe.decoder.text_width
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert isinstance(pipe.caption(pixels, max_new_tokens=4), str)
    assert pipe.reconstruct(pixels, steps=2).size == (32, 32)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_stage_2_without_drawing_loads_the_towers_alone(name: str, files: Path) -> None:
    reference(name).save_pretrained(files / "decoder")
    decoder = load_decoder(PartSource(path=str(files / "decoder")), draws=False)
    assert decoder.denoiser is decoder.vae is None
    z = random_z(decoder)
    ours, whole = decoder.context(z), make_decoder(name).context(z)
    assert torch.allclose(ours.sequence, whole.sequence, atol=1e-6)
    assert torch.allclose(ours.pooled, whole.pooled, atol=1e-6)


def test_a_decoder_is_found_where_the_index_of_its_folder_says(
    tiny_folder: Path, tiny_pipeline: VLVPipeline, tmp_path: Path
) -> None:
    """A model that was trained on a shipped one names its decoder, and can be gone on from like any other."""
    parts = ("text_encoder", "tokenizer", "unet", "vae", "scheduler")
    tiny_pipeline.save_pretrained(
        tmp_path / "trained",
        references={x: {"repo": str(tiny_folder), "subfolder": x} for x in parts},
    )
    assert not (tmp_path / "trained" / "unet").exists()
    for draws in (True, False):
        found = load_decoder(PartSource(path=str(tmp_path / "trained")), draws=draws)
        whole = load_decoder(PartSource(path=str(tiny_folder)), draws=draws)
        assert found.components == whole.components
        z = random_z(whole)
        assert torch.equal(found.context(z).sequence, whole.context(z).sequence)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match="text_encoder"):
        load_decoder(PartSource(path=str(tmp_path / "empty")))
