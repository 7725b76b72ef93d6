"""The toy world's measurement: known answers, resuming, what cannot be measured, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partialmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.support import make_inspector
from vlv.cli import run as vlv
from vlv.errors import ConfigError
from vlv.evaluation.experiments import toyworld, toyworld_scores, toyworld_tables
from vlv.evaluation.experiments.judging import score_experiment
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import DataSet
from vlv.evaluation.experiments.sources import CAPTION_KEY
from vlv.evaluation.experiments.toyworld import Models, Plan, evaluate_toyworld
from vlv.evaluation.experiments.toyworld_scores import (
    SECTIONS,
    SUMMARY,
    TARGETS,
    sample_rows,
    score_sections,
)
from vlv.evaluation.experiments.toyworld_tables import Tables
from vlv.evaluation.experiments.viewing import IMAGE_KEY, Features, table_name
from vlv.evaluation.metrics.claims import facts_shown, relations_shown
from vlv.evaluation.metrics.features import stack
from vlv.evaluation.report.page import example_sheet
from vlv.evaluation.results import Results, format_results, format_summary
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.language import parse, true_claims
from vlv.toyworld.writing import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vlv.evaluation.experiments.samples import Sample

Measured = tuple[Results, Run]


def evaluate(pipe: VLVPipeline, folder: Path, *, models: Any = (), **plan: Any) -> Measured:
    settings = {"num": 8, "seed": 3, "batch_size": 4, "steps": 2} | plan
    return evaluate_toyworld(Models(pipe, make_inspector(), *models), Plan(**settings), folder)


@pytest.fixture(scope="module")
def measured(tiny_pipeline: VLVPipeline, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("measured")
    return evaluate(tiny_pipeline, folder, models=(tiny_pipeline,) * 3)


# --- known answers ----------------------------------------------------------------------------------


NUM = 24


@pytest.fixture
def known(tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Figures of sections when captions and images say exactly what is given."""

    def figures(
        section: str,
        *,
        captions: Callable[[list[Sample], int], str] | None = None,
        before: Callable[[list[Sample], int], str] | None = None,
        seen: dict[str, Callable[[list[Sample], int], Sample]] | None = None,
        split: str = "test",
    ) -> dict[str, float]:
        images = sorted((seen or {}).keys() - {"original"})
        told = {n: f for n, f in {"model": captions, "stage2": before}.items() if f is not None}
        settings = {
            "sections": [section], "composition": NUM if split == "composition" else 0, "guidances": [2.0],
            "images": images, "captions": [*told], "sources": {},
        }  # fmt: skip
        run = Run.start(tmp_path / section, toyworld.NAME, DataSet("test", 3, NUM), settings)
        samples = Tables(run, 0).samples[split]
        for source, text_of in told.items():
            rows = [{"id": s.id, "source": source, "caption": text_of(samples, n), "n_tokens": 9, "finish_reason": "stop"} for n, s in enumerate(samples)]  # fmt: skip
            with run.filling(f"captions/{source}", CAPTION_KEY, {}) as table:
                table.append(rows)
        with run.filling("judgements/inspector", IMAGE_KEY, {}) as table:
            for source, scene_of in (seen or {}).items():
                for number, sample in enumerate(samples):
                    scene = scene_of(samples, number).known_scene
                    claims = true_claims(scene)
                    table.append([{"id": sample.id, "source": source, "guidance": 2.0, "scene": claims.scene, "objects": list(claims.objects), "boxes": [[s.x, s.y] for s in scene.solids]}])  # fmt: skip
        for source in images:
            rows = [{"id": s.id, "source": source, "guidance": 2.0, "truncated": False} for s in samples]  # fmt: skip
            with run.filling(table_name(source, 2.0), IMAGE_KEY, {}) as table:
                table.append(rows)
        features = Features(run, "inspector", NUM, 2)
        for source in (seen or {}) if split == "test" else ():
            values = np.arange(2 * NUM, dtype=np.float32).reshape(NUM, 2) + 10 * (source == "true")
            features.write(source, 0.0 if source == "original" else 2.0, range(NUM), values)
        found = score_sections(run, 0)[section]
        return {figure.key: figure.estimate.value for figure in found.figures}

    return figures


def own(samples: list[Sample], number: int) -> Sample:
    return samples[number]


def next_one(samples: list[Sample], number: int) -> Sample:
    return samples[(number + 1) % len(samples)]


