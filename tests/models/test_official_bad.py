"""What is wrong with a checkpoint or its components is said in one sentence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.models.official_files import COMPONENTS, STAGE1, STAGE2, tensors
from vlv.errors import CheckpointError, ModelFolderError, OutputError, VLVError
from vlv.models.official import convert_official, load_official, load_stage1, load_stage2
from vlv.models.official_files import read_tensors
from vlv.models.official_parts import Components

State = dict[str, torch.Tensor]


def assert_refuses(error: type[VLVError], message: str, load: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)


def without(state: State, part: str) -> State:
    kept = {key: tensor for key, tensor in state.items() if part not in key}
    assert len(kept) < len(state)
    return kept


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[State], Path]:
    def save(state: State) -> Path:
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return save


# --- what the checkpoint lacks --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("query_embed", "has no query_embed, the queries; name a complete checkpoint of stage 1"),
        ("language_proj", "has no language_proj, the projector"),
        ("language_proj.2", r"lacks a language_proj\.2\.weight of 2 dimensions"),
        ("model.language_model.", "has no model.language_model, Florence-2's language model"),
        ("decoder.layers.1.fc1.weight", r"lacks .*fc1\.weight, which was trained"),
        ("decoder.embed_positions", r"lacks a .*embed_positions\.weight of 2 dimensions"),
        ("model.vision_tower", r"neither .* has model\.vision_tower\.convs\.0\.proj\.weight"),
        ("text_encoder", "neither .* component folder of the text_encoder .* put the weights"),
        ("unet", r"neither .* component folder of the unet has unet\.conv_in"),
        ("vae.decoder", "neither .* component folder of the vae"),
    ],
)
def test_stage_1_without_a_part(saved: Any, part: str, message: str) -> None:
    path = saved(without(tensors("stage1"), part))
    assert_refuses(CheckpointError, message, lambda: load_stage1(path, COMPONENTS))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("mlp.layers.", "has no mlp, the caption decoder's projector"),
        ("qwen2_model", "has no qwen2_model, the language model"),
        ("VLV_model", "has no query_embed, the queries"),
        ("layers.1.self_attn.q_proj.bias", "lacks .*q_proj.bias, which was trained"),
    ],
)
def test_stage_2_without_a_part(saved: Any, part: str, message: str) -> None:
    path = saved(without(tensors("stage2"), part))
    assert_refuses(CheckpointError, message, lambda: load_stage2(path, COMPONENTS))


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("query_embed", (1, 77, 16), r"query_embed \(1, 77, 16\) float32, expected \(1, 77, 32\)"),
        ("query_embed", (77, 32), "lacks a query_embed of 3 dimensions"),
        ("language_proj.2.weight", (16, 32), "does not fit .*expected .16, 32"),
        ("model.language_model.model.shared.weight", (99, 32), "does not fit .*expected .1347, 32"),
        ("vae.quant_conv.bias", (5,), "neither .* has vae.quant_conv.bias of shape"),
    ],
)
def test_tensors_of_another_shape(saved: Any, key: str, shape: Any, message: str) -> None:
    path = saved(tensors("stage1") | {key: torch.zeros(shape)})
    assert_refuses(CheckpointError, message, lambda: load_stage1(path, COMPONENTS))


def test_whole_numbers_are_no_weights(saved: Any) -> None:
    key = "language_proj.0.bias"
    path = saved(tensors("stage1") | {key: torch.zeros(32, dtype=torch.int8)})
    assert_refuses(
        CheckpointError, r"\(32,\) int8, expected", lambda: load_stage1(path, COMPONENTS)
    )


def test_the_other_stage() -> None:
    message = "is a checkpoint of stage 2; load it with load_stage2"
    assert_refuses(CheckpointError, message, lambda: load_stage1(STAGE2, COMPONENTS))
    message = "is a checkpoint of stage 1; load it with load_stage1"
    assert_refuses(CheckpointError, message, lambda: load_stage2(STAGE1, COMPONENTS))


def test_another_model(saved: Any) -> None:
    path = saved({"encoder.weight": torch.zeros(2), "model.norm.weight": torch.zeros(2)})
    message = r"none of the 2 tensors .*such as encoder\.weight.* authors' VLV"
    assert_refuses(CheckpointError, message, lambda: load_official(path, COMPONENTS))


def test_the_same_tensor_twice(saved: Any) -> None:
    path = saved(tensors("stage1") | {"module.query_embed": torch.zeros(1, 77, 32)})
    message = "holds (module.)?query_embed and (module.)?query_embed, which are the same tensor"
    assert_refuses(CheckpointError, message, lambda: load_official(path, COMPONENTS))


# --- files ----------------------------------------------------------------------------------------


class Code:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("touch harmed",)


def test_a_pickle_with_code_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for zipped in (True, False):
        torch.save({"query_embed": Code()}, "model.pt", _use_new_zipfile_serialization=zipped)
        message = "model.pt is no pickle of tensors alone: it is damaged or would run code"
        assert_refuses(CheckpointError, message, lambda: read_tensors(Path("model.pt")))
    assert not Path("harmed").exists()


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu128"])
def test_pickles_are_refused_below_torch_2_10(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pt")
    assert read_tensors(tmp_path / "model.pt").keys() == {"a"}
    monkeypatch.setattr(torch, "__version__", version)
    message = rf"torch {re.escape(version)} .*CVE-2026-24747.* update torch to 2\.10 or convert"
    assert_refuses(CheckpointError, message, lambda: read_tensors(tmp_path / "model.pt"))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path / "model.safetensors").keys() == {"a"}


def test_a_huge_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with path.open("wb") as file:
        file.truncate(100 * 2**30)  # a hole: it takes no room
    message = r"is a pickle of 107\.4 GB, above the limit of 68\.7 GB; convert it to safetensors"
    assert_refuses(CheckpointError, message, lambda: load_stage1(path, COMPONENTS))
    torch.save({"x": torch.zeros(9)}, path)
    assert_refuses(CheckpointError, "above the limit", lambda: read_tensors(path, max_bytes=99))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.bin", "model.json"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"x" * 1000, b"\x80\x02}"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    message = "is damaged|no pickle of tensors|no index of shards"
    assert_refuses(CheckpointError, message, lambda: read_tensors(tmp_path / name))


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    for name in ("model.pt", "model.safetensors"):
        path = tmp_path / name
        state = {"x": torch.zeros(10_000)}
        torch.save(state, path) if name == "model.pt" else save_file(state, path)
        path.write_bytes(path.read_bytes()[:20_000])
        assert_refuses(
            CheckpointError, "is damaged|no pickle", lambda path=path: read_tensors(path)
        )


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    message = "there is no checkpoint .*nothing.pt; name a .safetensors"
    assert_refuses(
        CheckpointError, message, lambda: load_stage1(tmp_path / "nothing.pt", COMPONENTS)
    )
    message = r"holds no single checkpoint \(weights found: none\)"
    assert_refuses(CheckpointError, message, lambda: load_stage1(tmp_path, COMPONENTS))
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()
    message = r"holds no single checkpoint \(weights found: a.pt, b.pt\); name the file"
    assert_refuses(CheckpointError, message, lambda: load_stage1(tmp_path, COMPONENTS))
    torch.save([1, 2], tmp_path / "a.pt")
    message = "holds no tensors .it holds a list.; name a file of weights"
    assert_refuses(CheckpointError, message, lambda: read_tensors(tmp_path / "a.pt"))


def test_deepspeeds_own_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "mp_rank_00_model_states.pt").touch()
    for folder in (tmp_path, tmp_path / "global_step3"):
        assert_refuses(
            CheckpointError, "zero_to_fp32.py", lambda folder=folder: read_tensors(folder)
        )


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "gone.safetensors"}}, "names the shard gone.safetensors, which is"),
        ({"weight_map": {"x": "../a.bin"}}, r"names the shard '\.\./a\.bin' outside its folder"),
        ({"weight_map": {"y": "a.safetensors"}}, "lists y and 0 more tensors that no shard holds"),
        ({"weight_map": {"y": 3}}, "no index of shards|names the shard"),
        ([], "is no index of shards"),
    ],
)
def test_broken_indices(tmp_path: Path, index: Any, message: str) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert_refuses(CheckpointError, message, lambda: read_tensors(path))


# --- components -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "Florence2large/config.json",
        "Florence2large/preprocessor_config.json",
        "Florence2large/tokenizer.json",
        "stable-diffusion-2-1-base/text_encoder/config.json",
        "stable-diffusion-2-1-base/tokenizer",
        "stable-diffusion-2-1-base/scheduler/scheduler_config.json",
        "stable-diffusion-2-1-base/unet",
        "Qwen2.5",
    ],
)
def test_components_that_are_missing_or_damaged(tmp_path: Path, name: str) -> None:
    parts = Path(shutil.copytree(COMPONENTS, tmp_path / "components"))
    path = parts / name
    checkpoint = STAGE2 if name == "Qwen2.5" else STAGE1
    message = f"{name.split('/')[0]}.* (is missing|cannot be read)"
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_text('{"x": 1}' if "tokenizer" not in name else "{")
        assert_refuses(ModelFolderError, message, lambda: load_official(checkpoint, parts))
        path.unlink()
        if path.name == "tokenizer.json":
            (path.parent / "vocab.json").unlink()
    assert_refuses(ModelFolderError, message, lambda: load_official(checkpoint, parts))


def test_components_of_other_sizes(tmp_path: Path) -> None:
    parts = Path(shutil.copytree(COMPONENTS, tmp_path / "components"))
    path = parts / "stable-diffusion-2-1-base" / "text_encoder" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    message = "writes embeddings of width 32, but the text tower .* reads 64"
    assert_refuses(CheckpointError, message, lambda: load_stage1(STAGE1, parts))
    path = parts / "Florence2large" / "config.json"
    path.write_text(path.read_text().replace('"decoder_layers": 3', '"decoder_layers": 4'))
    message = r"lacks .*decoder\.layers\.3\..*, which was trained"
    assert_refuses(CheckpointError, message, lambda: load_stage1(STAGE1, parts))


def test_no_components_at_all(tmp_path: Path) -> None:
    message = "there is no folder .*gone; name the one that holds Florence2large"
    assert_refuses(ModelFolderError, message, lambda: load_stage1(STAGE1, tmp_path / "gone"))
    parts = Components.at(COMPONENTS)
    no_llm = Components(parts.florence, parts.diffusion)
    message = "no folder of the language model was given"
    assert_refuses(ModelFolderError, message, lambda: load_stage2(STAGE2, no_llm))


def test_nothing_is_written_when_something_is_wrong(saved: Any, tmp_path: Path) -> None:
    path = saved(without(tensors("stage1"), "language_proj.0.bias"))
    with pytest.raises(CheckpointError):
        convert_official(path, COMPONENTS, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model.safetensors"]
    message = "exists and is no model folder"
    assert_refuses(OutputError, message, lambda: convert_official(STAGE1, COMPONENTS, tmp_path))
    assert_refuses(OutputError, message, lambda: convert_official(STAGE1, COMPONENTS, path))
