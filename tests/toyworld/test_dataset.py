from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlv.data.source import find_records
from vlv.errors import ConfigError, OutputError
from vlv.toyworld import dataset
from vlv.toyworld.dataset import MANIFEST, contact_sheet, render_shards
from vlv.toyworld.language import compare, parse
from vlv.toyworld.render import Rendering, image_box, render
from vlv.toyworld.scene import Scene, sample_scene
from vlv.toyworld.writing import describe

SMALL: dict[str, Any] = {"split": "val", "num": 10, "seed": 3, "per_shard": 4, "workers": 1}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    paths = render_shards(folder, **SMALL)
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
    }


def test_whole_shards_are_kept(rendered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(scene: Scene) -> Rendering:
        raise AssertionError("nothing is left to render")

    monkeypatch.setattr(dataset, "render", forbidden)
    before = contents(rendered)
    render_shards(rendered, **SMALL)
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
            render_shards(tmp_path, **SMALL)
    assert sorted(contents(tmp_path)) == [MANIFEST, "val-00000.tar"]
    (tmp_path / ".val-00001.tar.vlv-tmp").write_bytes(b"left behind by a killed process")
    render_shards(tmp_path, **SMALL)
    assert contents(tmp_path) == contents(rendered)


def test_worker_processes_write_the_same_bytes(rendered: Path, tmp_path: Path) -> None:
    render_shards(tmp_path, **SMALL | {"workers": 2})
    assert contents(tmp_path) == contents(rendered)


def test_a_worker_abandons_its_shard_when_it_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing

    stop, done = multiprocessing.Event(), multiprocessing.Value("q", 0)
    monkeypatch.setattr(dataset, "_worker", {"stop": stop, "done": done})
    layout = dataset.Layout("val", 3, 0)
    dataset._work(tmp_path / "whole", layout, 0)
    assert done.value == 3
    stop.set()
    with pytest.raises(InterruptedError):
        dataset._work(tmp_path / "stopped", layout, 0)
    assert not list((tmp_path / "stopped").iterdir())


def test_a_later_start_goes_on_with_the_numbers(tmp_path: Path) -> None:
    (path,) = render_shards(tmp_path, split="val", num=2, seed=3, start=8, workers=1)
    records = find_records([path])
    assert [record.id for record in records] == ["val-0000008", "val-0000009"]
    assert np.array_equal(np.asarray(records[1].load()), render(sample_scene(3, 9, "val")).image)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "was rendered with seed 3, not 4; name another folder"),
        ({"split": "test"}, "was rendered with split val, not test"),
        ({"num": 11}, "was rendered with num 10, not 11"),
        ({"per_shard": 5}, "was rendered with per_shard 4, not 5"),
        ({"start": 1}, "was rendered with start 0, not 1"),
    ],
)
def test_other_data_are_not_mixed_in(
    rendered: Path, change: dict[str, object], message: str
) -> None:
    before = contents(rendered)
    with pytest.raises(OutputError, match=message):
        render_shards(rendered, **SMALL | change)
    assert contents(rendered) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "all"}, "unknown split 'all'; choose one of"),
        ({"num": 0}, "num must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"per_shard": 0}, "per_shard must be at least 1"),
        ({"start": -2}, "start must be at least 0"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_shards(tmp_path / "out", **SMALL | change)
    assert not (tmp_path / "out").exists()


def test_foreign_shards_are_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "val-00000.tar").touch()
    with pytest.raises(OutputError, match=r"holds shards but no dataset\.json"):
        render_shards(tmp_path, **SMALL)


def test_a_damaged_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(OutputError, match=r"dataset.json is damaged .*; delete the folder"):
        render_shards(tmp_path, **SMALL)


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written: "):
        render_shards(tmp_path / "file", **SMALL)


def test_contact_sheet() -> None:
    scenes = [sample_scene(0, index) for index in range(5)]
    page = contact_sheet(scenes, columns=2, gap=4)
    assert page.size == (2 * 68 + 4, 3 * 68 + 4)
    pixels = np.asarray(page)
    assert np.array_equal(pixels[4:68, 4:68], render(scenes[0]).image)
    assert np.array_equal(pixels[72:136, 72:136], render(scenes[3]).image)
    assert (pixels[140:, 72:] == 255).all()
    one = contact_sheet([Image.new("RGB", (10, 20))], columns=8)
    assert one.size == (18, 28)
    with pytest.raises(ConfigError, match="a sheet of 0 pictures"):
        contact_sheet([])
