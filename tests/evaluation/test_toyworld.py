from __future__ import annotations

import copy
import json
import math
from functools import partialmethod
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from tests.evaluation.support import experiment, make_inspector
from vlv.cli import run
from vlv.errors import ConfigError
from vlv.evaluation.results import Results, format_results
from vlv.evaluation.scenes import World, make_world
from vlv.evaluation.sections import SECTIONS, TARGETS, captions, fid, regeneration, teacher
from vlv.evaluation.toyworld import evaluate_toyworld, example_sheet
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.pipeline import VLVPipeline

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.evaluation.results import Figure


@pytest.fixture(scope="module")
def world() -> World:
    return make_world("test", 3, range(8), 64)


@pytest.fixture(scope="module")
def results(tiny_pipeline: VLVPipeline) -> Results:
    return evaluate(tiny_pipeline, stage1=tiny_pipeline, control=tiny_pipeline)


def evaluate(pipe: VLVPipeline, **settings: Any) -> Results:
    arguments = {"num": 8, "seed": 3, "batch_size": 4, "steps": 2} | settings
    return evaluate_toyworld(pipe, make_inspector(), **arguments)


def by_key(figures: list[Figure]) -> dict[str, float]:
    return {figure.key: figure.estimate.value for figure in figures}


def test_the_number_of_threads_changes_no_figure(tiny_pipeline: VLVPipeline) -> None:
    """Batches are drawn side by side, each on one thread."""
    sections, threads = ["teacher", "denoising"], torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results = evaluate(tiny_pipeline, sections=sections, batch_size=2)
            found.append(results.to_dict()["sections"])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_an_interrupted_evaluation_goes_on(
    tiny_pipeline: VLVPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sections": ["teacher", "denoising"], "batch_size": 2}
    whole = evaluate(tiny_pipeline, **settings)
    draw, drawn = DiffusionDecoder.sample, []

    def sample(decoder: DiffusionDecoder, c: Any, *, fail_at: int, **settings: Any) -> Any:
        drawn.append(len(c))
        if len(drawn) == fail_at:
            raise KeyboardInterrupt
        return draw(decoder, c, **settings)

    monkeypatch.setattr(DiffusionDecoder, "sample", partialmethod(sample, fail_at=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_pipeline, **settings, parts=tmp_path / "parts")
    kept = len(list((tmp_path / "parts").rglob("*.npy")))
    assert kept > 0
    drawn.clear()
    monkeypatch.setattr(DiffusionDecoder, "sample", partialmethod(sample, fail_at=-1))
    again = evaluate(tiny_pipeline, **settings, parts=tmp_path / "parts")
    assert len(drawn) == 4 - kept
    assert again.to_dict()["sections"] == whole.to_dict()["sections"]
    drawn.clear()
    evaluate(tiny_pipeline, **settings | {"seed": 4}, parts=tmp_path / "parts")
    assert len(drawn) == 4, "the batches of another seed are no use"


def test_batches_are_kept_for_the_next_caption_decoder(
    tiny_pipeline: VLVPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"sections": ["teacher"], "batch_size": 2, "parts": tmp_path / "parts"}
    first = evaluate(tiny_pipeline, **settings)
    draw, drawn = DiffusionDecoder.sample, []
    monkeypatch.setattr(
        DiffusionDecoder, "sample", lambda *args, **more: drawn.append(1) or draw(*args, **more)
    )
    names = ("encoder", "text_encoder", "tokenizer", "unet", "vae", "scheduler")
    parts = {name: getattr(tiny_pipeline, name) for name in names}
    again = evaluate(VLVPipeline(**parts), **settings)
    assert not drawn
    assert again.to_dict()["sections"] == first.to_dict()["sections"]
    unet = copy.deepcopy(parts["unet"])
    unet.conv_out.weight.data += 1
    evaluate(VLVPipeline(**parts | {"unet": unet}), **settings)
    assert drawn, "the pictures of another U-Net are no use"


# --- known answers ----------------------------------------------------------------------------------


def test_true_captions_are_perfect(world: World) -> None:
    figures, (facts,) = captions(experiment(world, world.captions, make_inspector()))
    found = by_key(figures)
    assert found["captions.f1"] == found["captions.precision"] == found["captions.recall"] == 1
    assert found["captions.hallucinated"] == 0
    assert found["captions.finished"] == found["captions.distinct"] == 1
    assert all(row[4:] == (1.0, 1.0, 1.0) for row in facts.rows)


def test_captions_of_other_scenes_are_hallucinations(world: World) -> None:
    swapped = [*world.captions[1:], world.captions[0]]
    found = by_key(captions(experiment(world, swapped, make_inspector()))[0])
    assert found["captions.hallucinated"] > 0.2
    assert found["captions.f1"] < 0.8
    assert found["captions.hallucinated"] == pytest.approx(1 - found["captions.precision"])


def test_silence_and_repetition(world: World) -> None:
    found = by_key(captions(experiment(world, [""] * 8, make_inspector()))[0])
    assert found["captions.f1"] == found["captions.recall"] == 0
    assert math.isnan(found["captions.hallucinated"])
    assert found["captions.distinct"] == pytest.approx(1 / 8)


def test_the_true_render_gets_the_inspectors_own_marks(world: World) -> None:
    run = experiment(world, world.captions, make_inspector())
    own = run.study.originals
    assert len({str(claims) for claims in own.claims}) > 1
    drawn = by_key(teacher(run)[0])
    assert drawn["teacher.recall"] == own.counts[..., 2].sum() / own.counts[..., 1].sum()
    again = by_key(regeneration(run)[0])
    assert again["regeneration.ratio"] == 1
    distances = by_key(fid(run)[0])
    assert distances["fid.true"] == distances["fid.z"] == pytest.approx(0, abs=1e-3)
    assert distances["fid.original"] > 1e-2


# --- the whole --------------------------------------------------------------------------------------


def test_every_section_gives_finite_figures(results: Results) -> None:
    assert [section.name for section in results.sections] == list(SECTIONS)
    for section in results.sections:
        assert section.not_measured is None
        assert section.figures
    assert TARGETS.keys() <= results.figures.keys()
    unseen = {"composition.originals_pairs", "composition.teacher_pairs"}
    unseen |= {"composition.reconstruction_pairs", "composition.captions_pairs"}
    unseen |= {"denoising.way"}  # text does not help an untrained U-Net
    for key, figure in results.figures.items():
        if key not in unseen and not key.endswith("hallucinated"):
            assert math.isfinite(figure.estimate.value), key
    assert results.figures["stage1.ratio"].estimate.value == 1
    assert results.figures["captions.f1"].estimate.n == 8
    assert results.figures["composition.originals"].estimate.n == 2


def test_the_report_holds_everything(results: Results) -> None:
    settings = json.loads(json.dumps(results.to_dict(), allow_nan=False))["settings"]
    assert (settings["seed"], settings["num"], settings["steps"], settings["guidance"]) == (
        3,
        8,
        2,
        2,
    )
    assert set(settings["models"]["model"]["sha256"]) >= {"encoder", "unet", "vae"}
    assert settings["inspector"]["parameters"] > 0
    assert "torch" in settings["versions"]
    text = format_results(results)
    assert "PSNR inside the objects" in text
    assert "below floor" in text
    sheet = example_sheet(results)
    assert sheet.size == (8 * 32 * 2, 5 * 32 * 2)
    assert len(results.samples) == 8
    assert {"true_caption", "caption", "scene"} <= results.samples[0].keys()


def test_the_same_seed_gives_the_same_figures(results: Results, tiny_pipeline: VLVPipeline) -> None:
    names = ["vae", "denoising", "reconstruction"]
    again = evaluate(tiny_pipeline, sections=names)
    regrouped = evaluate(tiny_pipeline, sections=names, batch_size=3)
    other = evaluate(tiny_pipeline, sections=names, seed=4)
    for key, figure in again.figures.items():
        assert figure == results.figures[key]
        value = figure.estimate.value
        assert regrouped.figures[key].estimate.value == pytest.approx(value, rel=1e-3)
    assert other.figures["vae.psnr"] != again.figures["vae.psnr"]


def test_missing_parts_are_named(tiny_pipeline: VLVPipeline) -> None:
    parts = {n: getattr(tiny_pipeline, n) for n in ("encoder", "text_encoder", "caption_decoder")}
    pipe = VLVPipeline(**parts, image_size=32)
    found = {section.name: section for section in evaluate(pipe).sections}
    assert found["vae"].not_measured == "the model has no vae"
    assert found["teacher"].not_measured == (
        "the model has no tokenizer and no unet and no vae and no scheduler"
    )
    assert "--stage1 FOLDER" in str(found["stage1"].not_measured)
    assert found["captions"].figures
    assert found["inspector"].figures
    assert {f.key for f in found["composition"].figures} >= {"composition.captions.f1"}


def test_wrong_arguments(tiny_pipeline: VLVPipeline) -> None:
    with pytest.raises(ConfigError, match='"vea" is no section; choose from vae, '):
        evaluate(tiny_pipeline, sections=["vea"])
    with pytest.raises(ConfigError, match="num is 1"):
        evaluate(tiny_pipeline, num=1)


# --- the command ------------------------------------------------------------------------------------


def test_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_inspector().save_pretrained(tmp_path / "inspector")
    command = ["eval", "toyworld", "--model", str(tiny_folder), "--num", "4", "--seed", "1"]
    command += ["--sections", "vae, inspector", "--inspector", str(tmp_path / "inspector")]
    files = [tmp_path / name for name in ("out.json", "out.jsonl", "out.png")]
    for option, file in zip(("--json", "--records", "--sheet"), files, strict=True):
        command += [option, str(file)]
    assert run(command) == 0
    assert "PSNR, mean over renders" in capsys.readouterr().out
    assert list(json.loads(files[0].read_text())["sections"]) == ["vae", "inspector"]
    assert len(files[1].read_text().splitlines()) == 4
    assert Image.open(files[2]).size[0] == 4 * 32 * 2
    assert not (tmp_path / "out.json.parts").exists()


def test_command_without_an_inspector(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "toyworld", "--model", str(tiny_folder)]) == 1
    assert "name the folder of one with --inspector" in capsys.readouterr().err
