from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from vlv.errors import ConfigError
from vlv.models import encoder as image_encoder
from vlv.models.encoder import VLVEncoder, VLVEncoderConfig, normalize


def test_images_become_caption_embeddings(tiny_encoder: VLVEncoder, pixels: torch.Tensor) -> None:
    z = tiny_encoder(pixels)
    assert z.shape == (3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    assert z.dtype == torch.float32
    assert not torch.allclose(z[0], z[1], atol=1e-4)


def test_the_two_halves_make_the_whole(tiny_encoder: VLVEncoder, pixels: torch.Tensor) -> None:
    features = tiny_encoder.image_features(pixels)
    assert features.shape == (3, 17, 32)
    assert torch.equal(tiny_encoder.encode_features(features), tiny_encoder(pixels))


def test_a_batch_equals_single_images(tiny_encoder: VLVEncoder, pixels: torch.Tensor) -> None:
    singles = torch.cat([tiny_encoder(image[None]) for image in pixels])
    assert torch.allclose(tiny_encoder(pixels), singles, atol=1e-5)


def test_the_parts_are_those_of_florence(tiny_encoder: VLVEncoder, pixels: torch.Tensor) -> None:
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    expected = tiny.make_florence().get_image_features((pixels - mean) / std).pooler_output
    assert torch.allclose(tiny_encoder.image_features(pixels), expected, atol=1e-6)
    tokenizer = tiny.make_florence_tokenizer()
    assert tiny_encoder.config.prompt_ids == tokenizer(tiny.PROMPT).input_ids
    assert tiny_encoder.config.prompt_ids[0] == tokenizer.bos_token_id
    assert tiny_encoder.config.prompt_ids[-1] == tokenizer.eos_token_id


def test_queries_see_only_earlier_queries(tiny_encoder: VLVEncoder, pixels: torch.Tensor) -> None:
    before = tiny_encoder(pixels)
    with torch.no_grad():
        tiny_encoder.queries[:, 5] *= -1
    changed = (tiny_encoder(pixels) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True] * 3


def test_bytes_equal_floats(tiny_encoder: VLVEncoder, pixels: torch.Tensor) -> None:
    levels = (pixels * 255).round().to(torch.uint8)
    assert torch.allclose(tiny_encoder(levels), tiny_encoder(levels.float() / 255), atol=1e-6)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        tiny_encoder(pixels[0])
    with pytest.raises(ValueError, match="uint8 or float"):
        tiny_encoder(levels.long())


def test_other_sizes_are_resized_as_pil_does() -> None:
    encoder = tiny.make_encoder(image_size=48)
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    by_pil = np.array(Image.fromarray(levels).resize((48, 48), Image.Resampling.BICUBIC))

    def as_pixels(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255

    ours = normalize(as_pixels(levels), encoder.config)
    theirs = normalize(as_pixels(by_pil), encoder.config)
    assert ours.shape[-2:] == (48, 48)
    assert torch.equal(ours, theirs)


def test_the_seed_draws_the_head_and_nothing_else() -> None:
    state = torch.get_rng_state()
    one = VLVEncoder.from_florence(
        florence := tiny.make_florence(),
        tiny.make_florence_tokenizer(),
        num_queries=4,
        text_width=32,
        image_size=32,
        seed=1,
    )
    assert torch.equal(state, torch.get_rng_state())
    assert one.backbone is florence
    same, other = tiny.make_encoder(seed=5), tiny.make_encoder(seed=5)
    assert torch.equal(same.queries, other.queries)
    assert torch.equal(same.projector[2].weight, other.projector[2].weight)
    assert not torch.equal(same.queries, tiny.make_encoder(seed=6).queries)
    assert same.queries.std().item() == pytest.approx(1.0, abs=0.15)


def test_language_training_leaves_the_vision_tower_alone(pixels: torch.Tensor) -> None:
    encoder = tiny.make_encoder()
    trained = encoder.trainable("language")
    encoder.train()
    encoder(pixels).square().sum().backward()
    backbone = encoder.backbone.model
    frozen = [*backbone.vision_tower.parameters(), *backbone.multi_modal_projector.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(p.grad is not None for p in trained)
    assert all((q > 0).all() for q in encoder.queries.grad.abs().sum(-1))
    assert {id(p) for p in trained} | {id(p) for p in frozen} == {
        id(p) for p in encoder.parameters()
    }


def test_all_and_none_train_all_and_none(tiny_encoder: VLVEncoder, pixels: torch.Tensor) -> None:
    assert tiny_encoder.trainable("none") == []
    assert len(tiny_encoder.trainable("all")) == len(list(tiny_encoder.parameters()))
    tiny_encoder.train()(pixels).sum().backward()
    assert tiny_encoder.backbone.model.vision_tower.convs[0].conv.weight.grad is not None


def test_a_frozen_vision_tower_has_no_drop_path(pixels: torch.Tensor) -> None:
    florence = tiny.make_florence(drop_path_rate=0.9)
    encoder = VLVEncoder.from_florence(
        florence,
        tiny.make_florence_tokenizer(),
        num_queries=4,
        text_width=32,
        image_size=32,
        seed=0,
    )
    encoder.trainable("language")
    encoder.train()
    assert encoder.training
    assert not encoder.backbone.model.vision_tower.training
    assert torch.equal(encoder.image_features(pixels), encoder.image_features(pixels))
    encoder.trainable("all")
    encoder.train()
    assert not torch.equal(encoder.image_features(pixels), encoder.image_features(pixels))


def test_saved_and_loaded_it_is_the_same(
    tiny_encoder: VLVEncoder, pixels: torch.Tensor, tmp_path: Path
) -> None:
    tiny_encoder.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded, info = VLVEncoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert not loaded.training
    for name, tensor in tiny_encoder.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.config.prompt_ids == tiny_encoder.config.prompt_ids
    assert torch.allclose(loaded(pixels), tiny_encoder(pixels), atol=1e-5)
    language = loaded.backbone.model.language_model
    assert loaded.backbone.lm_head.weight is language.shared.weight
    assert language.encoder.embed_tokens.weight is language.shared.weight


def test_gradient_checkpointing_changes_no_gradient(pixels: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = tiny.make_encoder()
        encoder.trainable("language")
        encoder.train()
        if checkpointing:
            encoder.activation_checkpointing_enable()
        encoder(pixels).square().sum().backward()
        gradients.append(encoder.queries.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"), [({"prompt_ids": []}, "prompt_ids"), ({"num_queries": 97}, "1 and 96")]
)
def test_configurations_that_cannot_work_are_refused(
    tiny_encoder: VLVEncoder, change: dict[str, object], message: str
) -> None:
    config = VLVEncoderConfig(**(tiny_encoder.config.to_dict() | change))
    with pytest.raises(ConfigError, match=message):
        VLVEncoder(config)


def test_a_frozen_tower_reads_a_few_images_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.make_encoder()
    pixels = torch.rand(5, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    whole = encoder.image_features(pixels).detach()
    seen: list[int] = []
    encoder.vision()[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    monkeypatch.setattr(image_encoder, "_PIXELS_AT_ONCE", 2 * tiny.IMAGE_SIZE**2 + 1)
    encoder.trainable("language")
    assert torch.allclose(encoder.image_features(pixels), whole, atol=1e-6)
    assert seen == [2, 2, 1]
    encoder.trainable("all")
    encoder.image_features(pixels)
    with torch.no_grad():
        encoder.image_features(pixels)
    assert seen[3:] == [5, 2, 2, 1], "where it learns, all are kept for the gradient anyway"
