"""3-D boxes: of the inspector and of an endpoint, with the noise floor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.endpoint.server import ScriptedServer, always
from tests.evaluation.support import judge
from vlv.evaluation.experiments import reconstruction
from vlv.evaluation.experiments.boxes import measure, toy_box, true_boxes
from vlv.evaluation.experiments.instruments import read_boxes
from vlv.evaluation.experiments.judging import score_experiment
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import DataSet
from vlv.evaluation.experiments.scoring import Scores
from vlv.evaluation.experiments.viewing import image_path
from vlv.toyworld.scene import sample_scene

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vlv.evaluation.experiments.backends import Backends

BOX = {"label": "cube", "center": [0, 0.5, 0], "size": [1, 1, 1], "angle": 0.1}


def test_boxes_of_a_scene_are_its_own() -> None:
    scene = sample_scene(0, 3, "test")
    boxes = true_boxes(scene)
    for box, solid in zip(boxes, scene.solids, strict=True):
        assert box.centre == pytest.approx(solid.centre)
        assert box.scale == pytest.approx(solid.extent)
        assert box.period == 0, "no caption says how it is turned"
    assert toy_box({"shape": "cube", "size": "small"}, (1, 2, 0)).label == "cube"


def test_deviations_are_means_over_pairs() -> None:
    scenes = {str(i): true_boxes(sample_scene(0, i, "test")) for i in range(10)}
    moved = {
        id: [type(b)(b.label, (b.centre[0] + 0.3, *b.centre[1:]), b.scale, b.angle, b.period) for b in boxes]
        for id, boxes in scenes.items()
    }  # fmt: skip
    scores = Scores()
    measure(scores, "x", "x", scenes, moved)
    found = {m.key: m.columns.sum(0) for m in scores.measures}
    assert found["x.centre"][0] / found["x.centre"][1] == pytest.approx(0.1)
    assert found["x.scale"][0] == 0
    assert "x.angle" not in found
    assert found["x.matched"][0] == found["x.matched"][1]


def test_answers_are_read_with_care() -> None:
    assert read_boxes(f"```json\n[{json.dumps(BOX)}]\n```")[0]["center"] == [0, 0.5, 0]
    wrong = [
        "I see a cube.",
        '[{"label": "cube"}]',
        json.dumps([BOX | {"size": [1, 1]}]),
        json.dumps([BOX | {"angle": float("nan")}]),
    ]
    for text in wrong:
        with pytest.raises(ValueError, match="the answer"):
            read_boxes(text)


def test_the_inspector_prints_its_own_error(
    tmp_path: Path,
    tiny_folder: Path,
    inspector_folder: Path,
    make_backends: Callable[..., Backends],
) -> None:
    """Rebuilt as the original it has no deviation; against the truth it has the inspector's."""
    settings = reconstruction.settings([f"z=z:{tiny_folder}"], f"model:{tiny_folder}", 2, [2.0])
    run = Run.start(tmp_path / "run", reconstruction.NAME, DataSet("test", 3, 5), settings)
    reconstruction.predict(run, make_backends())
    for sample in run.data.samples():
        sample.load().save(image_path(run, "z", 2.0, sample.id))
    table = run.folder / "images/z-g2.jsonl"
    table.write_text(table.read_text().replace('"side": 32', '"side": 64'))
    judge(run, f"toy=inspector:{inspector_folder}", make_backends())
    found = {f.key: f.estimate.value for f in score_experiment(run, seed=0).figures}
    assert found["z.g2.toy.centre"] == found["z.g2.toy.scale"] == 0
    assert found["z.g2.toy.matched"] == 1
    assert 0 <= found["original.toy.matched"] < 1


def test_an_endpoint_estimates_boxes(
    tmp_path: Path, tiny_folder: Path, make_backends: Callable[..., Backends]
) -> None:
    settings = reconstruction.settings([f"z=z:{tiny_folder}"], f"model:{tiny_folder}", 2, [2.0])
    run = Run.start(tmp_path / "run", reconstruction.NAME, DataSet("test", 3, 4), settings)
    reconstruction.predict(run, make_backends())
    with ScriptedServer(always(f"say {json.dumps([BOX])}")) as server:
        good = server.script
        server.script = lambda body, times: "say no boxes here" if server.requests == 2 else good(body, times)  # fmt: skip
        spec = f"vlm=boxes:seer@{server.url}"
        assert judge(run, spec, make_backends()).failed == 1
        assert judge(run, spec, make_backends()).done == 1
    found = {f.key: f.estimate.value for f in score_experiment(run, seed=0).figures}
    assert (found["z.g2.vlm.centre"], found["z.g2.vlm.matched"]) == (0, 1)
    assert (
        "original.vlm.centre" in found
    )  # against the truth of the toy world, whose labels are others
