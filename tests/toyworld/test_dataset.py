from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlv.data.source import find_records
from vlv.errors import ConfigError, OutputError
from vlv.toyworld import dataset
from vlv.toyworld.bad_teacher import Mistakes, mistaken
from vlv.toyworld.dataset import CAPTION_STREAM, MANIFEST, Layout, render_shards
from vlv.toyworld.language import compare, parse
from vlv.toyworld.render import Rendering, image_box, render
from vlv.toyworld.scene import Scene, sample_scene
from vlv.toyworld.writing import describe

SMALL = Layout("val", 10, seed=3, per_shard=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    paths = render_shards(folder, SMALL, 1)
    assert [path.name for path in paths] == [f"val-0000{k}.tar" for k in range(3)]
    return folder


def test_the_ordinary_data_path_reads_the_shards(rendered: Path) -> None:
    records = find_records([rendered])
    assert [record.id for record in records] == [f"val-{i:07d}" for i in range(10)]
    for index, record in enumerate(records):
        scene = sample_scene(3, index, "val")
        assert np.array_equal(np.asarray(record.load()), render(scene).image)
        assert record.meta is not None
        assert Scene.from_dict(record.meta["scene"]) == scene
        assert record.meta["boxes"] == [list(image_box(scene, solid)) for solid in scene.solids]
        assert record.caption == describe(scene, "detailed", np.random.default_rng([3, index, 7]))
        assert compare(parse(record.caption), scene).f1 == 1


def test_the_folder_says_what_it_holds(rendered: Path) -> None:
    assert json.loads((rendered / MANIFEST).read_text()) == {
        "split": "val",
        "num": 10,
        "seed": 3,
        "per_shard": 4,
        "start": 0,
        "wrong": 0.0,
        "mistakes": "random",
        "instruct": False,
    }


def test_a_folder_that_knows_no_mistakes_is_gone_on_with(rendered: Path, tmp_path: Path) -> None:
    older = {"split": "val", "num": 10, "seed": 3, "per_shard": 4, "start": 0}
    (tmp_path / MANIFEST).write_text(json.dumps(older))
    assert len(render_shards(tmp_path, SMALL, 1)) == 3
    with pytest.raises(OutputError, match="wrong"):
        render_shards(tmp_path, replace(SMALL, wrong=0.2), 1)


@pytest.mark.slow
@pytest.mark.parametrize("mistakes", ["random", "systematic"])
def test_a_bad_teacher_errs_as_often_as_said_and_the_truth_stays(
    tmp_path: Path, mistakes: Mistakes
) -> None:
    layout = Layout("val", 60, seed=3, wrong=0.2, mistakes=mistakes)
    render_shards(tmp_path, layout, 1)
    told: dict[str, set[str]] = {}
    wrong = count = 0
    for index, record in enumerate(find_records([tmp_path])):
        scene = sample_scene(3, index, "val")
        assert record.meta is not None
        assert Scene.from_dict(record.meta["scene"]) == scene
        assert np.array_equal(np.asarray(record.load()), render(scene).image)
        rng = np.random.default_rng([3, index, CAPTION_STREAM])
        seen = mistaken(scene, 0.2, mistakes, rng)
        assert record.caption == describe(seen, "detailed", rng)
        for true, said in zip(scene.solids, seen.solids, strict=True):
            assert (said.x, said.y, said.column, said.row) == (
                true.x,
                true.y,
                true.column,
                true.row,
            )
            for name in ("shape", "colour", "size", "material"):
                value, other = getattr(true, name), getattr(said, name)
                count, wrong = count + 1, wrong + (value != other)
                if value != other:
                    told.setdefault(value, set()).add(other)
    assert 0.15 < wrong / count < 0.25
    most = max(len(others) for others in told.values())
    assert most > 1 if mistakes == "random" else most == 1


def test_whole_shards_are_kept(rendered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(scene: Scene) -> Rendering:
        raise AssertionError("nothing is left to render")

    monkeypatch.setattr(dataset, "render", forbidden)
    before = contents(rendered)
    render_shards(rendered, SMALL, 1)
    assert contents(rendered) == before


def test_an_interruption_leaves_whole_shards_and_the_same_call_goes_on(
    rendered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Scene] = []

    def interrupted(scene: Scene) -> Rendering:
        calls.append(scene)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return render(scene)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "render", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_shards(tmp_path, SMALL, 1)
    assert sorted(contents(tmp_path)) == [MANIFEST, "val-00000.tar"]
    (tmp_path / ".val-00001.tar.vlv-tmp").write_bytes(b"left behind by a killed process")
    render_shards(tmp_path, SMALL, 1)
    assert contents(tmp_path) == contents(rendered)


def test_worker_processes_write_the_same_bytes(rendered: Path, tmp_path: Path) -> None:
    render_shards(tmp_path, SMALL, 2)
    assert contents(tmp_path) == contents(rendered)


def test_a_later_start_goes_on_with_the_numbers(tmp_path: Path) -> None:
    (path,) = render_shards(tmp_path, Layout("val", 2, seed=3, start=8), 1)
    records = find_records([path])
    assert [record.id for record in records] == ["val-0000008", "val-0000009"]
    assert np.array_equal(np.asarray(records[1].load()), render(sample_scene(3, 9, "val")).image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"\(seed was 3, now 4\); name another folder"),
        ({"split": "test"}, "split was val, now test"),
        ({"num": 11}, "num was 10, now 11"),
        ({"per_shard": 5}, "per_shard was 4, now 5"),
        ({"start": 1}, "start was 0, now 1"),
    ],
)
def test_other_data_are_not_mixed_in(rendered: Path, change: dict[str, Any], message: str) -> None:
    before = contents(rendered)
    with pytest.raises(OutputError, match=message):
        render_shards(rendered, replace(SMALL, **change), 1)
    assert contents(rendered) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "all"}, "unknown split 'all'; choose one of"),
        ({"num": 0}, "num must be at least 1, not 0"),
        ({"num": 10**12}, "num must be at most 10000000"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"per_shard": 0}, "per_shard must be at least 1"),
        ({"start": -2}, "start must be at least 0"),
        ({"wrong": 1.5}, "wrong must be a share from 0 to 1, not 1.5"),
        ({"wrong": float("nan")}, "wrong must be a share from 0 to 1, not nan"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_shards(tmp_path / "out", replace(SMALL, **change), 1)
    assert not (tmp_path / "out").exists()


def test_foreign_shards_are_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "val-00000.tar").touch()
    with pytest.raises(OutputError, match=r"holds shards but no dataset\.json"):
        render_shards(tmp_path, SMALL, 1)


def test_a_damaged_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(OutputError, match=r"dataset.json is damaged .*; delete the folder"):
        render_shards(tmp_path, SMALL, 1)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written \("):
        render_shards(tmp_path / "file", SMALL, 1)
