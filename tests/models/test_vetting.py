"""A stranger's model folder: refused in one sentence before it runs code, fills the memory or hangs."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vlv import VLVPipeline
from vlv.config_files import known_repositories
from vlv.errors import ConfigError, ModelFolderError
from vlv.models import folder as folders
from vlv.models import vetting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def copy_of(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def refusal(folder: Path, *parts: Any) -> str:
    with pytest.raises(ModelFolderError) as caught:
        VLVPipeline.from_pretrained(folder, parts=parts or None)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


SILLY = ("x", None, -3, 64.5, [], {}, True, 10**30)


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("encoder", "num_queries"),
        ("encoder", "text_width"),
        ("encoder", "image_size"),
        ("encoder", "backbone_config.text_config.d_model"),
        ("encoder", "backbone_config.vision_config.projection_dim"),
        ("text_encoder", "hidden_size"),
        ("unet", "layers_per_block"),
        ("unet", "attention_head_dim"),
        ("vae", "latent_channels"),
        ("scheduler", "num_train_timesteps"),
        ("caption_decoder", "text_width"),
        ("caption_decoder", "llm_config.num_hidden_layers"),
        ("caption_decoder", "llm_config.vocab_size"),
    ],
)
def test_a_silly_number_is_named_with_its_file_and_field(
    copy_of: Path, part: str, field: str
) -> None:
    path = copy_of / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    *way, last = field.split(".")
    for value in SILLY:

        def edit(values: dict[str, Any], value: object = value) -> None:
            for step in way:
                values = values[step]
            values[last] = value

        change(path, edit)
        with pytest.raises(ModelFolderError) as caught:
            folders.load_components(folders.read_index(copy_of), [part], torch.float32)
        assert f"{path}: {field} is " in str(caught.value)
        assert "\n" not in str(caught.value)


PARTS = ("encoder", "text_encoder", "unet", "vae", "scheduler", "caption_decoder")


def numbers_in(values: dict[str, Any], way: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The ways to the numbers in a configuration, and in lists in it."""
    for name, value in values.items():
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(value, dict):
            yield from numbers_in(value, (*way, name))
        elif isinstance(inner, int | float) and not isinstance(inner, bool):
            yield (*way, name)


