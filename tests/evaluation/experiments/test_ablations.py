"""Ablations in miniature: a few steps of every variant, measured, scored, and read by the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests import tiny
from tests.cli.conftest import write_image
from tests.evaluation.support import make_inspector
from vlv.cli import run as vlv
from vlv.evaluation import statistics
from vlv.evaluation.experiments import ablations, trainings
from vlv.evaluation.experiments.trainings import Plan, alternatives, settings_of
from vlv.evaluation.experiments.variants import ABLATIONS
from vlv.evaluation.report.claims import findings
from vlv.evaluation.statistics import estimate, estimate_over_seeds


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts and pictures, and the settings of both stages for them."""
    folder = tmp_path_factory.mktemp("bench")
    parts, home = tiny.make_parts(), folder / "parts"
    make_inspector().half().save_pretrained(home / "inspector")  # as it is shipped
    for name in ("florence", "llm"):
        getattr(parts, name).save_pretrained(home / name)
        getattr(parts, f"{name}_tokenizer").save_pretrained(home / name)
    for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler"):
        getattr(parts, name).save_pretrained(home / name)
    for number in range(4):
        picture = write_image(folder / "pictures" / f"{number}.png", number)
        picture.with_suffix(".txt").write_text(tiny.CAPTIONS[number])
    for stage in ("stage1", "stage2", "stage3"):
        settings: dict[str, Any] = {
            "stage": stage,
            "model": {"decoder": "x"},
            "data": {
                "inputs": [str(folder / "pictures")],
                "image_size": tiny.IMAGE_SIZE,
                "num_workers": 0,
            },
            "optim": {"lr": 1e-3},
            "loop": {"steps": 2, "batch_size": 2, "log_every": 1, "trackers": []},
            stage: {"max_caption_tokens": 20} if stage == "stage3" else {},
        }
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def ablate(bench: Path, name: str, run: Path, *more: str, seeds: int = 1) -> int:
    return vlv(
        [
            *("eval", "ablation", name, "--run-dir", str(run), "--parts", str(bench / "parts")),
            *("--stage1", str(bench / "stage1.yaml"), "--stage2", str(bench / "stage2.yaml")),
            *("--num", "4", "--steps", "1", "--seeds", str(seeds), *more),
        ]
    )


def result_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def configs(home: Path) -> list[dict[str, Any]]:
    """The settings of all training runs in a folder."""
    return [yaml.safe_load(path.read_text()) for path in home.glob("*/config.yaml")]


