"""Stage 1 computes what the authors' code computed, from their checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from PIL import Image
from torch.nn import functional as F

from tests.models.official_files import COMPONENTS, STAGE1, close, tensors, values
from vlv.models.context import Context
from vlv.models.diffusion import DiffusionDecoder, Posterior
from vlv.models.encoder import VLVEncoder, normalize
from vlv.models.official import load_stage1
from vlv.models.official_parts import florence_names
from vlv.models.pipeline import VLVPipeline
from vlv.models.text_tower import tokenize

S = tensors("stage1_reference")


@pytest.fixture(scope="module")
def pipe() -> VLVPipeline:
    return load_stage1(STAGE1, COMPONENTS)


@pytest.fixture(scope="module")
def encoder(pipe: VLVPipeline) -> VLVEncoder:
    encoder: VLVEncoder = pipe.encoder
    return encoder


@pytest.fixture(scope="module")
def decoder(pipe: VLVPipeline) -> DiffusionDecoder:
    return pipe.decoder


@pytest.fixture(scope="module")
def hidden(encoder: VLVEncoder) -> dict[str, torch.Tensor]:
    """What each part of the encoder puts out for the recorded images."""
    outputs: dict[str, torch.Tensor] = {}
    model = encoder.backbone.model

    def keep(name: str) -> Any:
        def hook(module: object, args: Any, kwargs: Any, output: Any) -> None:
            outputs[f"{name}_input"] = kwargs.get("inputs_embeds")
            outputs[name] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    hooks = [
        module.register_forward_hook(keep(name), with_kwargs=True)
        for name, module in {
            "davit": model.vision_tower,
            "features": model.multi_modal_projector,
            "encoder": model.language_model.encoder,
            "decoder": model.language_model.decoder,
        }.items()
    ]
    with torch.no_grad():
        outputs["z"] = encoder(S["images_uint8"])
    for hook in hooks:
        hook.remove()
    return outputs


def test_the_prompt_and_the_pixels(encoder: VLVEncoder) -> None:
    assert [list(encoder.config.prompt_ids)] * 4 == S["input_ids"].tolist()
    assert close(
        normalize(S["images_uint8"].float() / 255, encoder.config), S["pixel_values"], 1e-6
    )


def test_every_step_of_the_encoder(hidden: dict[str, torch.Tensor]) -> None:
    davit = hidden["davit"]
    davit = davit.flatten(2).mT if davit.ndim == 4 else davit
    assert close(davit, S["s1_davit_features"])
    assert close(hidden["features"], S["s1_image_features"])
    assert close(hidden["encoder_input"], S["s1_merged_inputs_embeds"])
    assert bool((S["s1_merged_attention_mask"] == 1).all())  # so that no mask is needed
    assert close(hidden["encoder"], S["s1_encoder_last_hidden_state"])
    assert close(hidden["decoder"], S["s1_decoder_last_hidden_state"])
    assert close(hidden["z"], S["s1_language_proj_output"])


def test_the_public_functions(pipe: VLVPipeline) -> None:
    z = pipe.embed(S["images_uint8"])
    assert close(z, S["s1_language_proj_output"])
    assert close(pipe.context(z).sequence, S["s1_text_encoder_output"])
    assert (pipe.image_size, pipe.framing) == (64, "resize")


def test_images_become_noisy_latents(decoder: DiffusionDecoder) -> None:
    posterior = decoder.posterior(S["images_uint8"])
    assert close(posterior.mean, S["s1_vae_mean"])
    assert close(posterior.std, S["s1_vae_std"])
    drawn = Posterior(posterior.mean + posterior.std * S["s1_vae_sample_noise"], posterior.std)
    latents = decoder.draw_latents(drawn, generator=None)
    assert close(latents, S["s1_latents"])
    noisy = decoder.add_noise(latents, S["s1_noise"], S["s1_timesteps"])
    assert close(noisy, S["s1_noisy_latents"])


def loss(decoder: DiffusionDecoder, c: Context) -> torch.Tensor:
    return decoder.denoising_loss(
        S["s1_latents"], c, torch.Generator(), timesteps=S["s1_timesteps"], noise=S["s1_noise"]
    )


def test_the_unet_and_the_three_losses(
    decoder: DiffusionDecoder, hidden: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        c = decoder.context(hidden["z"])
        predicted = decoder._predict(S["s1_noisy_latents"], S["s1_timesteps"], c)
        assert close(predicted, S["s1_pred_noise"])
        assert close(loss(decoder, c), S["s1_loss"], 1e-5)
        assert close(loss(decoder, Context(hidden["z"])), S["s1_loss_no_text_encoder"], 1e-5)
        assert close(F.l1_loss(predicted, S["s1_noise"]), S["s1_loss_l1"], 1e-5)


@pytest.fixture
def gradients(encoder: VLVEncoder, decoder: DiffusionDecoder) -> Iterator[dict[str, torch.Tensor]]:
    """Gradients by the authors' names."""
    encoder.trainable("language")
    encoder.eval()
    loss(decoder, decoder.context(encoder(S["images_uint8"]))).backward()
    yield {
        their_name(name): parameter.grad
        for name, parameter in encoder.named_parameters()
        if parameter.grad is not None
    }
    encoder.zero_grad()