def test_true_captions_are_perfect(known: Callable[..., dict[str, float]]) -> None:
    found = known("captions", captions=lambda samples, n: samples[n].references[0])
    assert found["captions.f1"] == found["captions.precision"] == found["captions.recall"] == 1
    assert found["captions.hallucinated"] == 0
    assert found["captions.finished"] == found["captions.distinct"] == 1
    assert found["captions.relations"] == 1


def test_captions_of_other_scenes_are_hallucinations(
    known: Callable[..., dict[str, float]],
) -> None:
    found = known("captions", captions=lambda samples, n: next_one(samples, n).references[0])
    assert found["captions.hallucinated"] > 0.2
    assert found["captions.f1"] < 0.8
    assert found["captions.hallucinated"] == pytest.approx(1 - found["captions.precision"])


def test_silence_and_repetition(known: Callable[..., dict[str, float]]) -> None:
    found = known("captions", captions=lambda samples, n: "")
    assert found["captions.f1"] == found["captions.recall"] == 0
    assert math.isnan(found["captions.hallucinated"])
    assert math.isnan(found["captions.relations"])
    assert found["captions.distinct"] == pytest.approx(1 / NUM)


def test_captions_are_held_against_those_before(known: Callable[..., dict[str, float]]) -> None:
    """Half of the captions were those of other scenes; now a quarter are."""

    def half(samples: list[Sample], number: int) -> str:
        return (next_one if number % 2 else own)(samples, number).references[0]

    def quarter(samples: list[Sample], number: int) -> str:
        return (next_one if number % 4 == 1 else own)(samples, number).references[0]

    found = known("stage2", before=half, captions=quarter)
    assert 0.2 < found["stage2.hallucinated_ratio"] < 0.8
    assert 1 < found["stage2.recall_ratio"] < 1 / found["stage2.recall"]
    assert found["stage2.stated_ratio"] == pytest.approx(1, abs=0.1)
    same = known("stage2", before=half, captions=half)
    assert same["stage2.hallucinated_ratio"] == same["stage2.recall_ratio"] == 1


def test_images_that_show_their_scenes(known: Callable[..., dict[str, float]]) -> None:
    found = known("teacher", seen={"original": own, "true": own})
    assert found["teacher.recall"] == found["teacher.objects"] == found["teacher.relations"] == 1
    assert found["teacher.chance"] < 0.8
    found = known("reconstruction", seen={"original": own, "true": own, "z": next_one})
    assert found["reconstruction.ratio"] == found["reconstruction.recall"] < 0.8


def test_what_captions_do_not_say(known: Callable[..., dict[str, float]]) -> None:
    """z keeps the places and the features, the true caption shows another scene."""
    found = known("unsaid", seen={"original": own, "true": next_one, "z": own})
    assert found["unsaid.x_z"] == found["unsaid.centre_z"] == found["unsaid.features_z"] == 0
    assert found["unsaid.x_true"] > 0
    assert found["unsaid.features_true"] == pytest.approx(math.sqrt(200))
    assert found["unsaid.x"] == found["unsaid.centre"] == found["unsaid.features"] == 0


def test_unseen_pairs(known: Callable[..., dict[str, float]]) -> None:
    found = known(
        "composition",
        split="composition",
        captions=lambda samples, n: samples[n].references[0],
        seen={"original": own, "true": own, "z": next_one},
    )
    assert found["composition.originals_pairs"] == found["composition.teacher_pairs"] == 1
    assert found["composition.captions_pairs"] == 1
    assert found["composition.reconstruction_pairs"] < 1


# --- the whole --------------------------------------------------------------------------------------


def test_every_section_gives_finite_figures(measured: Measured) -> None:
    results, _ = measured
    assert [section.name for section in results.sections] == list(SECTIONS)
    found = {section.name: section for section in results.sections}
    assert "no FID and no KID of 8 images" in str(found.pop("fid").not_measured)
    for section in found.values():
        assert section.not_measured is None, section
        assert section.figures
    assert TARGETS.keys() | set(SUMMARY) <= results.figures.keys()
    # text does not help an untrained U-Net, and eight scenes state no relation
    open_ones = {"denoising.way", "captions.relations", "teacher.relations", "plain.relations"}
    for key, figure in results.figures.items():
        if key not in open_ones and not key.endswith(("hallucinated", "_pairs")):
            assert math.isfinite(figure.estimate.value), key
    assert results.figures["stage1.ratio"].estimate.value == 1
    assert results.figures["captions.f1"].estimate.n == 8
    assert results.figures["composition.originals"].estimate.n == 2