@pytest.mark.parametrize("part", PARTS)
def test_a_silly_value_of_any_number_is_named_or_harmless(
    copy_of: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is accepted is a number of ordinary size, or of a kind that the library itself does not tell."""
    path = copy_of / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    values, index = json.loads(path.read_text()), folders.read_index(copy_of)

    def accept(*anything: object) -> int:
        raise ValueError("accepted")

    monkeypatch.setattr(folders, "predicted_bytes", accept)  # as the next step would take long
    for way in numbers_in(values):
        if {"id2label", "label2id"} & set(way) or way[-1].startswith("_"):
            continue
        large = [] if "rope_theta" in way else [10**12]
        for silly in (float("nan"), "x", {}, *large):
            changed = copy.deepcopy(values)
            inner = changed
            for step in way[:-1]:
                inner = inner[step]
            inner[way[-1]] = silly
            path.write_text(json.dumps(changed))
            with pytest.raises(ModelFolderError) as caught:
                folders.load_components(index, [part], torch.float32)
            text = str(caught.value)
            assert str(path) in text
            assert ".".join(way) in text, f"{way} {silly}: {text}"
            assert "\n" not in text


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "norm_num_groups", 0),
        ("text_encoder", "num_attention_heads", 0),
        ("caption_decoder", "llm_config.hidden_size", 0),
        ("unet", "act_fn", 5),
        ("unet", "down_block_types", 5),
        ("vae", "up_block_types", None),
        ("scheduler", "beta_schedule", []),
    ],
)
def test_a_size_of_nothing_and_what_is_no_text_are_named(
    copy_of: Path, part: str, field: str, value: object
) -> None:
    path = copy_of / part / ("scheduler_config.json" if part == "scheduler" else "config.json")

    def edit(values: dict[str, Any]) -> None:
        *way, last = field.split(".")
        for step in way:
            values = values[step]
        values[last] = value

    change(path, edit)
    assert f"{field} is " in refusal(copy_of)


@pytest.mark.parametrize(
    "field",
    [
        "encoder:backbone_config",
        "encoder:backbone_config.vision_config",
        "caption_decoder:llm_config",
    ],
)
def test_a_part_that_is_not_described_is_not_built_at_full_size(copy_of: Path, field: str) -> None:
    """The default of a library is the largest model of its kind: gigabytes, for a file of three kilobytes."""
    part, _, name = field.partition(":")
    *way, last = name.split(".")

    def edit(values: dict[str, Any]) -> None:
        for step in way:
            values = values[step]
        del values[last]

    path = copy_of / part / "config.json"
    change(path, edit)
    assert refusal(copy_of) == f"{path} has no {name}; copy the model again"


def test_a_silly_image_size_of_the_index_is_named(copy_of: Path) -> None:
    for value in ("x", -3, 0, 64.5, [], {}, True, 10**30):
        change(
            copy_of / "model_index.json", lambda index, value=value: index.update(image_size=value)
        )
        assert "model_index.json: image_size is " in refusal(copy_of)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("framing", "stretch", "model_index.json: framing is 'stretch'"),
        ("framing", ["cut"], "model_index.json: framing is "),
        ("encoder", ["evil", "Evil"], "model_index.json: encoder is .*'evil', 'Evil'"),
        ("encoder", ["vlv.evil", 5], "model_index.json: encoder is "),
        ("encoder", "vlv", "model_index.json: encoder is "),
        ("encoder", 7, "model_index.json: encoder is "),
        ("encoder", {}, "model_index.json: encoder is "),
        ("encoder", {"repo": ["a"]}, "model_index.json: encoder is "),
        ("encoder", {"repo": ".", "subfolder": "../../x"}, "model_index.json: encoder is "),
    ],
)
def test_a_silly_entry_of_the_index_is_named(
    copy_of: Path, name: str, value: object, message: str
) -> None:
    change(copy_of / "model_index.json", lambda index: index.update({name: value}))
    with pytest.raises(ModelFolderError, match=message):
        VLVPipeline.from_pretrained(copy_of)


@pytest.mark.parametrize("field", ["sample_size", "block_out_channels"])
def test_the_size_of_images_is_not_guessed_from_silly_numbers(copy_of: Path, field: str) -> None:
    change(copy_of / "model_index.json", lambda index: index.pop("image_size"))
    part = "unet" if field == "sample_size" else "vae"
    change(copy_of / part / "config.json", lambda values: values.update({field: "x"}))
    assert f"{part}/config.json: {field} is " in refusal(copy_of, "embed")


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "encoder/config.json",
        "scheduler/scheduler_config.json",
        "caption_decoder/tokenizer/tokenizer_config.json",
        "unet/model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize(
    "content",
    [b'{"a":' * 100_000, b"[1]", b"", b"\xff{}", b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"],
    ids=["deep", "a list", "empty", "no text", "rather deep"],
)
def test_a_file_that_is_no_plain_object_is_named(copy_of: Path, name: str, content: bytes) -> None:
    (copy_of / name).write_bytes(content)
    assert name in refusal(copy_of)


@pytest.mark.parametrize("part", ["encoder", "unet", "vae", "text_encoder"])
def test_missing_weights_are_one_sentence_of_ours_and_no_notes_of_a_library(
    copy_of: Path, part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (path,) = (copy_of / part).glob("*.safetensors")
    weights = load_file(path)
    weights.pop(max(weights))
    weights["more"] = torch.zeros(2)
    save_file(weights, path, metadata={"format": "pt"})
    assert f"the weights of {part} in" in refusal(copy_of)
    assert capfd.readouterr() == ("", "")


def test_numbers_that_are_none_are_refused(copy_of: Path) -> None:
    text = (copy_of / "vae/config.json").read_text()
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        (copy_of / "vae/config.json").write_text(
            text.replace('"scaling_factor": ', f'"scaling_factor": {number}, "x": ')
        )
        assert "vae/config.json holds the number" in refusal(copy_of)


# --- code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("encoder/config.json", lambda v: v.update(auto_map={"AutoModel": "evil.Evil"})),
        (
            "caption_decoder/config.json",
            lambda v: v["llm_config"].update(auto_map={"AutoModelForCausalLM": "evil.Evil"}),
        ),
        (
            "caption_decoder/tokenizer/tokenizer_config.json",
            lambda v: v.update(auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        ),
        ("tokenizer/tokenizer_config.json", lambda v: v.update(auto_map={"x": "y"})),
        ("text_encoder/config.json", lambda v: v.update(_attn_implementation="some/kernel")),
        ("model_index.json", lambda v: v.update(custom_pipelines={"x": "y"})),
    ],
)
def test_what_names_code_is_refused(copy_of: Path, name: str, edit: Any) -> None:
    change(copy_of / name, edit)
    text = refusal(copy_of)
    assert f"{name} names code" in text
    assert "which is never run" in text


def test_classes_outside_the_libraries_are_refused(copy_of: Path) -> None:
    tokenizer = copy_of / "caption_decoder/tokenizer/tokenizer_config.json"
    kept = tokenizer.read_text()
    for name in ("Evil", "Qwen2ForCausalLM", ["Evil"]):
        change(tokenizer, lambda values, name=name: values.update(tokenizer_class=name))
        assert "tokenizer_config.json: the tokenizer" in refusal(copy_of)
    tokenizer.write_text(kept)
    change(
        copy_of / "caption_decoder/config.json", lambda v: v["llm_config"].update(model_type="evil")
    )
    assert 'config.json: the model type "evil" is none of transformers' in refusal(copy_of)


def test_adapters_and_special_files_are_refused(copy_of: Path) -> None:
    adapter = copy_of / "text_encoder/adapter_config.json"
    adapter.write_text('{"base_model_name_or_path": "evil/model"}')
    assert "adapter_config.json names an adapter" in refusal(copy_of)
    adapter.unlink()
    os.mkfifo(copy_of / "encoder/more")
    assert "encoder/more is no regular file" in refusal(copy_of)
    (copy_of / "encoder/more").unlink()
    (copy_of / "model_index.json").unlink()
    os.mkfifo(copy_of / "model_index.json")
    assert "model_index.json is missing" in refusal(copy_of)


def test_the_card_of_a_stranger_is_read_with_care(copy_of: Path) -> None:
    (copy_of / "README.md").write_bytes(b"\xff\xfe")
    assert "README.md: the text is not UTF-8" in refusal(copy_of)


def test_a_saved_model_never_names_code(tiny_pipeline: VLVPipeline, tmp_path: Path) -> None:
    decoder = tiny_pipeline.caption_decoder
    decoder.config.llm_config.auto_map = {"AutoModelForCausalLM": "own.Own"}
    decoder.tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": ["own.Own", None]}
    try:
        tiny_pipeline.save_pretrained(tmp_path / "model")
    finally:
        del decoder.config.llm_config.auto_map, decoder.tokenizer.init_kwargs["auto_map"]
    files = list((tmp_path / "model").rglob("*.json"))
    assert files
    assert not [file.name for file in files if "auto_map" in file.read_text("utf-8")]
    assert VLVPipeline.from_pretrained(tmp_path / "model", parts=["caption"]).caption_decoder


# --- size -----------------------------------------------------------------------------------------


def test_a_model_above_the_memory_is_refused_unless_told(
    copy_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLV_MEMORY_GB", "0.001")
    text = refusal(copy_of)
    assert "above the 0.0 GB of this machine" in text
    assert "set VLV_MEMORY_GB" in text
    monkeypatch.setenv("VLV_MEMORY_GB", "4")
    assert VLVPipeline.from_pretrained(copy_of, parts=["embed"]).encoder is not None
    monkeypatch.setenv("VLV_MEMORY_GB", "much")
    with pytest.raises(ConfigError, match="VLV_MEMORY_GB is 'much'; give a number"):
        VLVPipeline.from_pretrained(copy_of)


def test_a_width_that_no_memory_holds_is_refused_before_it_is_asked_for(copy_of: Path) -> None:
    change(
        copy_of / "vae/config.json", lambda v: v.update(block_out_channels=[2**22, 2**22, 2**22])
    )
    assert "GB of this machine" in refusal(copy_of)


@pytest.mark.parametrize("field", ["layers_per_block", "transformer_layers_per_block"])
def test_blocks_without_end_are_refused_before_they_are_built(copy_of: Path, field: str) -> None:
    change(copy_of / "unet/config.json", lambda values: values.update({field: 10**6}))
    assert f"unet/config.json: {field} is 1000000, but a number of 1000 or less" in refusal(copy_of)


def test_the_predicted_size_is_that_of_the_weights(tiny_pipeline: VLVPipeline) -> None:
    for name, kind in folders.MODELS.items():
        model = getattr(tiny_pipeline, name)
        values = model.config.to_dict() if hasattr(kind, "config_class") else dict(model.config)
        found = vetting.predicted_bytes(values, kind, torch.float16)
        assert found == 2 * vetting.num_parameters(model)


@pytest.mark.parametrize("known", known_repositories(), ids=lambda known: known["ids"][0])
def test_the_configurations_of_real_models_pass(known: dict[str, Any]) -> None:
    kinds = {
        "florence": transformers.Florence2Config,
        "text_encoder": transformers.CLIPTextConfig,
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }
    for name, values in known["configs"].items():
        if name == "scheduler":
            kind = folders.scheduler_class(values)
        elif name == "llm":
            kind = transformers.CONFIG_MAPPING[values["model_type"]]
        else:
            kind = kinds[name]
        vetting.check_values(values, kind, Path(name))