def their_name(name: str) -> str:
    if name.startswith("backbone."):
        return florence_names(name.removeprefix("backbone."))[0]
    return name.replace("queries", "query_embed").replace("projector", "language_proj")


def test_the_gradients(gradients: dict[str, torch.Tensor]) -> None:
    recorded = {key.removeprefix("s1_grad."): S[key] for key in S if key.startswith("s1_grad.")}
    assert len(recorded) == 6
    assert all(close(gradients[name], theirs, 1e-6) for name, theirs in recorded.items())
    norms = values("stage1_reference")["stage1_grad_norms"]
    assert set(gradients) == set(norms)
    assert set(norms) == set(values("stage1_reference")["stage1_trainable"])
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6), name


def test_the_empty_text(pipe: VLVPipeline) -> None:
    ids, _ = tokenize(pipe.tokenizer, pipe.text_encoder, [""])
    assert torch.equal(ids, S["uncond_input_ids"])
    assert close(pipe.decoder.null_context().sequence, S["uncond_text_encoder_output"])


@pytest.mark.parametrize(("run", "steps", "guidance"), [("gen", 4, 2.0), ("gen_n7_g7.5", 7, 7.5)])
def test_sampling(
    pipe: VLVPipeline, monkeypatch: pytest.MonkeyPatch, run: str, steps: int, guidance: float
) -> None:
    """With the recorded noise in place of our own, every step and the images are the same."""
    noise = iter(S[f"{run}_step_noise"])
    first = S[f"{run}_initial_latents"]
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    step = DDPMScheduler.step

    def spy(self: Any, prediction: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(self, prediction, t, *args, **kwargs)
        seen.append((int(t), prediction, output.prev_sample))
        return output

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: next(noise))
    monkeypatch.setattr(DiffusionDecoder, "_first_noise", lambda *args: first)
    monkeypatch.setattr(DDPMScheduler, "step", spy)
    c = pipe.context(pipe.embed(S["images_uint8"]))
    pictures = pipe.draw(c, steps=steps, guidance=guidance, sampler="ddpm")
    timesteps, predictions, latents = zip(*seen, strict=True)
    assert list(timesteps) == S[f"{run}_timesteps"].tolist()
    assert close(torch.stack(latents), S[f"{run}_step_latents"], 1e-3)
    if run == "gen":
        assert close(torch.stack(predictions), S["gen_cfg_noise_pred"], 1e-3)
    expected = (S[f"{run}_decoded"] / 2 + 0.5).clamp(0, 1)
    assert close(pipe.decoder.decode(latents[-1]), expected, 1e-3)
    # They cut levels off where we round.
    ours = np.stack([np.array(picture) for picture in pictures]).astype(int)
    assert np.abs(ours - S[f"{run}_uint8_hwc"].numpy()).max() <= 1


def test_ancestral_sampling_of_a_batch_equals_single_images(pipe: VLVPipeline) -> None:
    c = pipe.context(pipe.embed(S["images_uint8"][:2]))

    def levels(picture: Image.Image) -> np.ndarray:
        return np.array(picture).astype(int)

    both = pipe.draw(c, seed=[3, 4], steps=3, sampler="ddpm")
    one = pipe.draw(c[1:], seed=4, steps=3, sampler="ddpm")
    assert np.abs(levels(both[1]) - levels(one[0])).max() <= 1
    assert (
        np.abs(levels(both[1]) - levels(pipe.draw(c[1:], seed=5, steps=3, sampler="ddpm")[0])).max()
        > 1
    )
