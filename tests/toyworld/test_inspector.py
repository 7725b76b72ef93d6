from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toyworld.world import make_scene, make_solid
from vlv.toyworld.components import seeded
from vlv.toyworld.inspector import (
    OBJECT_VALUES,
    SCENE_VALUES,
    Inspector,
    InspectorConfig,
    encode_scenes,
    inspection_loss,
)
from vlv.toyworld.language import true_claims
from vlv.toyworld.objectives import pixels_of
from vlv.toyworld.scene import Scene, sample_scene
from vlv.training.objective import Batch

HIDDEN = -100
VALUES = SCENE_VALUES | OBJECT_VALUES


@pytest.fixture
def inspector() -> Inspector:
    return seeded(lambda: Inspector(InspectorConfig(channels=[16, 16, 32], heads=2)), 0)


def certain(scenes: list[Scene]) -> dict[str, Tensor]:
    """The logits of an inspector that knows the truth; what cannot be seen gets the last value."""
    targets = encode_scenes(scenes)
    logits = {
        fact: 9.0 * torch.nn.functional.one_hot(targets[fact] % len(values), len(values)).float()
        for fact, values in VALUES.items()
    }
    return logits | {"box": targets["box"].nan_to_num()}


def test_target_encoding() -> None:
    scene = make_scene(
        make_solid("cone", "blue", "large", "striped", "right", "back"), time="night", view="high"
    )
    targets = encode_scenes([scene])
    assert {fact: targets[fact].item() for fact in SCENE_VALUES} == {
        "style": 0,
        "ground": 0,
        "time": 2,
        "light": 0,
        "view": 1,
    }
    assert {fact: targets[fact].tolist()[0] for fact in OBJECT_VALUES} == {
        "present": [0, 0, 1],
        "shape": [HIDDEN, HIDDEN, 3],
        "colour": [HIDDEN, HIDDEN, 4],
        "size": [HIDDEN, HIDDEN, 1],
        "material": [HIDDEN, HIDDEN, 2],
        "row": [HIDDEN, HIDDEN, 1],
    }
    x, y, sine, cosine = targets["box"][0, 2].tolist()
    assert (x, y) == pytest.approx((scene.solids[0].x, scene.solids[0].y))
    assert math.isnan(sine), "a cone looks the same from all sides"
    assert math.isnan(cosine)
    assert bool(targets["box"][0, :2].isnan().all())


def test_target_encoding_of_what_cannot_be_seen() -> None:
    targets = encode_scenes([make_scene(style="sketch")])
    assert targets["style"].item() == 2
    assert targets["ground"].item() == targets["time"].item() == HIDDEN
    assert targets["colour"].tolist() == [[HIDDEN] * 3]
    assert targets["shape"].tolist() == [[HIDDEN, 1, HIDDEN]]


def test_yaw_of_a_cube_repeats_every_quarter_turn() -> None:
    box = encode_scenes([make_scene(make_solid("cube"))])["box"][0, 1]
    torch.testing.assert_close(box[2:], torch.tensor([math.sin(1.2), math.cos(1.2)]))


def test_reports_of_certain_logits_are_the_truth(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = [sample_scene(2, index) for index in range(40)]
    logits = certain(scenes)

    def known(numbers: Tensor) -> dict[str, Tensor]:
        return {fact: values[numbers.flatten()] for fact, values in logits.items()}

    monkeypatch.setattr(inspector, "forward", known)
    reports = inspector.inspect(torch.arange(len(scenes)).reshape(-1, 1, 1, 1), batch_size=16)
    assert len(reports) == len(scenes)
    for scene, report in zip(scenes, reports, strict=True):
        assert report.claims == true_claims(scene)
        for solid, (x, y, yaw) in zip(scene.solids, report.boxes, strict=True):
            assert (x, y) == pytest.approx((solid.x, solid.y), abs=1e-5)
            assert 0 <= yaw < math.pi / 2
            assert solid.shape != "cube" or yaw == pytest.approx(solid.yaw, abs=1e-4)


def test_shapes(inspector: Inspector) -> None:
    pixels = torch.rand(2, 3, 64, 64)
    logits = inspector(pixels)
    assert {k: tuple(v.shape) for k, v in logits.items()} == (
        {fact: (2, len(values)) for fact, values in SCENE_VALUES.items()}
        | {fact: (2, 3, len(values)) for fact, values in OBJECT_VALUES.items()}
        | {"box": (2, 3, 4)}
    )
    assert inspector.features(pixels).shape == (2, 4, 32)
    assert inspector.features(torch.rand(1, 3, 96, 96)).shape == (1, 4, 32)


def test_a_batch_is_inspected_as_its_pictures_one_by_one(
    inspector: Inspector, batch: Batch
) -> None:
    pixels = pixels_of(batch)
    together = inspector.inspect(pixels)
    singles = [report for row in pixels for report in inspector.inspect(row[None])]
    assert [r.claims for r in together] == [r.claims for r in singles]


def test_certainty_costs_nothing_and_errors_cost() -> None:
    scenes = [sample_scene(2, index) for index in range(8)]
    targets, logits = encode_scenes(scenes), certain(scenes)
    assert inspection_loss(logits, targets) < 0.02
    for fact in (*VALUES, "box"):
        wrong = logits | {fact: logits[fact].roll(1, -1)}
        assert inspection_loss(wrong, targets) > 0.2, fact


def test_what_cannot_be_seen_costs_nothing() -> None:
    scenes = [make_scene(style="sepia"), make_scene(make_solid("cone"), style="sketch")]
    targets, logits = encode_scenes(scenes), certain(scenes)
    other = logits | {fact: torch.randn_like(logits[fact]) for fact in ("colour", "ground", "time")}
    assert inspection_loss(other, targets) == inspection_loss(logits, targets)


def test_the_loss_of_one_batch_goes_down(inspector: Inspector, batch: Batch) -> None:
    targets, pixels = (
        encode_scenes([Scene.from_dict(meta["scene"]) for meta in batch["meta"]]),
        pixels_of(batch),
    )
    optimizer = torch.optim.AdamW(inspector.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = inspection_loss(inspector(pixels), targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_saving_and_loading(inspector: Inspector, tmp_path: Path) -> None:
    inspector.save_pretrained(tmp_path)
    loaded = Inspector.from_pretrained(tmp_path)
    assert list(loaded.config.channels) == [16, 16, 32]
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in inspector.state_dict().items())
    assert not loaded.training
