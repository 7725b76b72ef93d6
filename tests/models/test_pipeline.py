from __future__ import annotations

import dataclasses
import inspect
import io
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import tiny
from vlv.errors import (
    ConfigError,
    MissingPartError,
    ModelFolderError,
    OutputError,
    VLVError,
)
from vlv.models import components, hub
from vlv.models import folder as folders
from vlv.models.decoding import Generation, GenerationOptions
from vlv.models.pipeline import Drawing, DrawingOptions, VLVPipeline

FAST: dict[str, Any] = {"steps": 2}
SHORT: dict[str, Any] = {"max_new_tokens": 4}


def levels(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(list(picture.tobytes())).float()


def alike(a: Image.Image, b: Image.Image) -> bool:
    return bool((levels(a) - levels(b)).abs().max() <= 1)


@pytest.fixture
def copy_of(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


# --- one and several ------------------------------------------------------------------------------


def test_one_image_gives_one_result_and_several_give_a_list(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    pipe = tiny_pipeline
    z = pipe.embed(pixels)
    assert z.shape == (3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    assert torch.allclose(pipe.embed(pixels[1]), z[1], atol=1e-5)
    assert torch.allclose(pipe.embed(list(pixels), batch_size=2), z, atol=1e-5)
    captions = pipe.caption(pixels, **SHORT)
    assert captions == [pipe.caption(image, **SHORT) for image in pixels]
    assert captions == pipe.caption(z=z, batch_size=2, **SHORT)
    assert captions[0] == pipe.caption(z=z[0], **SHORT)
    c = pipe.context(z)
    assert c.sequence.shape == z.shape
    assert torch.allclose(pipe.context(z[0]).sequence, c[:1].sequence, atol=1e-6)


def test_reconstruction_of_a_batch_equals_single_images(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    pictures = tiny_pipeline.reconstruct(pixels, seed=[4, 5, 6], batch_size=2, **FAST)
    single = tiny_pipeline.reconstruct(pixels[2], seed=6, **FAST)
    assert [picture.size for picture in pictures] == [(tiny.IMAGE_SIZE,) * 2] * 3
    assert alike(pictures[2], single)
    z = tiny_pipeline.embed(pixels[2])
    assert alike(single, tiny_pipeline.reconstruct(z=z, seed=6, **FAST))
    same = tiny_pipeline.reconstruct(pixels, seed=6, **FAST)
    assert alike(same[2], single)


def test_text_becomes_images_and_truncation_is_said(
    tiny_pipeline: VLVPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    picture = tiny_pipeline.generate("a red cube", seed=3, **FAST)
    assert alike(picture, tiny_pipeline.generate(["x", "a red cube"], seed=3, **FAST)[1])
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="vlv"):
        tiny_pipeline.generate("a red cube " * 20, **FAST)
    assert "1 of 1 texts are longer than the text tower's 16 tokens" in caplog.text


def test_images_and_embeddings_are_mixed(tiny_pipeline: VLVPipeline, pixels: torch.Tensor) -> None:
    z = tiny_pipeline.embed(pixels)
    mixed = tiny_pipeline.mix([pixels[0], z[1]], keep=[2, 3])
    assert torch.allclose(mixed, torch.cat([z[0][:2], z[1][:3]]), atol=1e-5)
    average = tiny_pipeline.mix([z[0], z[1]], weights=[1, 3], mode="average")
    assert torch.allclose(average, (z[0] + 3 * z[1]) / 4, atol=1e-6)
    assert tiny_pipeline.reconstruct(z=mixed, **FAST).size == (32, 32)
    assert isinstance(tiny_pipeline.caption(z=mixed, **SHORT), str)


def test_the_images_of_a_mix_are_embedded_in_one_batch(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, asked, embed = tiny_pipeline.embed(pixels[:2]), [], tiny_pipeline.embed

    def counted(images: Any, **how: Any) -> torch.Tensor:
        asked.append(len(images))
        return embed(images, **how)

    monkeypatch.setattr(tiny_pipeline, "embed", counted)
    mixed = tiny_pipeline.mix([pixels[0], z[1], pixels[1]], keep=[2, 3, 1])
    assert asked == [2]
    assert torch.equal(mixed, torch.cat([z[0, :2], z[1, :3], z[1, :1]]))


def test_guidance_leads_away_from_a_negative(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    c = tiny_pipeline.context(tiny_pipeline.embed(pixels))
    one, other = c[:1], c[1:2]
    plain = tiny_pipeline.draw(one, **FAST)[0]
    empty = tiny_pipeline.decoder.null_context()
    assert alike(tiny_pipeline.draw(one, negative=empty, **FAST)[0], plain)
    away = tiny_pipeline.reconstruct(pixels[0], negative=other, **FAST)
    assert not alike(away, plain)
    unguided = tiny_pipeline.draw(one, guidance=1, **FAST)[0]
    assert alike(tiny_pipeline.draw(one, negative=one, **FAST)[0], unguided)
    with pytest.raises(ConfigError, match="guidance 1 leads away from nothing"):
        tiny_pipeline.draw(one, negative=other, guidance=1, **FAST)
    with pytest.raises(ConfigError, match=f"one context, got {len(c)}"):
        tiny_pipeline.draw(one, negative=c, **FAST)


def test_details_of_captions_are_available(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    (details,) = tiny_pipeline.describe(pixels[0], **SHORT)
    assert details.text == tiny_pipeline.caption(pixels[0], **SHORT)
    assert details.num_tokens <= 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: p.caption(), "give either images"),
        (lambda p, x: p.caption(x, z=p.embed(x)), "give either images"),
        (lambda p, x: p.reconstruct(x, seed=[1, 2]), "3 images need as many seeds, got 2"),
        (lambda p, x: p.embed(x, batch_size=0), "batch_size is 0"),
    ],
)
def test_contradictions_are_refused(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor, call: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        call(tiny_pipeline, pixels)


def test_reading_the_decoder_changes_nothing(tiny_pipeline: VLVPipeline) -> None:
    for name in ("unet", "vae", "text_encoder"):
        getattr(tiny_pipeline, name).train().requires_grad_(True)
    _ = tiny_pipeline.decoder, tiny_pipeline.image_size
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(tiny_pipeline, name)
        assert part.training, name
        assert all(module.training for module in part.modules()), name
        assert all(p.requires_grad for p in part.parameters()), name


def test_the_decoder_is_built_once(pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    build = components.make_diffusion_decoder
    monkeypatch.setattr(
        components, "make_diffusion_decoder", lambda parts: built.append(parts) or build(parts)
    )
    tiny_pipeline = tiny.make_pipeline()
    images = [*pixels, *pixels, *pixels][:8]
    tiny_pipeline.caption(images, batch_size=2, **SHORT)
    tiny_pipeline.reconstruct(images, batch_size=2, **FAST)
    assert len(built) == 1
    tiny_pipeline.unet = other = tiny.make_unet().eval()
    assert tiny_pipeline.decoder.unet is other
    assert len(built) == 2


def test_progress_is_shown_only_when_asked_for(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline.reconstruct(pixels, **FAST)
    tiny_pipeline.caption(pixels, **SHORT)
    assert capsys.readouterr() == ("", "")
    tiny_pipeline.reconstruct(pixels, progress=True, **FAST)
    assert "sampling" in capsys.readouterr().err


# --- arguments ------------------------------------------------------------------------------------


def test_the_options_are_shown_under_their_names() -> None:
    shown = inspect.signature(VLVPipeline.caption).parameters
    assert {"images", "z", "num_beams", "max_new_tokens", "seed"} <= shown.keys()
    assert shown["num_beams"].default == 1
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())
    for method in (VLVPipeline.reconstruct, VLVPipeline.generate, VLVPipeline.draw):
        assert {"steps", "guidance", "sampler"} <= inspect.signature(method).parameters.keys()


@pytest.mark.parametrize(
    ("typed", "kind"), [(GenerationOptions, Generation), (DrawingOptions, Drawing)]
)
def test_the_keywords_are_the_fields(typed: type, kind: type) -> None:
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    keywords = {name: hint.__forward_arg__ for name, hint in typed.__annotations__.items()}
    assert keywords == fields


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, x: p.caption(x, num_beam=2), "caption has no num_beam; did you mean num_beams?"),
        (lambda p, x: p.reconstruct(x, stepps=2), "reconstruct has no stepps; did you mean steps?"),
        (lambda p, x: p.generate("a", cfg_rescale=2), "generate has no cfg_rescale; choose from"),
        (lambda p, x: p.embed(x, batch=2), "embed has no batch; did you mean batch_size?"),
        (lambda p, x: p.mix([x[0], x[1]], weight=[1, 2]), "did you mean weights?"),
        (
            lambda p, x: p.from_pretrained("vlv-tiny", torch_dtype=torch.float16),
            "from_pretrained has no torch_dtype; did you mean dtype?",
        ),
        (lambda p, x: p.from_pretrained("vlv-tiny", device="tpu9"), "device 'tpu9' cannot be used"),
        (lambda p, x: p.from_pretrained("vlv-tiny", dtype="int3"), "dtype is 'int3'"),
        (lambda p, x: p.caption(5), "an image is a PIL image, a path, .* got int"),
        (lambda p, x: p.embed(None), "an image is a PIL image, a path, .* got NoneType"),
        (lambda p, x: p.generate(5), "takes one text or a list of texts, got"),
        (lambda p, x: p.generate([]), "takes one text or a list of texts, got"),
        (lambda p, x: p.reconstruct(x, guidance=float("nan")), "guidance is nan"),
        (lambda p, x: p.reconstruct(x, guidance="2"), "guidance is '2'; give a number"),
        (lambda p, x: p.reconstruct(x, steps=1.5), "steps is 1.5; give a whole number"),
        (lambda p, x: p.reconstruct(x, steps=0), "steps is 0; choose between 1 and 1000"),
        (lambda p, x: p.reconstruct(x, seed=-1), "seed is -1; choose between 0 and"),
        (lambda p, x: p.caption(x, top_p=2.0, do_sample=True), "top_p is 2.0; choose at most 1"),
        (lambda p, x: p.caption(x, top_p=float("nan"), do_sample=True), "top_p is nan"),
        (
            lambda p, x: p.caption(x, max_new_tokens=0),
            "max_new_tokens is 0; choose between 1 and 65536",
        ),
        (
            lambda p, x: p.mix([x[0], x[1]], weights=[float("inf"), 1], mode="slerp"),
            "weight is inf",
        ),
        (lambda p, x: p.mix([x[0], x[1]], keep=[1.5, 2]), "keep is 1.5; give a whole number"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor, call: Any, message: str
) -> None:
    with pytest.raises(VLVError, match=message) as caught:
        call(tiny_pipeline, pixels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        (torch.zeros(32), r"got the shape \(32,\)"),
        (torch.zeros(1, 1, 8, 32), r"got the shape \(1, 1, 8, 32\)"),
        (torch.zeros(0, 8, 32), r"got the shape \(0, 8, 32\)"),
        (torch.zeros(8, 32, dtype=torch.complex64), "of complex64"),
        (torch.full((8, 32), float("nan")), "z holds NaN or infinity"),
        ([[1.0, 2.0], [3.0]], "z is a caption embedding"),
        ("z", "z is a caption embedding"),
        ({}, "z is a caption embedding"),
    ],
)
@pytest.mark.parametrize("method", ["caption", "reconstruct", "context"])
def test_a_wrong_embedding_is_one_sentence(
    tiny_pipeline: VLVPipeline, z: Any, message: str, method: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        getattr(tiny_pipeline, method)(z=z)
    assert "\n" not in str(caught.value)


def test_an_embedding_may_be_an_array_or_a_list(
    tiny_pipeline: VLVPipeline, pixels: torch.Tensor
) -> None:
    z = tiny_pipeline.embed(pixels)
    expected = tiny_pipeline.caption(z=z, **SHORT)
    for same in (z.numpy(), z.tolist(), list(z), z.double()):
        assert tiny_pipeline.caption(z=same, **SHORT) == expected
    assert tiny_pipeline.caption(z=z[0].numpy(), **SHORT) == expected[0]


def test_an_embedding_that_overflows_is_refused(pixels: torch.Tensor) -> None:
    pipe = tiny.make_pipeline()
    with torch.no_grad():
        pipe.encoder.projector[2].bias.fill_(float("inf"))
    with pytest.raises(ConfigError, match="the caption embedding is not finite: float32 overflows"):
        pipe.caption(pixels)


def test_device_and_dtype_are_chosen_when_loading(tiny_folder: Path) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, device="cpu", dtype="bfloat16", parts=["embed"])
    assert pipe.encoder.dtype == torch.bfloat16
    assert pipe.device.type == "cpu"


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_saved_and_loaded_it_is_the_same(
    tiny_pipeline: VLVPipeline, tiny_folder: Path, pixels: torch.Tensor
) -> None:
    loaded = VLVPipeline.from_pretrained(tiny_folder)
    for name in folders.MODELS:
        component, original = getattr(loaded, name), getattr(tiny_pipeline, name)
        assert not component.training
        assert component.dtype == torch.float32
        for key, tensor in original.state_dict().items():
            assert torch.equal(tensor, component.state_dict()[key]), (name, key)
    assert type(loaded.scheduler) is type(tiny_pipeline.scheduler)
    assert loaded.scheduler.config.prediction_type == "epsilon"
    assert loaded.image_size == tiny_pipeline.image_size == tiny.IMAGE_SIZE
    assert loaded.caption(pixels, **SHORT) == tiny_pipeline.caption(pixels, **SHORT)
    assert alike(
        loaded.reconstruct(pixels[0], **FAST), tiny_pipeline.reconstruct(pixels[0], **FAST)
    )


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("embed", {"encoder"}),
        ("search", {"encoder", "text_encoder", "tokenizer"}),
        ("caption", {"encoder", "text_encoder", "caption_decoder"}),
        ("generate", {"text_encoder", "tokenizer", "unet", "vae", "scheduler"}),
        ("reconstruct", {"encoder", "text_encoder", "tokenizer", "unet", "vae", "scheduler"}),
    ],
)
def test_only_the_needed_parts_are_loaded(tiny_folder: Path, task: Any, expected: set[str]) -> None:
    pipe = VLVPipeline.from_pretrained(tiny_folder, parts=[task])
    assert {name for name in folders.COMPONENTS if getattr(pipe, name) is not None} == expected
    assert pipe.image_size == tiny.IMAGE_SIZE


def test_a_method_without_its_parts_says_so(
    tiny_folder: Path, pixels: torch.Tensor, tiny_pipeline: VLVPipeline
) -> None:
    captioner = VLVPipeline.from_pretrained(tiny_folder, parts=["caption"])
    assert captioner.caption(pixels, **SHORT) == tiny_pipeline.caption(pixels, **SHORT)
    with pytest.raises(MissingPartError, match=r'no unet .* which "reconstruct" needs'):
        captioner.reconstruct(pixels)
    generator = VLVPipeline.from_pretrained(tiny_folder, parts=["generate"])
    with pytest.raises(MissingPartError, match='no encoder, which "embed" needs'):
        generator.embed(pixels)
    assert generator.reconstruct(z=torch.zeros(8, 32), **FAST).size == (32, 32)


def test_loading_and_saving_are_silent(
    tiny_pipeline: VLVPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "model", dtype=torch.float16)
    VLVPipeline.from_pretrained(tmp_path / "model")
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_model_without_the_part_is_refused_on_loading(
    copy_of: Path, tiny_pipeline: VLVPipeline
) -> None:
    index = json.loads((copy_of / "model_index.json").read_text())
    index["caption_decoder"] = [None, None]
    (copy_of / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(MissingPartError, match='no caption_decoder, which "caption" needs'):
        VLVPipeline.from_pretrained(copy_of, parts=["caption"])
    with pytest.raises(ModelFolderError, match='"paint" is no part'):
        VLVPipeline.from_pretrained(copy_of, parts=["paint"])  # type: ignore[list-item]
    assert VLVPipeline.from_pretrained(copy_of).caption_decoder is None


def test_half_precision_files_are_loaded_as_float32(
    tiny_pipeline: VLVPipeline, tmp_path: Path, tiny_folder: Path
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert tiny_pipeline.unet.dtype == torch.float32
    sizes = [
        sum(path.stat().st_size for path in root.rglob("*.safetensors"))
        for root in (tmp_path / "half", tiny_folder)
    ]
    assert sizes[0] < 0.6 * sizes[1]
    loaded = VLVPipeline.from_pretrained(tmp_path / "half")
    half = VLVPipeline.from_pretrained(tmp_path / "half", parts=["embed"], dtype=torch.float16)
    for name in folders.MODELS:
        assert getattr(loaded, name).dtype == torch.float32
    weight = tiny_pipeline.encoder.queries
    assert torch.equal(loaded.encoder.queries, weight.half().float())
    assert torch.equal(half.encoder.queries, weight.half())


def test_the_image_size_is_kept_or_derived(copy_of: Path) -> None:
    index = json.loads((copy_of / "model_index.json").read_text())
    index.pop("image_size")
    (copy_of / "model_index.json").write_text(json.dumps(index))
    assert VLVPipeline.from_pretrained(copy_of, parts=["caption"]).image_size == tiny.IMAGE_SIZE
    index["image_size"] = 16
    (copy_of / "model_index.json").write_text(json.dumps(index))
    smaller = VLVPipeline.from_pretrained(copy_of)
    assert smaller.reconstruct(torch.zeros(3, 40, 40), **FAST).size == (16, 16)
    with pytest.raises(ModelFolderError, match="image size of in memory is unknown"):
        _ = VLVPipeline(encoder=smaller.encoder).image_size


# --- folders that are no models -------------------------------------------------------------------


def as_pickle(folder: Path) -> None:
    """Put the same weights into a pickle, which is not opened."""
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def spoil_a_weight(folder: Path) -> None:
    path = folder / "encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["queries"][0, 0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("part", ["caption_decoder/tokenizer", "caption_decoder", "encoder"])
def test_code_in_a_model_folder_is_never_run(
    copy_of: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = copy_of.parent / "evil.txt"
    folder = copy_of / part
    name = "tokenizer_config.json" if part.endswith("tokenizer") else "config.json"
    config = json.loads((folder / name).read_text())
    if "llm_config" in config:
        config["llm_config"]["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    config["auto_map"] = {
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        **dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Evil"),
    }
    config["tokenizer_class"] = "Evil"
    (folder / name).write_text(json.dumps(config))
    for place in (folder, folder.parent):
        (place / "evil.py").write_text(
            f"open({str(evidence)!r}, 'w')\nclass Evil:\n    from_pretrained = None\n"
        )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    with pytest.raises(ModelFolderError, match="names code"):
        VLVPipeline.from_pretrained(copy_of)
    assert not evidence.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing .found: README"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: this is not JSON"),
        (lambda f: shutil.rmtree(f / "vae"), "lists the part vae, but the folder .*vae is missing"),
        (lambda f: (f / "encoder/config.json").unlink(), "encoder in .*config.json is missing"),
        (
            lambda f: (f / "encoder/config.json").write_text("{}"),
            "encoder.config.json has no backbone_config",
        ),
        (
            lambda f: (f / "encoder/model.safetensors").write_bytes(b"torn"),
            "the part encoder in .* cannot be loaded",
        ),
        (
            lambda f: shutil.copy(
                f / "text_encoder/model.safetensors", f / "encoder/model.safetensors"
            ),
            "the weights of encoder in .* do not fit",
        ),
        (
            lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(),
            "the part unet in .* cannot be loaded",
        ),
        (
            lambda f: (f / "scheduler/scheduler_config.json").write_text("{}"),
            "the scheduler None is none of diffusers",
        ),
        (
            lambda f: (f / "scheduler/scheduler_config.json").write_text(
                '{"_class_name": "AutoencoderKL"}'
            ),
            "the scheduler AutoencoderKL is none of diffusers",
        ),
        (lambda f: as_pickle(f / "encoder"), "the part encoder in .* cannot be loaded"),
        (
            lambda f: (f / "unet/model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../../secret.safetensors"}}'
            ),
            "outside its folder",
        ),
        (spoil_a_weight, "the weight queries holds NaN or infinity"),
    ],
)
def test_damaged_folders_say_what_is_wrong(copy_of: Path, damage: Any, message: str) -> None:
    damage(copy_of)
    with pytest.raises(ModelFolderError, match=message):
        VLVPipeline.from_pretrained(copy_of)


def test_unknown_names_say_how_to_name_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setattr(folders, "files", lambda package: tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "weights" / "small")
    assert VLVPipeline.from_pretrained("vlv-small", parts=["embed"]).image_size == tiny.IMAGE_SIZE
    with pytest.raises(
        ModelFolderError, match=r'no model "vlv-big".*\(vlv-small, vlv-3b\).*owner/name'
    ):
        VLVPipeline.from_pretrained("vlv-big")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelFolderError, match="is a file"):
        VLVPipeline.from_pretrained(tmp_path / "weights.bin")


