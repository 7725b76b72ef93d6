"""Mixes of embeddings: how they are made, and what is found in them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.evaluation.support import judge
from vlv.cli import run as vlv
from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments import mixes
from vlv.evaluation.experiments.judging import score_experiment
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import DataSet
from vlv.evaluation.experiments.viewing import IMAGE_KEY, image_path
from vlv.toyworld.language import true_claims

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vlv.evaluation.experiments.backends import Backends


def test_mixes_are_made_as_they_are_called() -> None:
    a, b, c = (torch.full((8, 2), float(k)) + torch.arange(8)[:, None] / 10 for k in (1, 2, 3))
    expected = {
        "a8": a,
        "b8": b,
        "a6+b2": torch.cat((a[:6], b[:2])),
        "b2+a6": torch.cat((b[:2], a[:6])),
        "average": (a + b) / 2,
        "a4+b2+c2": torch.cat((a[:4], b[:2], c[:2])),
        "b@2:4": torch.cat((a[:2], b[2:4], a[4:])),
    }
    assert expected.keys() <= set(mixes.mix_names(8))
    for name, z in expected.items():
        torch.testing.assert_close(mixes.mix(name, [a, b, c]), z)
    assert torch.equal(a[2], torch.full((2,), 1.2))  # nothing was changed in place


@pytest.mark.slow
def test_the_dtype_is_that_of_the_drawing(tmp_path: Path, tiny_folder: Path) -> None:
    command = [
        "eval",
        "predict",
        "mixes",
        "--run-dir",
        str(tmp_path / "run"),
        "--model",
        str(tiny_folder),
    ]
    more = ["--num", "3", "--steps", "1", "--guidance", "1", "--device", "cpu", "--dtype"]
    assert vlv([*command, *more, "bfloat16"]) == 0
    assert Run.open(tmp_path / "run").settings["dtype"] == "bfloat16"
    assert vlv([*command, *more, "float32"]) == 1, "a run has one dtype"


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> Run:
    settings = mixes.settings(str(tiny_folder), 2, 2.0)
    return Run.start(tmp_path / "run", mixes.NAME, DataSet("test", 3, 12), settings)


def judged(run: Run, kept: Callable[[int, str], int]) -> dict[str, float]:
    """Figures when the inspector sees in every mix exactly the scene that `kept` says, by its distance."""
    scenes = [s.scene for s in run.data.samples()]
    names = mixes.mix_names(8)
    rows: list[dict[str, Any]] = []
    for name in names:
        for number, sample in enumerate(run.data.samples()):
            seen = true_claims(scenes[(number + kept(number, name)) % len(scenes)])
            rows.append({"id": sample.id, "source": name, "guidance": 2.0, "scene": seen.scene, "objects": list(seen.objects)})  # fmt: skip
    with run.filling("judgements/known", IMAGE_KEY, {}) as table:
        table.append(rows)
    return {f.key: f.estimate.value for f in score_experiment(run, seed=0).figures}


def test_a_mix_that_keeps_the_first(run: Run) -> None:
    found = judged(run, lambda number, name: 0)
    assert found["a6+b2.a.objects"] == found["a6+b2.a.layout"] == found["a6+b2.a.style"] == 1
    assert found["a6+b2.b.style"] == found["a6+b2.b.taken"] == 0
    assert found["a6+b2.b.objects"] < 0.6
    assert found["b@0:2.style"] == found["b@0:2.shape"] == 0


def test_a_mix_that_takes_the_second(run: Run) -> None:
    found = judged(run, lambda number, name: 1)
    assert found["average.b.objects"] == found["average.b.taken"] == found["average.b.style"] == 1
    assert found["b@4:6.style"] == found["b@4:6.colour"] == found["b@4:6.row"] == 1
    table = json.loads((run.folder / "result.json").read_text())["tables"][0]
    assert [row["tokens"] for row in table["rows"]] == ["0:2", "2:4", "4:6", "6:8"]


@pytest.mark.slow
def test_from_nothing_to_figures(
    tmp_path: Path,
    tiny_folder: Path,
    inspector_folder: Path,
    make_backends: Callable[..., Backends],
) -> None:
    folder = tmp_path / "run"
    command = ["eval", "predict", "mixes", "--run-dir", str(folder), "--model", str(tiny_folder), "--num", "3", "--steps", "2"]  # fmt: skip
    assert vlv(command) == 0
    assert vlv(["eval", "judge", str(folder), "--judge", f"toy=inspector:{inspector_folder}"]) == 0
    assert vlv(["eval", "score", str(folder)]) == 0
    run = Run.open(folder)
    assert mixes.predict(run, make_backends()).done == 0
    lost = image_path(run, "average", 2.0, "test-0000001")
    kept = lost.read_bytes()
    lost.unlink()
    assert judge(run, f"second=inspector:{inspector_folder}", make_backends()).failed == 1
    lost.write_bytes(kept)
    assert judge(run, f"second=inspector:{inspector_folder}", make_backends()).done == 1
    backends = make_backends()
    pipe, samples = backends.pipeline(str(tiny_folder)), run.data.samples()
    zs = [pipe.embed(sample.load()) for sample in samples]
    name = mixes.mix_names(8)[2]
    (expected,) = pipe.draw(pipe.context(mixes.mix(name, zs)), seed=[samples[0].seed], steps=2, guidance=2.0)  # fmt: skip
    from PIL import Image, ImageChops

    with Image.open(image_path(run, name, 2.0, samples[0].id)) as found:
        assert max(high for _, high in ImageChops.difference(found.convert("RGB"), expected).getextrema()) <= 1  # fmt: skip


def test_what_cannot_be_mixed(run: Run, make_backends: Callable[..., Backends], tmp_path: Path) -> None:  # fmt: skip
    with pytest.raises(DataError, match="no images yet"):
        judge(run, "inspector:vlv-tiny", make_backends())
    with pytest.raises(ConfigError, match="judges no mixes"):
        judge(run, "pixels", make_backends())
    two = Run.start(tmp_path / "two", mixes.NAME, DataSet("test", 3, 2), run.settings)
    with pytest.raises(ConfigError, match="need three samples, got 2"):
        mixes.predict(two, make_backends())
