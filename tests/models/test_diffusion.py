from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline

from tests import tiny
from vlv.errors import ConfigError, MissingPartError
from vlv.models import diffusion
from vlv.models.context import Context
from vlv.models.diffusion import DiffusionDecoder, Posterior


@pytest.fixture
def c(tiny_decoder: DiffusionDecoder, generator: torch.Generator) -> Context:
    z = torch.randn(3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH, generator=generator)
    return tiny_decoder.context(z)


@pytest.fixture
def latents(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(3, *tiny.LATENT_SHAPE, generator=generator)


# --- the loss -------------------------------------------------------------------------------------


def test_the_loss_equals_the_hand_formula(
    prediction_type: str, c: Context, latents: torch.Tensor, generator: torch.Generator
) -> None:
    decoder = tiny.make_decoder(prediction_type)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.tensor([3, 500, 990])
    a = decoder.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    target = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * latents}
    prediction = decoder.unet(noisy, timesteps, encoder_hidden_states=c.sequence).sample
    expected = ((prediction - target[prediction_type]) ** 2).mean((1, 2, 3))

    known = {"timesteps": timesteps, "noise": noise}
    loss = decoder.denoising_loss(latents, c, generator, **known)
    per_image = decoder.denoising_loss(latents, c, generator, **known, reduction="none")
    assert torch.allclose(per_image, expected, atol=1e-6)
    assert loss.item() == pytest.approx(expected.mean().item(), abs=1e-6)


def test_noise_and_target_equal_those_of_diffusers(
    latents: torch.Tensor, generator: torch.Generator
) -> None:
    decoder = tiny.make_decoder("v_prediction")
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.tensor([0, 400, 999])
    noisy = decoder.scheduler.add_noise(latents, noise, timesteps)
    velocity = decoder.scheduler.get_velocity(latents, noise, timesteps)
    assert torch.allclose(decoder.add_noise(latents, noise, timesteps), noisy, atol=1e-6)
    assert torch.allclose(decoder.target(latents, noise, timesteps), velocity, atol=1e-6)
    assert torch.equal(tiny.make_decoder("sample").target(latents, noise, timesteps), latents)


def test_an_unknown_prediction_type_is_refused(
    tiny_decoder: DiffusionDecoder, latents: torch.Tensor
) -> None:
    tiny_decoder.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ConfigError, match='prediction_type "flow"'):
        tiny_decoder.target(latents, latents, torch.tensor([1, 2, 3]))
    tiny_decoder.scheduler.alphas_cumprod = None
    with pytest.raises(ConfigError, match="DDPM family"):
        tiny_decoder.add_noise(latents, latents, torch.tensor([1, 2, 3]))


