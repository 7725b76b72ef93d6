"""What representations know: probes find what is there and nothing where there is nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlv.cli import run
from vlv.errors import ConfigError, OutputError
from vlv.evaluation.experiments.representation import (
    Change,
    Components,
    Probed,
    RepresentationPlan,
    Representer,
    box_errors,
    changes,
    classify,
    hits,
    labels_of,
    most_frequent,
    num_images,
    places_of,
    recall,
    ridge,
    right_answers,
    study,
)
from vlv.evaluation.results import format_results
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.scene import COLOURED_STYLES, HELD_OUT, Scene, sample_scene

PLAN = RepresentationPlan(num=6, seed=3, batch_size=8, train=20, queries=1)
SCENES = [sample_scene(5, index, "test") for index in range(300)]


def test_a_linear_map_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(n, 5, generator=generator) for n in (200, 30))
    weights = torch.randn(5, 2, generator=generator)
    torch.testing.assert_close(
        ridge(x, x @ weights + 3, other).float(), other @ weights + 3, atol=1e-3, rtol=1e-3
    )


def test_noise_is_not_believed() -> None:
    """The penalty is chosen on scenes that the fit has not seen: 60 useless columns leave the answer near the mean."""
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(80, 60, generator=generator), torch.randn(400, 60, generator=generator)
    y = torch.randn(80, 1, generator=generator)
    assert float(ridge(x, y, other).std()) < 0.5


def test_answers_that_an_image_does_not_show_teach_nothing() -> None:
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0], [9.0]])
    values = np.array([4, 4, 7, 7, -1])
    assert classify(x.repeat(8, 1), np.tile(values, 8), torch.tensor([[0.1], [0.9]])).tolist() == [
        4,
        7,
    ]


def vectors(scenes: list[Scene]) -> torch.Tensor:
    """All labels as one-hot columns, with noise: whoever reads lines can answer everything."""
    columns = [np.eye(9)[labels.values] for labels in labels_of(scenes)]
    boxes = np.nan_to_num(places_of(scenes)).reshape(len(scenes), -1)
    rows = torch.from_numpy(np.concatenate([*columns, boxes], 1)).float()
    return rows + 0.01 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))


def test_a_probe_answers_what_is_there_and_guesses_what_is_not() -> None:
    train, test = SCENES[:240], SCENES[240:]
    asked = labels_of(train), labels_of(test)
    given = Probed(vectors(train), vectors(test))
    known = {group: c.sum(0) for group, c in right_answers(given, *asked).items()}
    guessed = {group: c.sum(0) for group, c in most_frequent(*asked).items()}
    assert known.keys() == guessed.keys()
    for group, (right, num) in known.items():
        assert right / num > 0.97, group
        assert guessed[group][0] / num < 0.75, group
    boxes = places_of(train), places_of(test)
    error, blind = (
        box_errors(x, *boxes).sum(0) for x in (given, Probed(given.train * 0, given.test * 0))
    )
    assert error[0] / error[1] < 0.1 < 0.5 < blind[0] / blind[1]


def test_what_cannot_be_seen_is_not_asked() -> None:
    grey = [scene for scene in SCENES if scene.style not in COLOURED_STYLES]
    names = {(labels.group, labels.name) for labels in labels_of(grey)}
    assert ("scene", "style") in names
    assert not {("scene", "ground"), ("colour", "colour, left")} & names


def test_the_same_vectors_are_found_again() -> None:
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert recall(rows, rows[:7] + 0.01, rows.mean(0)) == [1.0] * 7
    assert sum(recall(rows, -rows[:20], torch.zeros(8))) < 10


def test_components_keep_what_varies() -> None:
    rows = torch.zeros(50, 400)
    rows[:, 7] = torch.arange(50.0)
    found = Components.of(rows)(rows)[:, 0]
    assert abs(float(torch.corrcoef(torch.stack([found, rows[:, 7]]))[0, 1])) > 0.999


def one_hot(scene: Scene) -> torch.Tensor:
    """(1, D): where scenes add up, as their attributes do."""
    (solid,) = scene.solids
    words = [solid.shape, solid.colour, scene.ground, scene.time, solid.column, solid.row]
    generator = torch.Generator()
    return sum(
        (torch.randn(1, 64, generator=generator.manual_seed(hash_of(word))) for word in words),
        torch.zeros(1, 64),
    )


def hash_of(word: str) -> int:
    return int.from_bytes(word.encode(), "big") % 2**31


def test_arithmetic_is_right_where_attributes_add_up_and_chance_elsewhere() -> None:
    queries = list(changes(replace(PLAN, num=200, queries=40)))
    images = [
        scene
        for change in queries
        for scene in (change.scene, change.before, change.after, *change.variants)
    ]
    adding = torch.stack([one_hot(scene) for scene in images])
    assert hits(adding, "mean", queries) == [1.0] * 40
    noise = torch.randn(adding.shape, generator=torch.Generator().manual_seed(0))
    assert sum(hits(noise, "tokens", queries)) < 10


def test_changes_are_possible_ones() -> None:
    for change in changes(replace(PLAN, num=200, queries=40)):
        assert isinstance(change, Change)
        (was,), (now,) = change.scene.solids, change.variants[change.right].solids
        assert (was.shape == now.shape) != (was.colour == now.colour)
        assert change.scene in change.variants
        assert not {(x.solids[0].shape, x.solids[0].colour) for x in change.variants} & set(
            HELD_OUT
        )
        assert change.before.solids[0].colour == was.colour
        assert change.after.solids[0].shape == now.shape


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tiny_pipeline: VLVPipeline, tmp_path: Path) -> None:
    done: list[int] = []
    first = study(Representer(tiny_pipeline, PLAN, tmp_path, done.append))
    assert sum(done) == num_images(PLAN)
    kept = sorted(tmp_path.glob("*.safetensors"))
    kept[0].unlink()
    times = [file.stat().st_mtime_ns for file in kept[1:]]
    assert study(Representer(tiny_pipeline, PLAN, tmp_path, done.append)) == first
    assert [file.stat().st_mtime_ns for file in kept[1:]] == times
    assert "T(own caption), all tokens" in format_results(first)
    with pytest.raises(OutputError, match=r"other settings.*--evidence"):
        Representer(tiny_pipeline, replace(PLAN, seed=4), tmp_path, done.append)


def test_a_silly_number_of_the_plan_is_named() -> None:
    with pytest.raises(ConfigError, match="queries"):
        RepresentationPlan(num=6, queries=7)
    with pytest.raises(ConfigError, match="train"):
        RepresentationPlan(num=600, train=3)


@pytest.mark.slow
def test_the_command_prints_a_table(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    numbers = ["--num", "4", "--train", "20", "--queries", "1", "--batch-size", "32"]
    options = ["--model", str(tiny_folder), "--json", str(file)]
    assert run(["eval", "representation", *numbers, *options]) == 0
    assert "no image" in capsys.readouterr().out
    assert "representation.z.tokens.colour" in file.read_text()