def test_plain_sentences_are_drawn_and_looked_at(
    measured: Measured, tiny_pipeline: VLVPipeline
) -> None:
    _, run = measured
    samples = run.data.samples()
    texts = [describe(s.known_scene, "plain", np.random.default_rng([s.seed, 4])) for s in samples]
    images = tiny_pipeline.generate(
        texts, steps=2, guidance=2.0, seed=[s.seed for s in samples], batch_size=4
    )
    seen = [report.claims for report in make_inspector().inspect(stack(images))]
    said = [parse(text) for text in texts]
    wanted = np.concatenate([facts_shown(said, seen), relations_shown(said, seen)], 1)
    assert wanted[:, 1].min() > 0
    rows = {row["id"]: row["shown"] for row in run.rows("measured/plain", ("id",))}
    assert [rows[s.id] for s in samples] == wanted.tolist()


def test_the_report_holds_everything(measured: Measured) -> None:
    results, run = measured
    settings = json.loads(json.dumps(results.to_dict(), allow_nan=False))["settings"]
    plan = [settings[key] for key in ("seed", "num", "steps", "guidance")]
    assert plan == [3, 8, 2, 2]
    assert set(settings["models"]["model"]["sha256"]) >= {"encoder", "unet", "vae"}
    assert settings["inspector"]["parameters"] > 0
    assert "torch" in settings["versions"]
    text = format_results(results)
    assert "PSNR inside the objects" in text
    assert "below floor" in text
    assert example_sheet(run).size == (8 * 32 * 2, 5 * 32 * 2)
    rows = sample_rows(run)
    assert len(rows) == 8
    assert {"true_caption", "caption", "scene", "found in image from z"} <= rows[0].keys()


def test_the_summary_is_short_and_names_the_worst(measured: Measured) -> None:
    lines = format_summary(measured[0], SUMMARY).splitlines()
    assert len(lines) <= len(SUMMARY) + 4
    assert sum("unseen pairs" in line for line in lines) == 3
    assert any("relations that captions state" in line for line in lines)
    assert any("no FID and no KID of 8 images" in line for line in lines)
    assert lines[-1].startswith("8 scenes of seed 3, 2 steps, guidance 2; --full prints")


def test_a_run_is_scored_again_from_its_tables(measured: Measured) -> None:
    results, run = measured
    again = {figure.key: figure for figure in score_experiment(run, 3).figures}
    for key, figure in results.figures.items():
        np.testing.assert_equal(asdict(again[key].estimate), asdict(figure.estimate), key)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_figures(
    measured: Measured, tiny_pipeline: VLVPipeline, tmp_path: Path
) -> None:
    plan = {"sections": ("vae", "denoising", "reconstruction")}
    again, _ = evaluate(tiny_pipeline, tmp_path, **plan)
    regrouped, _ = evaluate(tiny_pipeline, tmp_path / "3", **plan, batch_size=3)
    other, _ = evaluate(tiny_pipeline, tmp_path, sections=("vae",), seed=4)
    for key, figure in again.figures.items():
        assert figure == measured[0].figures[key]
        value = figure.estimate.value
        assert regrouped.figures[key].estimate.value == pytest.approx(value, rel=1e-3, nan_ok=True)
    assert other.figures["vae.psnr"] != again.figures["vae.psnr"]