def test_a_hub_id_is_looked_up_and_failure_is_one_sentence() -> None:
    with pytest.raises(ModelFolderError, match="the hub did not give a model") as caught:
        VLVPipeline.from_pretrained("nobody/nothing", local_files_only=True)
    assert "\n" not in str(caught.value)


def test_only_the_needed_folders_are_downloaded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo: str, **settings: Any) -> str:
        asked.update(settings, repo=repo)
        return str(tiny_folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    VLVPipeline.from_pretrained("some/model", parts=["caption"], revision="v2")
    assert asked["repo"] == "some/model"
    assert asked["revision"] == "v2"
    assert set(asked["allow_patterns"]) == {
        "model_index.json",
        "doubts.json",
        "search.safetensors",
        "encoder/*",
        "text_encoder/*",
        "text_encoder_2/*",  # of the families with two towers
        "caption_decoder/*",
    }


# --- saving ---------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_model_alone(
    copy_of: Path, tiny_pipeline: VLVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    before = sorted(path.name for path in copy_of.iterdir())
    monkeypatch.setattr(components, "write_index", fail)
    with pytest.raises(OutputError, match="copy cannot be written"):
        tiny_pipeline.save_pretrained(copy_of)
    assert sorted(path.name for path in copy_of.iterdir()) == before
    assert [path.name for path in copy_of.parent.iterdir()] == ["copy"]
    VLVPipeline.from_pretrained(copy_of, parts=["embed"])


def test_a_model_is_replaced_as_a_whole_and_its_card_kept(
    copy_of: Path, tiny_pipeline: VLVPipeline
) -> None:
    (copy_of / "README.md").write_text("my card")
    (copy_of / "stale.txt").touch()
    tiny_pipeline.save_pretrained(copy_of)
    assert not (copy_of / "stale.txt").exists()
    assert (copy_of / "README.md").read_text() == "my card"
    tiny_pipeline.save_pretrained(copy_of, card="another")
    assert (copy_of / "README.md").read_text() == "another"
    assert (copy_of / "encoder/model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_folder_that_is_no_model_is_never_overwritten(
    tmp_path: Path, tiny_pipeline: VLVPipeline
) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(OutputError, match="exists and is no model folder"):
        tiny_pipeline.save_pretrained(tmp_path)


def test_weights_that_do_not_fit_half_precision_are_refused(tmp_path: Path) -> None:
    pipe = VLVPipeline(encoder=tiny.make_encoder(), image_size=32)
    with torch.no_grad():
        pipe.encoder.queries[0, 0, 0] = 1e6
    with pytest.raises(OutputError, match="encoder: the weight queries does not fit"):
        pipe.save_pretrained(tmp_path / "half", dtype=torch.float16)


def test_components_may_be_references(
    tiny_pipeline: VLVPipeline, tmp_path: Path, pixels: torch.Tensor, copy_of: Path
) -> None:
    references: dict[str, folders.Reference] = {
        name: {"repo": "../copy", "subfolder": name, "revision": None} for name in ("unet", "vae")
    }
    tiny_pipeline.save_pretrained(tmp_path / "light", references=references)
    assert not (tmp_path / "light" / "unet").exists()
    light = VLVPipeline.from_pretrained(tmp_path / "light")
    assert torch.equal(light.unet.conv_in.weight, tiny_pipeline.unet.conv_in.weight)
    light.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "unet").exists()
    light.save_pretrained(tmp_path / "full", references={})
    assert (tmp_path / "full" / "unet").exists()


