"""`vlv embed` and `vlv info`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.cli.conftest import Vlv
from tests.tiny import NUM_QUERIES, TEXT_WIDTH
from vlv.config import ModelPreset
from vlv.jobs import plans
from vlv.models.pipeline import VLVPipeline
from vlv.training.prediction import Footprint

GB = 10**9


@pytest.fixture
def args(tiny_folder: Path, photos: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("embed", photos, "--model", tiny_folder, "-o", tmp_path / "z.safetensors")


def test_embed(
    vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path, tiny_pipeline: VLVPipeline
) -> None:
    assert vlv(*args, "--batch-size", 2).code == 0
    z = load_file(tmp_path / "z.safetensors")["z"]
    about = json.loads((tmp_path / "z.json").read_text())
    assert list(z.shape) == about["shape"] == [5, NUM_QUERIES, TEXT_WIDTH]
    assert about["ids"] == ["0.png", "1.png", "2.png", "3.png", "more/4.jpg"]
    assert (about["dtype"], len(about["model_hash"])) == ("float32", 64)
    expected = tiny_pipeline.embed([photos / name for name in about["ids"]])
    torch.testing.assert_close(z, expected, atol=1e-5, rtol=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "z.safetensors", "z.json"}


def test_rerun_is_a_no_op_and_new_files_are_added(
    vlv: Vlv, args: tuple[object, ...], photos: Path, tmp_path: Path
) -> None:
    held_back = (photos / "2.png").read_bytes()
    (photos / "2.png").unlink()
    vlv(*args)
    first = (tmp_path / "z.safetensors").read_bytes()
    assert "done 0, skipped 4" in vlv(*args).err
    assert (tmp_path / "z.safetensors").read_bytes() == first
    (photos / "2.png").write_bytes(held_back)
    assert "done 1, skipped 4" in vlv(*args).err
    about = json.loads((tmp_path / "z.json").read_text())
    assert about["ids"] == ["0.png", "1.png", "2.png", "3.png", "more/4.jpg"], "input order"


def test_interrupted_run_loses_nothing(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, calls = VLVPipeline.embed, iter([False, True])

    def interrupted(self: VLVPipeline, *rest: object, **options: object) -> object:
        if next(calls):
            raise KeyboardInterrupt
        return embed(self, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(VLVPipeline, "embed", interrupted)
        result = vlv(*args, "--batch-size", 2)
    assert result.code == 130
    assert "2 results are kept" in result.err
    assert "done 3, skipped 2" in vlv(*args, "--batch-size", 2).err
    assert load_file(tmp_path / "z.safetensors")["z"].shape[0] == 5
    assert not (tmp_path / "z.safetensors.parts").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--store-dtype", "float16"), "made with other settings"),
        (("--on-existing", "error"), "exists"),
        (("--store-dtype", "int3"), "dtype is 'int3'"),
        (("--dtype", "int3"), "choose auto or one of float32, float16, bfloat16"),
        (("-o", "z.npy"), "must end in .safetensors"),
    ],
)
def test_refusals(
    vlv: Vlv, args: tuple[object, ...], tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    vlv(*args)
    before = (tmp_path / "z.safetensors").read_bytes()
    result = vlv(*args, *options)
    assert result.code == 1
    assert message in result.err
    assert (tmp_path / "z.safetensors").read_bytes() == before


def test_overwrite_with_half_precision(vlv: Vlv, args: tuple[object, ...], tmp_path: Path) -> None:
    vlv(*args)
    assert vlv(*args, "--store-dtype", "float16", "--on-existing", "overwrite").code == 0
    assert load_file(tmp_path / "z.safetensors")["z"].dtype == torch.float16


def test_info(vlv: Vlv, tiny_folder: Path, tiny_pipeline: VLVPipeline) -> None:
    result = vlv("info", tiny_folder)
    assert result.code == 0
    lines = {line.split()[0]: line for line in result.out.splitlines()}
    for part in (
        "encoder",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
        "scheduler",
        "caption_decoder",
    ):
        assert part in lines
    num = sum(p.numel() for p in tiny_pipeline.vae.parameters())
    assert f"{num / 1e6:.2f} M" in lines["vae"]
    assert "F32" in lines["unet"]
    assert lines["can:"].split(None, 1)[1] == "embed, caption, reconstruct, generate, search"


def test_info_reads_the_model_card(vlv: Vlv, tiny_pipeline: VLVPipeline, tmp_path: Path) -> None:
    card = "---\nlicense: apache-2.0\nknows: cubes\nparts:\n  vae: mit\n---\n# name\n"
    tiny_pipeline.save_pretrained(tmp_path / "m", card=card)
    result = vlv("info", tmp_path / "m")
    assert "licence: apache-2.0" in result.out
    assert "knows:   cubes" in result.out
    assert next(line for line in result.out.splitlines() if " vae " in line).endswith("mit")


def test_info_shows_references(vlv: Vlv, tiny_pipeline: VLVPipeline, tmp_path: Path) -> None:
    reference = {"repo": "owner/name", "subfolder": "unet", "revision": "abc"}
    tiny_pipeline.save_pretrained(tmp_path / "m", references={"unet": reference})
    assert "-> owner/name/unet@abc" in vlv("info", tmp_path / "m").out


@pytest.mark.slow
def test_info_of_a_preset(
    vlv: Vlv, tiny_models: ModelPreset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every use is set up for its prediction; tests/jobs/test_plans.py has what is predicted."""
    monkeypatch.setattr(plans, "predict_step", lambda *_, **__: Footprint(4 * GB, GB, GB, 2 * GB))
    monkeypatch.setattr(plans, "predict_inference", lambda *_: Footprint(3 * GB, activations=GB))
    file = tmp_path / "models.yaml"
    file.write_text(yaml.safe_dump(tiny_models.model_dump(mode="json", exclude_none=True)))
    result = vlv("info", file, "--batch-size", 2)
    assert result.code == 0
    for part in ("florence", "decoder", "llm", "queries, projectors"):
        assert f"  {part} " in result.out
    rows = {line.strip()[:14].strip(): line.split() for line in result.out.splitlines()}
    for use in ("captioning", "reconstruction"):
        assert rows[use][-7:] == ["2", "bf16", "3.00", "0.00", "0.00", "1.00", "4.00"]
    for use in ("stage 1", "stage 2", "stage 3"):
        assert "2" in rows[use]
        assert rows[use][-5:] == ["4.00", "1.00", "1.00", "2.00", "8.00"]