@pytest.mark.slow
def test_the_number_of_threads_changes_no_figure(
    tiny_pipeline: VLVPipeline, tmp_path: Path
) -> None:
    """Batches are drawn side by side, each on one thread."""
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            sections = ("teacher", "denoising")
            folder = tmp_path / str(number)
            results, _ = evaluate(tiny_pipeline, folder, num=4, sections=sections, batch_size=2)
            found.append(results.to_dict()["sections"])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_interrupted_evaluation_goes_on(
    tiny_pipeline: VLVPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"num": 6, "sections": ("teacher", "denoising"), "batch_size": 2}
    whole, _ = evaluate(tiny_pipeline, tmp_path / "whole", **plan)
    sample, drawn = DiffusionDecoder.sample, []

    def failing(decoder: DiffusionDecoder, c: Any, *, fail_at: int, **settings: Any) -> Any:
        drawn.append(len(c))
        if len(drawn) == fail_at:
            raise KeyboardInterrupt
        return sample(decoder, c, **settings)

    monkeypatch.setattr(DiffusionDecoder, "sample", partialmethod(failing, fail_at=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_pipeline, tmp_path / "run", **plan)
    kept = len(list((tmp_path / "run").rglob("*.png")))
    assert 0 < kept <= 4
    drawn.clear()
    monkeypatch.setattr(DiffusionDecoder, "sample", partialmethod(failing, fail_at=-1))
    again, _ = evaluate(tiny_pipeline, tmp_path / "run", **plan)
    assert sum(drawn) == 6 - kept
    assert again.to_dict()["sections"] == whole.to_dict()["sections"]
    drawn.clear()
    evaluate(tiny_pipeline, tmp_path / "run", **plan | {"seed": 4, "sections": ("teacher",)})
    assert sum(drawn) == 6, "the images of another seed are no use"


@pytest.mark.slow
def test_missing_parts_are_named(tiny_pipeline: VLVPipeline, tmp_path: Path) -> None:
    parts = {n: getattr(tiny_pipeline, n) for n in ("encoder", "text_encoder", "caption_decoder")}
    results, _ = evaluate(VLVPipeline(**parts, image_size=32), tmp_path)
    found = {section.name: section for section in results.sections}
    assert found["vae"].not_measured == "the model has no vae"
    assert found["teacher"].not_measured == (
        "the model has no tokenizer and no unet and no vae and no scheduler"
    )
    assert "--stage1 FOLDER" in str(found["stage1"].not_measured)
    assert found["captions"].figures
    assert found["inspector"].figures
    assert {f.key for f in found["composition"].figures} >= {"composition.captions.f1"}
    text = format_summary(results, SUMMARY)
    assert "not measured: vae (the model has no vae)" in text


def test_distances_of_enough_images(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against renders that are independent of the originals; the originals themselves are the floor."""
    _, run = measured
    rng = np.random.default_rng(0)
    monkeypatch.setattr(toyworld_scores, "FEWEST_FOR_KERNEL", 8)
    path = Tables.reference_path(run)
    np.save(path, rng.normal(size=(200, 4 * 16)).astype(np.float32))
    try:
        section = score_sections(run, 3)["fid"]
        assert [f.key for f in section.figures] == [f"fid.kid_{k}" for k in ("original", "z", "caption", "true", "shuffled")]  # fmt: skip
        assert section.notes
        monkeypatch.setattr(toyworld_tables, "Features", FewFeatures)
        np.save(path, rng.normal(size=(200, 4)).astype(np.float32))
        keys = {f.key for f in score_sections(run, 3)["fid"].figures}
        assert {"fid.original", "fid.z", "fid.z_excess", "fid.shuffled"} < keys
        assert "fid.original_excess" not in keys
    finally:
        path.unlink()


class FewFeatures(Features):
    """The first four."""

    def read(self, source: str, guidance: float) -> Any:
        return super().read(source, guidance)[:, :4]


@pytest.mark.slow
def test_references_are_renders_that_nothing_else_looks_at(
    tiny_pipeline: VLVPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toyworld, "FEWEST_FOR_KERNEL", 2)
    monkeypatch.setattr(toyworld, "NUM_REFERENCES", 5)
    shown: list[Sequence[Any]] = []
    plan = {"num": 2, "sections": ("fid",), "steps": 1}
    settings = Plan(**{"seed": 3, "batch_size": 4} | plan)
    _, run = evaluate_toyworld(
        Models(tiny_pipeline, make_inspector()), settings, tmp_path, shown.append
    )
    assert np.load(Tables.reference_path(run)).shape == (5, 4 * 16)
    assert {row["id"] for rows in shown for row in rows} >= {f"test-{n:07d}" for n in range(7)}


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match='"vea" is no section; choose from vae, '):
        Plan(sections=("vea",))
    with pytest.raises(ConfigError, match="num is 1"):
        Plan(num=1)


# --- the command ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_inspector().save_pretrained(tmp_path / "inspector")
    command = ["eval", "toyworld", "--model", str(tiny_folder), "--num", "4", "--seed", "1"]
    command += ["--sections", "vae, inspector", "--inspector", str(tmp_path / "inspector")]
    files = [tmp_path / name for name in ("out.json", "out.jsonl", "out.png")]
    for option, file in zip(("--json", "--records", "--sheet"), files, strict=True):
        command += [option, str(file)]
    assert vlv([*command, "--full"]) == 0
    assert "PSNR, mean over renders" in capsys.readouterr().out
    assert list(json.loads(files[0].read_text())["sections"]) == ["vae", "inspector"]
    assert len(files[1].read_text().splitlines()) == 4
    assert Image.open(files[2]).size[0] == 4 * 32 * 2
    assert not (tmp_path / "out.json.parts").exists()
    assert vlv(command) == 0
    assert "--full prints the other" in capsys.readouterr().out


def test_command_without_an_inspector(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vlv(["eval", "toyworld", "--model", str(tiny_folder)]) == 1
    assert "name the folder of one" in capsys.readouterr().err