def test_a_reference_to_the_hub_is_downloaded(
    tiny_pipeline: VLVPipeline,
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repo: str, **settings: Any) -> str:
        asked.update(settings, repo=repo)
        return str(tiny_folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    reference: folders.Reference = {"repo": "some/diffusion", "subfolder": "vae", "revision": "r1"}
    tiny_pipeline.save_pretrained(tmp_path / "light", references={"vae": reference})
    assert VLVPipeline.from_pretrained(tmp_path / "light").vae is not None
    assert (asked["repo"], asked["revision"]) == ("some/diffusion", "r1")
    assert "vae/*" in asked["allow_patterns"]


def test_the_card_names_the_parts(tiny_folder: Path) -> None:
    card = (tiny_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vlv")
    assert 'from_pretrained("vlv-random")' in card
    assert "| `unet` | UNet2DConditionModel | 0.3 M | not recorded | **unknown** |" in card


def test_the_model_is_pushed_with_its_card(
    tiny_pipeline: VLVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[tuple[str, set[str], str]] = []

    class FakeHub:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **settings: Any) -> None:
            assert settings == {"private": True, "exist_ok": True}

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
            names = {path.name for path in folder_path.iterdir()}
            uploads.append((repo_id, names, (folder_path / "README.md").read_text()))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(hub, "HfApi", FakeHub)
    address = tiny_pipeline.push_to_hub("me/model", private=True, token="secret")
    assert address == "https://hub/me/model/commit/1"
    ((repo, names, card),) = uploads
    assert repo == "me/model"
    assert {"model_index.json", "encoder", "unet", "README.md"} <= names
    assert 'from_pretrained("me/model")' in card


def test_a_saved_model_does_not_tell_where_it_was_loaded_from(
    tiny_folder: Path, tmp_path: Path
) -> None:
    VLVPipeline.from_pretrained(tiny_folder).save_pretrained(tmp_path / "copy")
    written = [path.read_text() for path in (tmp_path / "copy").rglob("*.json")]
    assert len(written) > 6
    assert not [text for text in written if str(tiny_folder) in text]


@pytest.mark.slow
def test_diffusers_loads_a_model_folder(tiny_folder: Path, tiny_pipeline: VLVPipeline) -> None:
    loaded = DiffusionPipeline.from_pretrained(tiny_folder)
    assert isinstance(loaded, VLVPipeline)
    assert loaded.image_size == tiny_pipeline.image_size
    image = torch.zeros(3, loaded.image_size, loaded.image_size, dtype=torch.uint8)
    assert torch.equal(loaded.embed(image), VLVPipeline.from_pretrained(tiny_folder).embed(image))
    assert loaded.caption(image) == VLVPipeline.from_pretrained(tiny_folder).caption(image)