@pytest.mark.slow
def test_trained_measured_scored_and_never_twice(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert ablate(bench, "control", run, seeds=2) == 0
    result = result_of(run)
    assert (result["experiment"], result["settings"]["seeds"]) == ("ablation-control", 2)
    measures = ("f1", "way")
    names = ("without", "with", "with over without")
    assert set(result["figures"]) == {f"control.{n}.{m}" for n in names for m in measures}
    assert all(figure["n"] == 4 for figure in result["figures"].values())
    assert str(bench) not in json.dumps(result)
    with Image.open(run / "plot.png") as plot:
        assert plot.width > plot.height
    trained = configs(run / "trained")
    assert sorted((c["stage"], c["loop"]["seed"]) for c in trained) == [
        *(("stage1", 0), ("stage1", 1)),
        *(("stage2", 0), ("stage2", 0), ("stage2", 1), ("stage2", 1)),
    ]

    def no_training(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(trainings, "train", no_training)
    assert ablate(bench, "control", run, seeds=2) == 0
    assert result_of(run)["figures"] == result["figures"]
    with pytest.raises(AssertionError, match="trained again"):
        ablate(bench, "control", run, "--set2", "loop.steps=3", seeds=2)
    page = tmp_path / "report.html"
    assert vlv(["eval", "report", str(run), "-o", str(page)]) == 0
    assert "with and without stage 1 (Table 7)" in page.read_text()


@pytest.mark.slow
def test_stage3_goes_on_from_a_finished_model_beside_as_many_steps_on_true_captions(
    bench: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = (
        *("--stage3", str(bench / "stage3.yaml"), "--captions", str(bench / "stage2.yaml")),
        *("--finished", str(tiny_folder), "--set3", "loop.steps=1", "--set3", "optim.lr=0.02"),
    )
    assert ablate(bench, "methods", run, *more) == 0
    trained = {
        config["stage3"]["method"] if "stage3" in config else "captions": config
        for config in configs(run / "trained")
    }
    assert trained.keys() == {"rejection", "dpo", "rloo", "captions"}  # "before" is not trained
    for config in trained.values():
        assert config["model"]["caption_decoder"]["path"] == str(tiny_folder)
        assert (config["loop"]["steps"], config["optim"]["lr"]) == (1, 0.02)
    result = result_of(run)
    variants = ("before", "rejection", "dpo", "rloo", "captions")
    measures = ("f1", "hallucinated", "recall", "tokens")
    assert {f"methods.{v}.{m}" for v in variants for m in measures} < set(result["figures"])
    assert "methods.rloo over before.f1" in result["figures"]
    assert result["settings"]["finished"] == tiny_folder.name


@pytest.mark.slow
def test_a_bad_teacher_comes_first_and_what_stage3_takes_back_is_said(
    bench: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(bench / "pictures", wrong)
    more = (
        *("--stage3", str(bench / "stage3.yaml"), "--captions", str(bench / "stage2.yaml")),
        *("--finished", str(tiny_folder), "--wrong", str(wrong)),
        *("--set2", "loop.steps=2", "--set3", "loop.steps=1"),
    )
    assert ablate(bench, "teacher", tmp_path / "run", *more) == 0
    trained = {
        (c["stage"], c["loop"]["steps"], str(wrong) in c["data"]["inputs"]): c
        for c in configs(tmp_path / "run" / "trained")
    }
    good, bad = ("stage2", 2, False), ("stage2", 2, True)
    stage3, captions = ("stage3", 1, False), ("stage2", 1, False)
    assert trained.keys() == {good, bad, stage3, captions}
    for taught in (good, bad):
        assert trained[taught]["model"]["caption_decoder"]["path"] == str(tiny_folder)
    start = trained[stage3]["model"]["caption_decoder"]["path"]
    assert start == trained[captions]["model"]["caption_decoder"]["path"] != str(tiny_folder)
    assert str(wrong) in (Path(start).parent / "config.yaml").read_text()
    figures = result_of(tmp_path / "run")["figures"]
    assert {
        f"teacher.{x} undoes.{m}" for x in ("stage3", "captions") for m in ("f1", "hallucinated")
    } < set(figures)


def test_a_bad_teacher_has_to_be_named(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(bench, "teacher", tmp_path / "run") == 1
    assert "vlv toyworld render --wrong 0.2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_share_of_a_way_back() -> None:
    plan = Plan(Path("parts"), seeds=1)
    columns = {"good": (9, 10), "bad": (7, 10), "stage3": (8, 10), "captions": (9, 10)}
    tables = {x: np.tile(np.array(pair, np.float64), (1, 50, 1)) for x, pair in columns.items()}
    shares = list(ablations.undone("teacher", "hallucinated", tables, plan))
    assert [figure.estimate.value for figure in shares] == pytest.approx([0.5, 1.0])
    assert list(ablations.undone("methods", "f1", tables, plan)) == []


def test_the_rewards_that_are_compared_are_all_that_ask_no_questions() -> None:
    from vlv.training.rewards import REWARDS

    compared = {variant.name for variant in ABLATIONS["rewards"].variants}
    # the shipped model was taught no questions
    assert compared == {*REWARDS, "before", "captions"} - {"answers"}


@pytest.mark.slow
def test_a_bottleneck_at_its_best_rate_is_compared_with_a_given_model(
    bench: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run, rates = tmp_path / "run", ("--rate", "1", "--rate", "0.5", "--tuning-num", "4")
    assert ablate(bench, "bottleneck", run, "--model", f"continuous={tiny_folder}", *rates) == 0
    result = result_of(run)
    figures = result["figures"]
    assert "bottleneck.continuous over gumbel.claims" in figures
    trained = configs(run / "trained")
    assert {config["model"]["bottleneck"] for config in trained} == {"nearest", "gumbel"}
    assert {name for name, rate in result["tuned"].items() if rate} == {"nearest", "gumbel"}
    tuned = [json.loads(path.read_text())["about"] for path in (run / "tuned").glob("*.json")]
    assert [about["measuring"]["split"] for about in tuned] == ["val"] * 4
    seeds = sorted(config["loop"]["seed"] for config in trained)
    assert seeds == [0] * 2 + [ablations.TUNING_SEED] * 4, "what is reported are other trainings"
    assert result["data"]["split"] == "test"
    rows = result["by_seed"]["bottleneck.nearest.way"]
    assert rows == pytest.approx([figures["bottleneck.nearest.way"]["value"]])
    claims = {claim.command: found for claim, found in findings({"x": result_of(run)})}
    found = claims["vlv eval ablation bottleneck"]
    assert found.verdict == "undecided"
    assert found.evidence.startswith(
        "one training of each variant; continuous minus nearest: true claims"
    )
    assert claims["vlv eval ablation queries"].evidence == "not run yet: vlv eval ablation queries"


@pytest.mark.slow
def test_boxes_by_images_seen_and_trainings_that_are_shared(bench: Path, tmp_path: Path) -> None:
    """Table 6: boxes of pictures against those of the originals, the inspector's own error beside them."""
    trained = tmp_path / "trained"
    more = ("--trained", str(trained), "--set1", "loop.steps=7")
    assert ablate(bench, "data", tmp_path / "data", *more) == 0
    result = result_of(tmp_path / "data")
    boxes = ("centre", "scale")
    assert {f"data.{who}.{m}" for who in ("originals", "8", "40") for m in boxes} < set(
        result["figures"]
    )
    floor = result["figures"]["data.originals.centre"]
    assert (
        floor["label"] == "originals against the truth (noise floor): 3-D boxes: L1 of the centre"
    )
    assert not any("originals over" in key or "over originals" in key for key in result["figures"])
    lengths = [(c["loop"]["steps"], c["optim"]["decay_steps"]) for c in configs(trained)]
    assert sorted(lengths, key=lambda x: x[0]) == [(1, 7), (3, 7), (6, 7), (7, None)]
    images = {"stage1": 14, "stage1, unique": 4}
    assert result["images"]["40"] == images, "four different ones are there"
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("metrics.jsonl")}
    assert ablate(bench, "bottleneck", tmp_path / "bottleneck", *more) == 0
    assert len(before) == 4
    assert len(configs(trained)) == 6, "the continuous bottleneck is what 40 was trained with"
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize(
    ("low", "high", "seeds", "verdict"),
    [
        (-0.3, -0.1, 3, "holds"),
        (0.1, 0.3, 3, "does not hold"),
        (-0.1, 0.1, 3, "undecided"),
        (-0.3, -0.1, 2, "undecided"),
        (0.1, 0.3, 1, "undecided"),
    ],
)
def test_boxes_come_closer_when_their_deviation_falls(
    low: float, high: float, seeds: int, verdict: str
) -> None:
    figure = {"value": (low + high) / 2, "low": low, "high": high, "n": 100, "label": "18 minus 6"}
    figures = {f"data.18 over 6.{m}": figure for m in ("angle", "centre", "scale")}
    result = {"experiment": "ablation-data", "settings": {"seeds": seeds}, "figures": figures}
    found = {claim.source: finding for claim, finding in findings({"data": result})}
    assert found["section 4.4.1, Table 6"].verdict == verdict


def test_every_variant_has_settings_that_belong_together() -> None:
    plan = Plan(parts=Path("parts"))
    for ablation in ABLATIONS.values():
        for variant in ablation.variants:
            if variant.last is not None:
                continue
            for form in alternatives(variant, plan).values():
                configs = {config.stage: config for config in settings_of(form, 1, plan)}
                assert ("stage1" in configs) == (variant.stage1 is not None)
                if "stage1" in configs:
                    assert configs["stage1"].loop.steps == round(1500 * variant.share)
                    assert configs["stage1"].loop.seed == 1
                if "stage2" not in configs:
                    assert variant.stage2 is None
                    continue
                config = configs["stage2"]
                assert (config.loop.steps, config.loop.seed) == (1500, 1)
                assert config.stage2 is not None
                learns = config.stage2.trainable == "mlp+llm+encoder"
                fresh = config.model.encoder is None
                frozen, scale = config.stage2.frozen_encoder_steps, config.optim.lr_scale
                assert (frozen > 0) == (learns and not fresh), "what has learnt is unfrozen last"
                assert set(scale) == ({"encoder"} if learns else set())
                if not variant.choices:
                    assert scale == ({"encoder": 0.6 if fresh else 0.1} if learns else {})


def test_all_but_the_warm_ablation_learn_from_images_alone() -> None:
    plan = Plan(parts=Path("parts"))
    warm = {
        (name, variant.name)
        for name, ablation in ABLATIONS.items()
        for variant in ablation.variants
        if variant.last is None
        for config in settings_of(variant, 0, plan)
        if config.stage1 and config.stage1.warm_start_steps
    }
    assert warm == {("warm", "warm")}


def test_every_rate_is_one_of_the_last_training() -> None:
    plan = Plan(parts=Path("parts"), rates=(0.5, 1.0))
    continuous = ABLATIONS["bottleneck"].variants[0]
    assert list(alternatives(continuous, plan)) == ["rate x 0.5", "rate x 1"]
    rates = [settings_of(x, 0, plan)[-1].optim.lr for x in alternatives(continuous, plan).values()]
    assert rates == [4e-4, 8e-4]
    unfrozen = ABLATIONS["unfreezing"].variants[2]
    forms = alternatives(unfrozen, plan)
    assert len(forms) == 6
    first, second = zip(*(settings_of(form, 0, plan) for form in forms.values()), strict=True)
    assert len({config.model_dump_json() for config in first}) == 1, "stage 1 is shared"
    scales = [(x.optim.lr, x.optim.lr_scale["encoder"]) for x in second]
    assert scales == [(lr, scale) for scale in (0.03, 0.1, 0.3) for lr in (7.5e-4, 1.5e-3)]
    assert list(alternatives(ABLATIONS["methods"].variants[0], plan)) == [""], "it is not trained"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("size", [], '"size" is no ablation; choose from queries, unfreezing'),
        ("data", ["--model", "7=x"], '"7" is no variant of data; choose from 8, 18, 34, 40'),
        ("data", ["--model", "8"], "write --model VARIANT=FOLDER"),
        ("data", ["--model", "8=x", "--model", "8=y"], "2 models were given for 8, but"),
    ],
)
def test_what_does_not_fit_is_refused(
    bench: Path,
    tmp_path: Path,
    name: str,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ablate(bench, name, tmp_path / "run", *more) == 1
    assert message in capsys.readouterr().err


def test_the_interval_knows_of_seeds() -> None:
    rng = np.random.default_rng(0)
    alike = rng.normal(size=(1, 200, 1)).repeat(4, 0)
    differing = alike + np.array([-1.0, 0.0, 0.0, 1.0])[:, None, None]
    same, wide, two = (
        estimate_over_seeds(x, statistics.mean, 0) for x in (alike, differing, differing[::3])
    )
    single = estimate(alike[0], statistics.mean, 0)
    assert same == single, "seeds that agree widen nothing"
    assert wide.value == pytest.approx(single.value)
    by_hand = 3.182 * np.std([-1, 0, 0, 1], ddof=1) / 2
    assert np.hypot(by_hand, single.high - single.value) == pytest.approx(
        wide.high - wide.value, rel=1e-3
    )
    assert two.high - two.low > 4 * (wide.high - wide.low), "two seeds say little"
    assert (same.n, wide.n) == (200, 200)