def test_the_generator_decides_the_loss(
    tiny_decoder: DiffusionDecoder, c: Context, latents: torch.Tensor
) -> None:
    state = torch.get_rng_state()
    losses = [
        tiny_decoder.denoising_loss(latents, c, torch.Generator().manual_seed(s)).item()
        for s in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(state, torch.get_rng_state())


def test_uniform_timesteps_are_uniform_and_text_timesteps_grow_with_t(
    tiny_decoder: DiffusionDecoder, generator: torch.Generator
) -> None:
    uniform = tiny_decoder.draw_timesteps(20_000, generator, "uniform")
    text = tiny_decoder.draw_timesteps(20_000, generator, "text")
    for timesteps in (uniform, text):
        assert timesteps.min() >= 0
        assert timesteps.max() <= 999
        assert timesteps.dtype == torch.int64
    assert uniform.float().mean().item() == pytest.approx(499.5, abs=8)
    assert text.float().mean().item() == pytest.approx(2 / 3 * 1000, abs=8)
    lower_half = (text < 500).float().mean().item()
    assert lower_half == pytest.approx(0.25, abs=0.02)  # density 2t/T
    with pytest.raises(ConfigError, match='"late"'):
        tiny_decoder.draw_timesteps(1, generator, "late")  # type: ignore[arg-type]


# --- frozen ---------------------------------------------------------------------------------------


def test_nothing_trains_but_the_gradient_reaches_z(
    prediction_type: str, latents: torch.Tensor, generator: torch.Generator
) -> None:
    decoder = tiny.make_decoder(prediction_type)
    decoder.freeze()
    decoder.train()
    assert not any(module.training for module in decoder.modules())
    z = torch.randn(3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH, requires_grad=True)
    decoder.denoising_loss(latents, decoder.context(z), generator).backward()
    assert z.grad is not None
    assert (z.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())


def test_gradient_reaches_z_through_a_checkpointed_unet(
    latents: torch.Tensor, tiny_decoder: DiffusionDecoder
) -> None:
    z = torch.randn(3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH, requires_grad=True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            tiny_decoder.unet.enable_gradient_checkpointing()
        seeded = torch.Generator().manual_seed(0)
        loss = tiny_decoder.denoising_loss(latents, tiny_decoder.context(z), seeded)
        gradients += torch.autograd.grad(loss, z)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-7)


def test_missing_parts_are_named(tiny_decoder: DiffusionDecoder, pixels: torch.Tensor) -> None:
    tower = tiny_decoder.text_encoder
    bare = DiffusionDecoder(tower, None, None, None, None)
    z = torch.randn(1, 8, tiny.TEXT_WIDTH)
    assert torch.equal(bare.context(z).sequence, tiny_decoder.context(z).sequence)
    for call, name in (
        (lambda: bare.encode(pixels), "vae"),
        (lambda: bare.num_timesteps, "scheduler"),
        (lambda: bare.encode_text(["x"]), "tokenizer"),
    ):
        with pytest.raises(MissingPartError, match=f"without its {name}"):
            call()


# --- latents --------------------------------------------------------------------------------------


def test_latents_follow_the_configured_scale_and_shift(
    pixels: torch.Tensor, generator: torch.Generator
) -> None:
    vae = tiny.make_vae(scaling_factor=0.5, shift_factor=0.25)
    decoder = tiny.make_decoder()
    decoder.vae = vae
    mean, std = decoder.posterior(pixels)
    assert torch.equal(mean, vae.encode(pixels * 2 - 1).latent_dist.mean)
    assert torch.allclose(decoder.encode(pixels), (mean - 0.25) * 0.5)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    drawn = decoder.encode(pixels, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn, (mean + std * noise - 0.25) * 0.5)
    assert torch.equal(decoder.draw_latents(Posterior(mean, std), None), decoder.encode(pixels))
    decoded = (vae.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(decoder.decode(decoder.encode(pixels)), decoded, atol=1e-5)


@pytest.mark.parametrize(("num_pixels", "lengths"), [(1, [1, 1, 1]), (2 * 32 * 32, [2, 1]), (10**6, [3])])  # fmt: skip
def test_images_are_encoded_in_pieces_on_a_cpu(
    num_pixels: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny.make_decoder()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    whole = decoder.vae.encode(images * 2 - 1).latent_dist
    seen: list[int] = []
    decoder.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(diffusion, "_CPU_PIXELS", num_pixels)
    mean, std = decoder.posterior(images)
    assert seen == lengths
    assert torch.allclose(mean, whole.mean, atol=1e-5)
    assert torch.allclose(std, whole.std, atol=1e-5)


def test_sizes_come_from_the_configurations(tiny_decoder: DiffusionDecoder) -> None:
    assert tiny_decoder.downscale_factor == 4
    assert tiny_decoder.image_size == tiny.IMAGE_SIZE
    assert tiny_decoder.num_timesteps == 1000
    with pytest.raises(ValueError, match="divisible by 4, got 30x32"):
        tiny_decoder.encode(torch.zeros(1, 3, 30, 32))


def test_texts_are_encoded_and_truncation_counted(tiny_decoder: DiffusionDecoder) -> None:
    context, num_truncated = tiny_decoder.encode_text(["a cube", "a cube " * 30])
    assert context.sequence.shape == (2, tiny.TEXT_POSITIONS, tiny.TEXT_WIDTH)
    assert num_truncated == 1
    assert context.pooled is context.t5 is None
    empty, null = tiny_decoder.encode_text([""]).c, tiny_decoder.null_context()
    assert torch.allclose(empty.sequence, null.sequence, atol=1e-6)


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_a_batch_equals_single_images(prediction_type: str, sampler: Any, c: Context) -> None:
    decoder = tiny.make_decoder(prediction_type)
    state = torch.get_rng_state()
    batch = decoder.sample(c, seeds=[7, 8, 9], steps=4, sampler=sampler)
    singles = [
        decoder.sample(c[i : i + 1], seeds=[7 + i], steps=4, sampler=sampler) for i in range(3)
    ]
    assert batch.shape == (3, 3, 32, 32)
    assert batch.min() >= 0
    assert batch.max() <= 1
    assert batch.std() > 0.01
    assert torch.allclose(batch, torch.cat(singles), atol=1e-4)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("ddim", DDIMScheduler), ("dpm", DPMSolverMultistepScheduler)]
)
def test_sampling_equals_stable_diffusion_of_diffusers(
    prediction_type: str, sampler: Any, scheduler: Any, c: Context
) -> None:
    decoder = tiny.make_decoder(prediction_type)
    config = dict(decoder.scheduler.config)
    config.pop("_use_default_values")
    reference = StableDiffusionPipeline(
        vae=decoder.vae,
        text_encoder=None,
        tokenizer=None,
        unet=decoder.unet,
        scheduler=scheduler.from_config(config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    padded = torch.cat([c.sequence, c.sequence], dim=1)  # the reference needs prompts of one length
    expected = reference(
        prompt_embeds=padded,
        negative_prompt_embeds=decoder.null_context(3).sequence,
        generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)],
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    ours = decoder.sample(Context(padded), seeds=[1, 2, 3], steps=5, guidance=3.0, sampler=sampler)
    assert torch.allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_a_sampler_is_the_same_after_saving_the_schedule(
    tiny_decoder: DiffusionDecoder, sampler: Any, tmp_path: Path
) -> None:
    before = tiny_decoder._make_sampler(sampler, 5)
    tiny_decoder.scheduler.save_pretrained(tmp_path)
    tiny_decoder.scheduler = type(tiny_decoder.scheduler).from_pretrained(tmp_path)
    after = tiny_decoder._make_sampler(sampler, 5)
    assert torch.equal(before.timesteps, after.timesteps)
    assert before.config.timestep_spacing == "leading"
    tiny_decoder.scheduler.register_to_config(timestep_spacing="trailing", clip_sample=True)
    trailing = tiny_decoder._make_sampler(sampler, 5)
    assert trailing.timesteps[0] == 999
    assert not trailing.config.get("clip_sample")


def test_guidance_one_skips_the_null_branch(
    tiny_decoder: DiffusionDecoder, c: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = tiny_decoder.unet.forward
    monkeypatch.setattr(
        tiny_decoder.unet, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    tiny_decoder.sample(c, seeds=[0, 1, 2], steps=3, guidance=1.0)
    assert len(calls) == 3
    tiny_decoder.sample(c, seeds=[0, 1, 2], steps=3, guidance=1.5)
    assert len(calls) == 9


def test_guidance_leads_away_from_a_given_context(
    tiny_decoder: DiffusionDecoder, c: Context
) -> None:
    def draw(**null: Context) -> torch.Tensor:
        return tiny_decoder.sample(c, seeds=[0, 1, 2], steps=2, guidance=3.0, **null)

    assert torch.equal(draw(), draw(null=tiny_decoder.null_context()))
    assert not torch.allclose(draw(), draw(null=c[:1]))


def test_the_training_schedule_is_never_changed(tiny_decoder: DiffusionDecoder, c: Context) -> None:
    config = dict(tiny_decoder.scheduler.config)
    timesteps = tiny_decoder.scheduler.timesteps.clone()
    tiny_decoder.sample(c, seeds=[0, 1, 2], steps=2)
    assert dict(tiny_decoder.scheduler.config) == config
    assert torch.equal(tiny_decoder.scheduler.timesteps, timesteps)


def test_a_shorter_context_and_another_size_work(
    tiny_decoder: DiffusionDecoder, c: Context
) -> None:
    wide = tiny_decoder.sample(
        Context(c.sequence[:, :3]), seeds=[0, 1, 2], steps=1, height=16, width=48
    )
    assert wide.shape == (3, 3, 16, 48)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"seeds": [1]}, ValueError, "3 contexts need as many seeds, got 1"),
        ({"seeds": [1, 2, 3], "sampler": "euler"}, ConfigError, '"euler"; choose one of dpm, ddim'),
        ({"seeds": [1, 2, 3], "steps": 0}, ConfigError, "between 1 and 1000"),
        ({"seeds": [1, 2, 3], "height": 30}, ConfigError, "divisible by 4"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tiny_decoder: DiffusionDecoder,
    c: Context,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        tiny_decoder.sample(c, **settings)
