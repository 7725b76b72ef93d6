"""`vlv train`: both stages from folders of parts to a model that captions and rebuilds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.cli.conftest import Vlv, write_image
from tests.tiny import CAPTIONS, IMAGE_SIZE, NUM_QUERIES
from vlv.data.framing import Framing, frame
from vlv.data.images import to_tensor
from vlv.data.source import find_records
from vlv.models.captioner import CaptionDecoder
from vlv.models.card import past_trainings
from vlv.models.encoder import VLVEncoder
from vlv.models.pipeline import VLVPipeline
from vlv.models.pixels import as_float

UNWATCHED = {"held_out": []}
"""No figures of held-out images, and no samples, which take longer than the steps."""


def write_config(path: Path, ingredients: Path, stage: str, **changes: Any) -> Path:
    config: dict[str, Any] = {
        "stage": stage,
        "model": {"decoder": str(ingredients / "decoder")},
        "data": {
            "inputs": [str(ingredients / "train")],
            "held_out": [str(ingredients / "held_out")],
            "image_size": IMAGE_SIZE,
            "num_workers": 0,
        },
        "optim": {"lr": 1e-3},
        "loop": {"steps": 4, "batch_size": 2, "log_every": 1, "trackers": []},
        stage: {},
    }
    if stage == "stage1":
        config["model"] |= {"florence": str(ingredients / "florence"), "num_queries": NUM_QUERIES}
    else:
        config["model"]["llm"] = str(ingredients / "llm")
    for key, value in changes.items():
        config[key] |= value
    path.write_text(yaml.safe_dump(config))
    return path


def weights(model: Path, part: str = "encoder") -> dict[str, torch.Tensor]:
    return load_file(model / part / "model.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "eval"]


@pytest.mark.slow
def test_both_stages(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1")
    run = tmp_path / "stage1"
    result = vlv("train", config, "--run-dir", run)
    assert result.code == 0
    assert f"the model is in {run / 'model'}" in result.err
    assert {"denoising_z", "denoising_null", "denoising_true"} <= metrics(run)[-1].keys()
    with Image.open(next((run / "samples").glob("*.png"))) as sheet:
        assert sheet.size == (4 + 4 * 132, 4 + 2 * 132), "four images above their reconstructions"

    model = {"encoder": str(run / "model")}
    data = {"latents": str(tmp_path / "latents")}
    keep = {"denoising_weight": 1.0}
    config = write_config(
        tmp_path / "2.yaml", ingredients, "stage2", model=model, data=data, stage2=keep
    )
    run = tmp_path / "stage2"
    assert vlv("train", config, "--run-dir", run).code == 0
    assert {"held_out_caption", "held_out_denoising", "denoising_z"} <= metrics(run)[-1].keys()
    assert len(next((run / "samples").glob("*.txt")).read_text().splitlines()) >= 4

    first, second = past_trainings(run / "model")
    assert (first.stage, first.steps, first.num_images) == ("stage1", 4, 6)
    assert (second.stage, second.images_per_step, second.num_held_out) == ("stage2", 2, 4)
    assert second.figures == {
        k: v for k, v in metrics(run)[-1].items() if k not in {"step", "kind"}
    }
    card = (run / "model" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert str(ingredients) not in card
    assert "| stage2 | caption decoder; encoder, but for its vision tower | 6 | 4 | 2 |" in card

    photo = ingredients / "held_out" / "6.png"
    assert vlv("caption", photo, "--model", run / "model", "--max-new-tokens", 3).code == 0
    drawn = vlv("reconstruct", photo, "--model", run / "model", "--steps", 1, "-o", tmp_path / "r")
    assert drawn.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rejection", "dpo", "rloo"])
def test_stage3_needs_images_alone(
    vlv: Vlv, ingredients: Path, tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    for number in range(3):
        write_image(tmp_path / "bare" / f"{number}.png", number)
    config = write_config(
        tmp_path / "3.yaml",
        ingredients,
        "stage3",
        model={"encoder": str(tiny_folder), "caption_decoder": str(tiny_folder), "llm": None},
        data={"inputs": [str(tmp_path / "bare")]},
        stage3={"method": method, "candidates": 2, "max_caption_tokens": 5, "score_timesteps": 1},
    )
    run = tmp_path / "run"
    args = ("train", config, "--run-dir", run, "--set", "loop.steps=2")
    assert vlv(*args).code == 0
    figures = metrics(run)[-1]
    assert {"held_out_reward", "held_out_loss", "held_out_tokens"} <= figures.keys()
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"reward", "best_reward", "clear_share", "distinct_share", "tokens"} <= logged.keys()
    assert (
        "can:     embed, caption, reconstruct, generate, search" in vlv("info", run / "model").out
    )
    assert past_trainings(run / "model")[-1].stage == "stage3"
    planned = vlv(*args[:-1], "loop.steps=3", "--dry-run")
    assert planned.code == 0


@pytest.mark.slow
def test_both_stages_with_a_discrete_bottleneck(
    vlv: Vlv, ingredients: Path, tmp_path: Path
) -> None:
    bottleneck = {"bottleneck": "gumbel", "gumbel_temperature": [1.0, 0.5]}
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", model=bottleneck)
    run = tmp_path / "stage1"
    assert vlv("train", config, "--run-dir", run).code == 0
    model = {"encoder": str(run / "model")}
    keep = {"denoising_weight": 1.0}
    config = write_config(tmp_path / "2.yaml", ingredients, "stage2", model=model, stage2=keep)
    assert vlv("train", config, "--run-dir", tmp_path / "stage2").code == 0
    before, after = weights(run / "model"), weights(tmp_path / "stage2" / "model")
    assert torch.equal(before["bottleneck.codebook"], after["bottleneck.codebook"])
    assert not torch.equal(before["queries"], after["queries"])

    pipe = VLVPipeline.from_pretrained(tmp_path / "stage2" / "model")
    assert pipe.encoder.bottleneck.settings.temperature == (1.0, 0.5)
    z = pipe.embed(ingredients / "held_out" / "6.png")
    rows = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(z, rows[pipe.encoder.token_ids(z)])
    assert pipe.read_tokens(z=z) == pipe.read_tokens(ingredients / "held_out" / "6.png")


@pytest.mark.slow
def test_training_in_half_precision_copies_the_decoder_as_it_was(
    vlv: Vlv, ingredients: Path, tmp_path: Path
) -> None:
    bf16 = {"precision": "bf16"}
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", loop=bf16, data=UNWATCHED)
    assert vlv("train", config, "--run-dir", tmp_path / "run").code == 0
    copy, original = tmp_path / "run/model/unet", ingredients / "decoder" / "unet"
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(original / name), load_file(copy / name)
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_stage2_on_captions_alone_exports_a_whole_model(
    vlv: Vlv, ingredients: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model = {"encoder": str(tiny_folder)}
    config = write_config(tmp_path / "2.yaml", ingredients, "stage2", model=model, data=UNWATCHED)
    export = tmp_path / "exported"
    args = ("train", config, "--run-dir", tmp_path / "run", "--export", export)
    assert vlv(*args, "--set", "stage2.trainable=mlp").code == 0
    assert "can:     embed, caption, reconstruct, generate, search" in vlv("info", export).out
    assert all(torch.equal(v, weights(export)[k]) for k, v in weights(tiny_folder).items()), (
        "frozen"
    )


@pytest.mark.slow
def test_stage2_without_stage1_starts_from_florence(
    vlv: Vlv, ingredients: Path, tmp_path: Path
) -> None:
    fresh = {"florence": str(ingredients / "florence"), "num_queries": NUM_QUERIES}
    data = write_config(tmp_path / "2.yaml", ingredients, "stage2", model=fresh, data=UNWATCHED)
    args = ("train", data)
    frozen, trained = tmp_path / "frozen", tmp_path / "trained"
    assert vlv(*args, "--run-dir", frozen, "--set", "stage2.trainable=mlp+llm").code == 0
    assert vlv(*args, "--run-dir", trained).code == 0
    start, end = weights(frozen / "model"), weights(trained / "model")
    florence = load_file(ingredients / "florence" / "model.safetensors")
    words = "model.language_model.shared.weight"
    assert torch.equal(start[f"backbone.{words}"], florence[words])
    for name in ("queries", "projector.0.weight", f"backbone.{words}"):
        assert not torch.equal(start[name], end[name]), name


@pytest.mark.slow
def test_interrupted_equals_uninterrupted(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", data=UNWATCHED)
    args = ("train", config, "--seed", 5)
    assert vlv(*args, "--run-dir", tmp_path / "whole").code == 0
    stopped = vlv(*args, "--run-dir", tmp_path / "parts", "--max-minutes", 0)
    assert stopped.code == 130
    assert "the time limit was reached at step 1 of 4" in stopped.err
    assert "the same command goes on from there" in stopped.err
    assert not (tmp_path / "parts" / "model").exists()
    assert vlv(*args, "--run-dir", tmp_path / "parts").code == 0
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "parts" / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_finished_models_learn_on(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", data=UNWATCHED)
    assert vlv("train", config, "--run-dir", first).code == 0
    on = ["model.florence=null", "model.num_queries=null", f"model.encoder={first / 'model'}"]
    sets = [part for change in [*on, "optim.lr=1e-30"] for part in ("--set", change)]
    assert vlv("train", config, "--run-dir", second, *sets).code == 0
    a, b = weights(first / "model"), weights(second / "model")
    assert all(torch.equal(a[name], b[name]) for name in a)  # nothing but where it began

    config = write_config(
        tmp_path / "2.yaml",
        ingredients,
        "stage2",
        model={"encoder": str(first / "model")},
        data=UNWATCHED,
    )
    assert vlv("train", config, "--run-dir", third).code == 0
    on = ["model.llm=null", f"model.caption_decoder={third / 'model'}", "optim.lr=1e-30"]
    sets = [part for change in on for part in ("--set", change)]
    fourth = tmp_path / "fourth"
    assert vlv("train", config, "--run-dir", fourth, *sets).code == 0
    a, b = (weights(run / "model", "caption_decoder") for run in (third, fourth))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_caption_decoder_of_another_width(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(ingredients / "llm")
    tokenizer = AutoTokenizer.from_pretrained(ingredients / "llm")
    wide = CaptionDecoder.from_llm(llm, tokenizer, text_width=99, seed=0)
    wide.save_pretrained(tmp_path / "caption_decoder")
    model = {"decoder": str(ingredients / "decoder"), "florence": str(ingredients / "florence")}
    model |= {"llm": None, "caption_decoder": str(tmp_path / "caption_decoder")}
    config = write_config(tmp_path / "2.yaml", ingredients, "stage2", model=model)
    result = vlv("train", config, "--run-dir", tmp_path / "run")
    assert result.code == 1
    assert "was trained for a text tower of width 99" in result.err


@pytest.mark.slow
def test_warm_start_from_the_own_captions(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "1.yaml", ingredients, "stage1", data=UNWATCHED, stage1={"warm_start_steps": 2}
    )
    run = tmp_path / "run"
    result = vlv("train", config, "--run-dir", run)
    assert result.code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "warm_start" in lines[0]
    assert len((run / "own_captions.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.lrate=1", "did you mean optim.lr"),
        ("loop.steps=many", "loop.steps is 'many'"),
        ("model.florence=null", "model.florence, model.backbone and model.encoder are all missing"),
        ("model.florence=nowhere", 'there is no model "nowhere"'),
        ("data.inputs=[nowhere]", "there is no such file or folder"),
        ("nonsense", "is no setting"),
    ],
)
def test_wrong_settings(
    vlv: Vlv, ingredients: Path, tmp_path: Path, change: str, message: str
) -> None:
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1")
    args = ("train", config, "--run-dir", tmp_path / "run", "--set", change)
    result = vlv(*args)
    assert result.code == 1
    assert message in result.err


@pytest.mark.slow
def test_run_of_another_configuration(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1", data=UNWATCHED)
    args = ("train", config, "--run-dir", tmp_path / "run")
    vlv(*args, "--max-minutes", 0)
    result = vlv(*args, "--set", "optim.lr=2e-3")
    assert result.code == 1
    assert "optim.lr" in result.err


def test_unknown_preset(vlv: Vlv, tmp_path: Path) -> None:
    result = vlv("train", "paper-stage11", "--run-dir", tmp_path / "run")
    assert (result.code, "did you mean paper-stage1" in result.err) == (1, True)


def test_missing_captions_are_named(
    vlv: Vlv, ingredients: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    for number in range(4):
        write_image(tmp_path / "bare" / f"{number}.png", number)
    config = write_config(
        tmp_path / "2.yaml",
        ingredients,
        "stage2",
        model={"encoder": str(tiny_folder)},
        data={"inputs": [str(tmp_path / "bare")]},
    )
    result = vlv("train", config, "--run-dir", tmp_path / "run")
    assert result.code == 1
    assert "records cannot be read" in result.err
    assert "the record 3.png has no caption" in result.err


def wide_images(folder: Path) -> Path:
    """Images whose middle square is not what is left after resizing the short side and cutting."""
    draws = np.random.default_rng(0)
    folder.mkdir()
    for number in range(4):
        levels = draws.integers(0, 256, (45, 71, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("framing", ["cut", "resize"])
def test_training_frames_images_as_its_encoder_has_seen_them(
    vlv: Vlv, ingredients: Path, tmp_path: Path, framing: Framing, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.make_pipeline()
    pipe.register_to_config(framing=framing)
    pipe.save_pretrained(tmp_path / "before")
    images = wide_images(tmp_path / "wide")
    config = write_config(
        tmp_path / "2.yaml",
        ingredients,
        "stage2",
        model={"encoder": str(tmp_path / "before")},
        data={
            "inputs": [str(images)],
            "held_out": [str(images)],
            "latents": str(tmp_path / "latents"),
        },
        stage2={"denoising_weight": 1.0},
    )
    seen: list[torch.Tensor] = []
    embed = VLVEncoder.image_features

    def recorded(encoder: VLVEncoder, pixels: torch.Tensor) -> torch.Tensor:
        seen.extend(as_float(pixels))
        return embed(encoder, pixels)

    monkeypatch.setattr(VLVEncoder, "image_features", recorded)
    args = ("train", config)
    run = tmp_path / "run"
    assert vlv(*args, "--run-dir", run, "--export", tmp_path / "after").code == 0
    expected = [
        to_tensor(frame(Image.open(path), IMAGE_SIZE, framing)).float() / 255
        for path in images.glob("*.png")
    ]
    assert seen
    assert all(any(torch.equal(image, one) for one in expected) for image in seen)
    assert VLVPipeline.from_pretrained(tmp_path / "after", parts=["embed"]).framing == framing
    assert json.loads((tmp_path / "latents" / "manifest.json").read_text())["framing"] == framing

    other = "resize" if framing == "cut" else "cut"
    result = vlv(*args, "--run-dir", tmp_path / "other", "--set", f"data.framing={other}")
    assert result.code == 1
    assert f'data.framing is "{other}", but the encoder in' in result.err


@pytest.mark.slow
def test_a_fresh_encoder_may_be_trained_with_the_authors_framing(
    vlv: Vlv, ingredients: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path / "1.yaml", ingredients, "stage1", data={"framing": "resize"} | UNWATCHED
    )
    assert vlv("train", config, "--run-dir", tmp_path / "run").code == 0
    assert VLVPipeline.from_pretrained(tmp_path / "run/model", parts=["embed"]).framing == "resize"


@pytest.mark.slow
def test_profile_prints_where_the_time_goes(ingredients: Path, tmp_path: Path, vlv: Vlv) -> None:
    config = write_config(tmp_path / "run.yaml", ingredients, "stage1")
    run = tmp_path / "run"
    code, out, err = vlv("train", config, "--run-dir", run, "--profile", "1")
    assert code == 0
    assert "U-Net backward" in out
    assert "images/s" in out
    assert "profile.json" in err
    assert [file.name for file in run.iterdir()] == ["profile.json"]
    code, _, err = vlv("train", config, "--run-dir", run, "--trace")
    assert code == 1
    assert "--trace has no effect without --profile" in err


@pytest.mark.slow
def test_training_on_a_stream_goes_on_where_it_was(
    vlv: Vlv, ingredients: Path, tmp_path: Path
) -> None:
    """Parquet in the authors' layout, columns by name: three steps and three more are six."""
    records = find_records([ingredients / "train"])
    for number, half in enumerate((records[:3], records[3:])):
        pixels = [to_tensor(frame(r.load(), IMAGE_SIZE, "cut")).numpy().tobytes() for r in half]
        table = pa.table({"pic": pixels, "long": [record.caption for record in half]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    data = {
        "inputs": [str(tmp_path / "{0..1}.parquet")],
        "held_out": [],
        "streaming": True,
        "shuffle_buffer": 2,
        "image_column": "pic",
        "caption_column": "long",
    }
    config = write_config(tmp_path / "2.yaml", ingredients, "stage2", data=data)
    train = ["train", config, "--set", "loop.steps=6", "--run-dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    florence = f"model.florence={ingredients / 'florence'}"
    train[4:4] = ["--set", florence, "--set", f"model.num_queries={NUM_QUERIES}"]
    assert vlv(*train, whole).code == 0
    saves = ["--set", "loop.save_every=1", "--set", "data.num_workers=2"]
    assert vlv(*train, parts, *saves, "--max-minutes", "0").code == 130
    assert vlv(*train, parts, *saves).code == 0
    for part in ("encoder", "caption_decoder"):
        expected = weights(whole / "model", part)
        for name, value in weights(parts / "model", part).items():
            assert torch.equal(value, expected[name]), name
    assert "streamed" in (whole / "model" / "README.md").read_text()


def test_settings_that_a_stream_does_not_allow(vlv: Vlv, ingredients: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "1.yaml", ingredients, "stage1")
    train = ["train", config, "--run-dir", tmp_path / "run", "--set"]
    result = vlv(*train, "data.inputs=[pipe:cat x.tar]", "--set", "stage1.warm_start_steps=2")
    assert result.code == 1
    assert "stage1.warm_start_steps captions every image" in result.err
    result = vlv(*train, "data.streaming=false", "--set", "data.partitions=2")
    assert "data.partitions has no effect while data.streaming is false" in result.err
    result = vlv(*train, "data.streaming=true")
    assert "no shard was given to stream" in result.err


@pytest.mark.slow
def test_the_quick_presets_train_on_the_shipped_parts(
    vlv: Vlv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    vlv("toyworld", "render", "out/quick/train", "--num", 4, "--workers", 1)
    vlv("toyworld", "render", "out/quick/held-out", "--num", 2, "--split", "val", "--workers", 1)
    for stage in ("stage1", "stage2", "stage3"):
        small = ("loop.steps=2", "loop.batch_size=2", "optim.warmup_steps=0")
        short = [word for change in small for word in ("--set", change)]
        assert vlv("train", f"quick-{stage}", "--run-dir", f"out/quick/{stage}", *short).code == 0
    result = vlv("caption", "out/quick/held-out", "--model", "out/quick/stage3/model")
    assert result.code == 0
    assert len(result.out.strip().splitlines()) >= 2