def test_info_of_a_preset_downloads_nothing(vlv: Vlv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlv.jobs.plans.plan_uses", lambda *_, **__: [])
    result = vlv("info", "paper-0.5b")
    assert result.code == 0
    assert "Qwen/Qwen2.5-0.5B  Apache-2.0" in result.out
    assert "  494.03 M   0.99 GB" in result.out
    assert "CreativeML Open RAIL++-M" in result.out


@pytest.mark.slow
def test_info_of_what_cannot_be(vlv: Vlv) -> None:
    result = vlv("info", "paper", "--set", "model.llm=some/model")
    assert result.code == 1
    assert "sizes of some/model are not known before it is downloaded" in result.err
    result = vlv("info", "paper", "--set", "model.llm=/no/such/folder")
    assert (result.code, result.out) == (1, "")
    assert (
        "there is no folder /no/such/folder, and a model on the hub is named owner/name"
        in result.err
    )
    assert 'no model or preset "papper"; did you mean paper?' in vlv("info", "papper").err
    assert vlv("info", "vlv-tiny", "--batch-size", 2).code == 1
    result = vlv("caption", "x.png", "--model", "paper")
    assert result.code == 1


@pytest.fixture
def stored(vlv: Vlv, args: tuple[object, ...], tmp_path: Path) -> Path:
    assert vlv(*args).code == 0
    return tmp_path / "z.safetensors"


def test_embeddings_are_captioned_like_their_images(
    vlv: Vlv, stored: Path, photos: Path, tiny_folder: Path
) -> None:
    options = ("--model", tiny_folder, "--max-new-tokens", 5)
    images = vlv("caption", photos, *options, "-o", "-")
    from_z = vlv("caption", stored, *options, "-o", "-")
    assert (from_z.code, len(from_z.out.splitlines())) == (0, 5)
    for one, other in zip(images.out.splitlines(), from_z.out.splitlines(), strict=True):
        assert json.loads(one)["caption"] == json.loads(other)["caption"]
        assert json.loads(one)["id"] == json.loads(other)["id"]


@pytest.mark.slow
def test_embeddings_are_reconstructed_and_mixed_like_their_images(
    vlv: Vlv, stored: Path, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    options = ("--model", tiny_folder, "--steps", 2)
    vlv("reconstruct", photos / "1.png", "-o", tmp_path / "a", *options)
    assert vlv("reconstruct", stored, "-o", tmp_path / "b", *options).code == 0
    names = {path.name for path in (tmp_path / "b").rglob("*.png")}
    assert len(names) == 5
    one = vlv("mix", photos / "1.png", photos / "1.png", "-o", tmp_path / "c.png", *options)
    assert one.code == 0
    weights = ("--weights", "0,1,0,0,0")
    assert vlv("mix", stored, "-o", tmp_path / "d.png", *weights, *options).code == 0
    with Image.open(tmp_path / "a" / "1.png") as a, Image.open(tmp_path / "d.png") as d:
        assert max(abs(x - y) for x, y in zip(a.tobytes(), d.tobytes(), strict=True)) <= 1


def test_embeddings_of_another_model_are_refused(
    vlv: Vlv, stored: Path, tiny_pipeline: VLVPipeline, tmp_path: Path
) -> None:
    other = copy.deepcopy(tiny_pipeline)
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1)  # type: ignore[union-attr]
    other.save_pretrained(tmp_path / "other")
    result = vlv("caption", stored, "--model", tmp_path / "other")
    assert (result.code, "was made by another model" in result.err) == (1, True)
