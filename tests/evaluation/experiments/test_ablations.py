"""Ablations in miniature: a few steps of every variant, measured, scored, and read by the report."""

from __future__ import annotations

import json
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
from vlv.evaluation.experiments import ablations
from vlv.evaluation.experiments.ablations import ABLATIONS, Plan
from vlv.evaluation.report.claims import findings
from vlv.evaluation.statistics import estimate, estimate_over_seeds


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts and pictures, and the settings of both stages for them."""
    folder = tmp_path_factory.mktemp("bench")
    parts, home = tiny.make_parts(), folder / "parts"
    make_inspector().save_pretrained(home / "inspector")
    for name in ("florence", "llm"):
        getattr(parts, name).save_pretrained(home / name)
        getattr(parts, f"{name}_tokenizer").save_pretrained(home / name)
    for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler"):
        getattr(parts, name).save_pretrained(home / name)
    for number in range(4):
        picture = write_image(folder / "pictures" / f"{number}.png", number)
        picture.with_suffix(".txt").write_text(tiny.CAPTIONS[number])
    for stage in ("stage1", "stage2"):
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
            stage: {},
        }
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def ablate(bench: Path, name: str, run: Path, *more: str, seeds: int = 1) -> int:
    return vlv(
        [
            *("eval", "ablation", name, "--run", str(run), "--parts", str(bench / "parts")),
            *("--stage1", str(bench / "stage1.yaml"), "--stage2", str(bench / "stage2.yaml")),
            *("--num", "4", "--steps", "1", "--seeds", str(seeds), *more),
        ]
    )


def result_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def test_trained_measured_scored_and_never_twice(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert ablate(bench, "control", run, seeds=2) == 0
    result = result_of(run)
    assert (result["experiment"], result["settings"]["seeds"]) == ("ablation-control", 2)
    measures = ("claims", "way", "f1")
    names = ("without", "with", "with over without")
    assert set(result["figures"]) == {f"control.{n}.{m}" for n in names for m in measures}
    assert all(figure["n"] == 4 for figure in result["figures"].values())
    assert str(bench) not in json.dumps(result)
    with Image.open(run / "plot.png") as plot:
        assert plot.width > plot.height
    configs = {
        path.parent.relative_to(run).as_posix(): yaml.safe_load(path.read_text())
        for path in run.rglob("config.yaml")
    }
    assert {name for name in configs if "model" not in name} == {
        f"seed{s}/{name}"
        for s in (0, 1)
        for name in ("with/stage1", "with/stage2", "without/stage2")
    }
    assert [configs[f"seed{s}/with/stage1"]["loop"]["seed"] for s in (0, 1)] == [0, 1]

    def no_training(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ablations, "train", no_training)
    assert ablate(bench, "control", run, seeds=2) == 0
    assert result_of(run)["figures"] == result["figures"]
    with pytest.raises(AssertionError, match="trained again"):
        ablate(bench, "control", run, "--set2", "loop.steps=3", seeds=2)
    page = tmp_path / "report.html"
    assert vlv(["eval", "report", str(run), "-o", str(page)]) == 0
    assert "with and without stage 1 (Table 7)" in page.read_text()


def test_a_bottleneck_is_compared_with_a_given_model(
    bench: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert ablate(bench, "bottleneck", run, "--model", f"continuous={tiny_folder}") == 0
    figures = result_of(run)["figures"]
    assert "bottleneck.continuous over gumbel.claims" in figures
    assert not (run / "seed0" / "continuous").exists()
    model = run / "seed0" / "nearest" / "stage2" / "model" / "encoder" / "config.json"
    assert json.loads(model.read_text())["bottleneck"]["kind"] == "nearest"
    claims = {claim.command: found for claim, found in findings({"x": {"figures": figures}})}
    assert claims["vlv eval ablation bottleneck"].verdict == "undecided", "of four scenes"
    assert claims["vlv eval ablation queries"].evidence == "not run yet: vlv eval ablation queries"


def test_every_variant_has_settings_that_belong_together() -> None:
    for ablation in ABLATIONS.values():
        for variant in ablation.variants:
            plan = Plan(parts=Path("parts"))
            if variant.stage1 is not None:
                config = ablations._first(variant, 1, plan)
                assert config.loop.steps == round(600 * variant.share)
            config = ablations._second(variant, 1, plan, Path("encoder"))
            assert (config.loop.steps, config.loop.seed) == (400, 1)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("size", [], '"size" is no ablation; choose from queries, unfreezing'),
        ("data", ["--model", "7=x"], '"7" is no variant of data; choose from 6, 18, 40'),
        ("data", ["--model", "6"], "write --model VARIANT=FOLDER"),
        ("data", ["--model", "6=x", "--model", "6=y"], "2 models were given for 6, but"),
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
    same, wide = (estimate_over_seeds(x, statistics.mean, 0) for x in (alike, differing))
    single = estimate(alike[0], statistics.mean, 0)
    assert same.value == pytest.approx(single.value) == pytest.approx(wide.value)
    assert same.high - same.low == pytest.approx(single.high - single.low, rel=0.15)
    assert wide.high - wide.low > 3 * (same.high - same.low)
    assert (same.n, wide.n) == (200, 200)
