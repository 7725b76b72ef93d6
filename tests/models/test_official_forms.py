"""Checkpoints of other sizes, in every form, come back exactly."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.models import official_world as world
from tests.models.official_files import COMPONENTS, STAGE1, STAGE2, tensors, values
from vlv.models.official import convert_official, load_official, load_stage1, load_stage2
from vlv.models.official_parts import Components, canonical, florence_names, is_unneeded
from vlv.models.pipeline import VLVPipeline

IMAGES = tensors("stage1_reference")["images_uint8"][:2]


class World(NamedTuple):
    pipe: VLVPipeline
    parts: Components


def make(folder: Path, number: int) -> World:
    """A random model and its component folders, without weights."""
    parts = world.write_components(folder / "components", world.SIZES[number])
    return World(world.make_pipeline(parts, world.SIZES[number], seed=number), parts)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make(tmp_path_factory.mktemp("world"), 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[int, World]:
    return {n: make(tmp_path_factory.mktemp("other"), n) for n in range(1, len(world.SIZES))}


@torch.no_grad()
def outputs(pipe: VLVPipeline) -> dict[str, Any]:
    """What a model makes of the images."""
    z = pipe.embed(IMAGES)
    c = pipe.context(z)
    found: dict[str, Any] = {"z": z, "c": c.sequence}
    if pipe.unet is not None:
        latents = pipe.decoder.encode(IMAGES)
        found["latents"] = latents
        found["noise"] = pipe.decoder._predict(latents, torch.tensor([5, 700]), c)
    if pipe.caption_decoder is not None:
        captions = pipe.describe(z=z, max_new_tokens=6, tidy=False)
        found["ids"] = torch.tensor([caption.ids for caption in captions])
    return found


@cache
def expected_outputs(pipe: VLVPipeline) -> dict[str, Any]:
    """Of a model that several tests compare theirs with."""
    return outputs(pipe)


def same(ours: VLVPipeline, theirs: VLVPipeline) -> bool:
    found, expected = outputs(ours), expected_outputs(theirs)
    assert len(found) >= 3
    return all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(world.SIZES)))
@pytest.mark.parametrize("stage", [1, 2])
def test_other_widths_depths_and_seeds(
    others: dict[int, World], number: int, stage: int, tmp_path: Path
) -> None:
    other = others[number]
    path = world.single(tmp_path, world.official_state(other.pipe, stage))
    pipe = (load_stage1 if stage == 1 else load_stage2)(path, other.parts)
    size = world.SIZES[number]
    assert pipe.embed(IMAGES).shape == (2, size["queries"], size["width"])
    assert same(pipe, other.pipe)


@pytest.mark.slow
@pytest.mark.parametrize("form", world.FORMS, ids=lambda form: form.__name__)
def test_every_form_of_stage_1(made: World, form: Any, tmp_path: Path) -> None:
    path = form(tmp_path, world.official_state(made.pipe, 1))
    assert same(load_stage1(path, made.parts), made.pipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefix", "stage"),
    [("module.", 1), ("model.", 1), ("model.", 2), ("module.model.", 2), ("_orig_mod.", 1)],
)
def test_every_wrapper(made: World, prefix: str, stage: int, tmp_path: Path) -> None:
    state = world.official_state(made.pipe, stage)
    path = world.single(tmp_path, {prefix + key: tensor for key, tensor in state.items()})
    pipe, report = load_official(path, made.parts)
    assert report.stage == stage
    assert not [*report.missing, *report.unexpected, *report.misshaped]
    assert same(pipe, made.pipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_types(made: World, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: x.to(dtype) for key, x in world.official_state(made.pipe, 2).items()}
    pipe = load_stage2(world.plain(tmp_path, state), made.parts)
    assert {p.dtype for p in pipe.encoder.parameters()} == {torch.float32}
    weights = made.pipe.caption_decoder.state_dict()
    for key, tensor in pipe.caption_decoder.state_dict().items():
        assert torch.equal(tensor, weights[key].to(dtype).float()), key
    low = load_stage2(tmp_path / "model.pt", made.parts, dtype=dtype)
    assert {low.encoder.dtype, low.text_encoder.dtype, low.caption_decoder.dtype} == {dtype}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_parts_come_from_the_components(made: World, stage: int, tmp_path: Path) -> None:
    parts = Components.at(_copy(made.parts, tmp_path))
    world.write_frozen(made.pipe, parts)
    state = world.official_state(made.pipe, stage, frozen=False)
    pipe, report = load_official(world.single(tmp_path, state), parts)
    assert same(pipe, made.pipe)
    assert pipe.unet is not None
    assert report.sources == {
        "encoder": "checkpoint and components",
        "text_encoder": "components",
        "unet": "components",
        "vae": "components",
    } | ({"caption_decoder": "checkpoint"} if stage == 2 else {})
    assert report.missing
    assert all(name.startswith("model.") for name in report.missing)


def _copy(parts: Components, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(parts.florence.parent, folder / "components"))


@pytest.mark.slow
def test_a_native_florence_folder_will_do(made: World, tmp_path: Path) -> None:
    """Configuration and weights as `save_pretrained` of transformers writes them."""
    parts = Components.at(_copy(made.parts, tmp_path))
    world.write_frozen(made.pipe, parts)
    (parts.florence / "pytorch_model.bin").unlink()
    made.pipe.encoder.backbone.save_pretrained(parts.florence)
    state = world.official_state(made.pipe, 1, frozen=False)
    assert same(load_stage1(world.single(tmp_path, state), parts), made.pipe)


def test_only_one_copy_of_the_token_embedding_is_needed(made: World, tmp_path: Path) -> None:
    state = world.official_state(made.pipe, 2)
    for name in (
        "VLV_model.model.language_model.model.shared.weight",
        "qwen2_model.model.embed_tokens.weight",
    ):
        copy = state.pop(name)
        if "shared" in name:
            state["VLV_model.model.language_model.model.decoder.embed_tokens.weight"] = copy
    assert same(load_stage2(world.single(tmp_path, state), made.parts), made.pipe)


@pytest.mark.slow
def test_a_converted_model_is_an_ordinary_folder(made: World, tmp_path: Path) -> None:
    path = world.single(tmp_path, world.official_state(made.pipe, 1))
    report = convert_official(path, made.parts, tmp_path / "out")
    assert report.sources["unet"] == "checkpoint"
    loaded = VLVPipeline.from_pretrained(tmp_path / "out")
    assert (loaded.image_size, loaded.framing) == (64, "resize")
    found, expected = outputs(loaded), expected_outputs(made.pipe)
    # Memory-mapped weights lie elsewhere in memory, which can change the last bit of a convolution.
    assert all(torch.allclose(found[key], expected[key], atol=1e-5) for key in found)
    ids = loaded.tokenizer([""], padding="max_length", max_length=77).input_ids
    assert torch.equal(torch.tensor(ids), tensors("stage1_reference")["uncond_input_ids"])
    written = [path.read_text() for path in (tmp_path / "out").rglob("*.json")]
    assert not [text for text in written if str(tmp_path) in text or str(COMPONENTS) in text]


@pytest.mark.slow
def test_what_is_unknown_or_contradicts_is_reported(made: World, tmp_path: Path) -> None:
    state = world.official_state(made.pipe, 1)
    state["query_embed_ema"] = torch.zeros(2)
    state["vae.quant_conv.extra"] = torch.zeros(2)
    embedding = state["model.language_model.model.shared.weight"]
    state["model.language_model.model.encoder.embed_tokens.weight"] = embedding + 1
    pipe, report = load_official(world.single(tmp_path, state), made.parts)
    assert same(pipe, made.pipe)
    assert sorted(report.unexpected) == [
        "model.language_model.model.encoder.embed_tokens.weight",
        "query_embed_ema",
        "vae.quant_conv.extra",
    ]
    assert "unexpected: 3" in report.lines()
    assert "model.language_model.lm_head.weight" in report.unneeded


def test_misshaped_frozen_tensors_come_from_the_components(made: World, tmp_path: Path) -> None:
    parts = Components.at(_copy(made.parts, tmp_path))
    world.write_frozen(made.pipe, parts)
    state = world.official_state(made.pipe, 1)
    state["vae.quant_conv.bias"] = torch.zeros(3)
    pipe, report = load_official(world.single(tmp_path, state), parts)
    assert same(pipe, made.pipe)
    assert report.misshaped == ["vae.quant_conv.bias (3,) float32, expected (8,) of floats"]
    assert report.missing == ["vae.quant_conv.bias"]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [STAGE1, STAGE2])
def test_every_recorded_tensor_has_its_place(path: Path) -> None:
    _, report = load_official(path, COMPONENTS)
    names = set(tensors(path.stem))
    assert set(report.used) | set(report.unneeded) == names
    assert not [*report.missing, *report.unexpected, *report.misshaped]
    assert all(
        "lm_head" in x or "final_logits" in x or "embed_tokens" in x for x in report.unneeded
    )


def test_the_real_florence_has_the_names_and_shapes_of_the_remote_code() -> None:
    """All 921 keys of Florence-2-large, against the native class on the meta device."""
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    remote = values("florence2_large_remote_shapes")
    large = {"embed_dim": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)}
    config = Florence2Config(
        vision_config={**large, "num_groups": (8, 16, 32, 64), "projection_dim": 1024},
        text_config={
            "model_type": "bart",
            "vocab_size": remote["language_model.model.shared.weight"][0],
            "max_position_embeddings": 4096,
        },
    )
    with torch.device("meta"):
        native = Florence2ForConditionalGeneration(config).state_dict()
    native.pop("lm_head.weight")
    found: dict[str, list[int]] = {}
    for key, tensor in native.items():
        name = florence_names(key)[0]
        shape = list(tensor.shape)
        found[name] = shape[::-1] if name == "model.image_projection" else shape
    expected = {f"model.{key}": shape for key, shape in remote.items()}
    assert len(expected) == 921
    assert set(found) <= set(expected)
    assert all(is_unneeded(key) for key in set(expected) - set(found))
    assert all(expected[key] == shape for key, shape in found.items())
    assert all(canonical(f"module.{key}") == key for key in expected)
