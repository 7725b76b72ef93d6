"""`vlv caption|embed|verify INPUT --output FOLDER`: any number of workers, the same files."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import Vlv, start, write_image
from tests.curation.files import contents
from vlv.models.pipeline import VLVPipeline

SHARED = ("--per-shard", 2, "--batch-size", 2, "--lease", 2)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


@pytest.mark.slow
def test_captions(vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"none")
    how = (photos, "--model", tiny_folder, "--max-new-tokens", 3)
    assert vlv("caption", *how, "-o", tmp_path / "all.jsonl").code == 2
    shared = ("caption", *how, *SHARED, "-o", tmp_path / "out")
    dry = vlv(*shared, "--dry-run")
    assert "3 shards, 0 done" in dry.err
    assert not (tmp_path / "out" / "job.json").exists()
    result = vlv(*shared)
    assert result.code == 2
    assert "bad.png" in result.err
    assert "all 3 shards are done: 6 images, 1 failed" in result.err
    shards = sorted((tmp_path / "out").glob("*.jsonl"))
    rows = [line for path in shards for line in path.read_text().splitlines()]
    assert rows == (tmp_path / "all.jsonl").read_text().splitlines()
    before = files_of(tmp_path / "out")
    again = vlv(*shared)
    assert (again.code, files_of(tmp_path / "out")) == (2, before)
    assert "3 shards, 3 done" in vlv(*shared, "--dry-run").err


def test_embeddings(
    vlv: Vlv, photos: Path, tiny_folder: Path, tiny_pipeline: VLVPipeline, tmp_path: Path
) -> None:
    for name in ("y.png", "z.png"):  # a shard without a good image
        (photos / name).write_bytes(b"none")
    shared = ("embed", photos, "--model", tiny_folder, *SHARED, "-o", f"{tmp_path / 'out'}/")
    assert vlv(*shared).code == 2
    made = [load_file(path)["z"] for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert [len(z) for z in made] == [2, 2, 1]
    about = json.loads((tmp_path / "out" / "000000.json").read_text())
    assert about["ids"] == ["0.png", "1.png"]
    assert {path.stem for path in (tmp_path / "out").glob("*_stats.json")} == {
        f"{number:06d}_stats" for number in range(4)
    }


@pytest.mark.slow
def test_verdicts(vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for path in sorted(photos.glob("*.png"))[1:]:
        path.with_suffix(".txt").write_text("A red cube.")
    how = (photos, "--model", tiny_folder, "--timesteps", 1, "--claims", "none")
    assert vlv("verify", *how, "--batch-size", 2, "-o", tmp_path / "all.jsonl").code == 2
    assert vlv("verify", *how, *SHARED, "-o", tmp_path / "out").code == 2
    shards = sorted((tmp_path / "out").glob("*.jsonl"))
    rows = [json.loads(line) for path in shards for line in path.read_text().splitlines()]
    expected = (tmp_path / "all.jsonl").read_text().splitlines()
    assert {x["id"]: x["error"] for x in rows} == {
        x["id"]: x["error"] for x in map(json.loads, expected)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "out", "--limit", 3), "--limit does not go with a folder"),
        (("-o", "out", "--on-existing", "overwrite"), "--on-existing does not go"),
        (("-o", "z.safetensors", "--lease", 3), "--lease has no effect without a folder"),
        (("-o", "out", "--device", "cpu", "--devices", "cpu,cpu"), "--device has no effect"),
        (("-o", "out", "--devices", ","), "names no device"),
        (("-o", "out", "--devices", "cpu,tpu"), "tpu"),
    ],
)
def test_options_without_effect(
    vlv: Vlv, photos: Path, tiny_folder: Path, options: tuple[object, ...], message: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = vlv("embed", photos, "--model", tiny_folder, *options)
    assert result.code == 1
    assert message in result.err


@pytest.mark.slow
def test_one_process_for_each_device(
    vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    (photos / "bad.png").write_bytes(b"none")
    how = ("embed", photos, "--model", tiny_folder, *SHARED)
    assert vlv(*how, "-o", tmp_path / "one").code == 2
    result = vlv(*how, "-o", tmp_path / "two", "--devices", "cpu,cpu")
    assert result.code == 2
    assert "done 5, skipped 0, failed 1" in result.err
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.slow
def test_killed_at_random(vlv: Vlv, tiny_folder: Path, tmp_path: Path) -> None:
    for number in range(96):
        write_image(tmp_path / "images" / f"{number:02d}.png", number, (64, 64))
    how = ("embed", tmp_path / "images", "--model", tiny_folder, *SHARED)
    assert vlv(*how, "-o", tmp_path / "alone").code == 0
    whole, draws = tmp_path / "whole", random.Random(0)
    command = (*how, "-o", whole)
    workers = [start(*command) for _ in range(4)]
    for kill in range(6):  # far from the end, however fast this machine is
        while len(list(whole.glob("*_stats.json"))) < 4 * kill:
            assert any(worker.exitcode is None for worker in workers)
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 0.05))
        number = draws.randrange(len(workers))
        workers[number].kill()
        workers[number].join()
        assert workers[number].exitcode == -signal.SIGKILL
        workers[number] = start(*command)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0, signal.Signals(-worker.exitcode) if worker.exitcode else "late"
    assert files_of(whole) == files_of(tmp_path / "alone")
    assert not any((whole / ".leases").iterdir())
