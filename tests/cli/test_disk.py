"""A disk that refuses, in every command that writes: one sentence, exit code 1, and the same command goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Result, Vlv, write_image
from tests.cli.test_convert import PARTS
from tests.cli.test_train import write_config
from tests.evaluation.support import make_inspector
from tests.models.official_files import STAGE1
from vlv.cli import run
from vlv.toyworld.dataset import Layout, render_shards

COMMANDS: dict[str, tuple[str, Callable[..., list[object]]]] = {
    "caption jsonl": ("c.jsonl", lambda photos, out: ["caption", photos, "-o", out]),
    "caption parquet": ("c.parquet", lambda photos, out: ["caption", photos, "-o", out]),
    "caption csv": ("c.csv", lambda photos, out: ["caption", photos, "-o", out]),
    "embed": ("z.safetensors", lambda photos, out: ["embed", photos, "-o", out]),
    "index build": ("index", lambda photos, out: ["index", "build", photos, "-o", out]),
    "reconstruct": ("pictures", lambda photos, out: ["reconstruct", photos / "1.png", "-o", out, "--steps", 1]),
    "generate": ("pictures", lambda photos, out: ["generate", "a cube", "-o", out, "--steps", 1]),
    "mix": ("m.png", lambda photos, out: ["mix", photos / "1.png", photos / "2.png", "-o", out, "--steps", 1]),
    "data caption": ("captions", lambda photos, out: ["data", "caption", photos, "-o", out]),
    "data filter": ("clean", lambda photos, out: ["data", "filter", photos, "-o", out, "--workers", 1]),
    "data pack": ("shards", lambda photos, out: ["data", "pack", photos, "-o", out, "--workers", 1]),
    "data split": ("split", lambda photos, out: ["data", "split", photos, "-o", out, "--workers", 1]),
    "data check": ("c.jsonl", lambda photos, out: ["data", "check", photos.parent / "bad", "--report", out, "--workers", 1]),
    "data cache-latents": ("cache", lambda photos, out: ["data", "cache-latents", photos, "--config", photos.parent / "1.yaml", "-o", out]),
    "data stats": ("s.html", lambda photos, out: ["data", "stats", photos, "-o", out, "--workers", 1]),
    "demo": ("d.html", lambda photos, out: ["demo", photos / "1.png", "-o", out, "--steps", 1]),
    "train": ("run", lambda photos, out: ["train", photos.parent / "1.yaml", "--run-dir", out]),
    "toyworld sheet": ("s.png", lambda photos, out: ["toyworld", "sheet", out, "--num", 2]),
    "toyworld render": ("scenes", lambda photos, out: ["toyworld", "render", out, "--num", 2, "--workers", 1]),
    "verify": ("v.jsonl", lambda photos, out: ["verify", photos.parent / "captioned", "--timesteps", 1, "--claims", "none", "-o", out]),
    "data cache-features": ("cache", lambda photos, out: ["data", "cache-features", photos, "--config", photos.parent / "1.yaml", "-o", out]),
    "convert": ("model", lambda _, out: ["convert", "official", STAGE1, out, *PARTS]),
    "toyworld pretrain": ("parts", lambda photos, out: ["toyworld", "pretrain", "inspector", "--data", photos.parent / "made/scenes", "--models", out, "--run-dir", out.parent / "run", "--steps", 1, "--batch-size", 2]),
    "toyworld ship": ("shipped", lambda photos, out: ["toyworld", "ship", out, "--parts", photos.parent / "made", "--runs", photos.parent / "made"]),
    "eval predict": ("run", lambda _, out: ["eval", "predict", "arena", "--run-dir", out, "--from", "true", "--num", 2]),
    "eval judge": ("predicted", lambda photos, out: ["eval", "judge", out, "--judge", f"toy=inspector:{photos.parent / 'made/inspector'}"]),
    "eval score": ("judged", lambda _, out: ["eval", "score", out]),
    "eval report": ("r.html", lambda photos, out: ["eval", "report", photos.parent / "made/scored", "-o", out]),
    "eval results": ("r.md", lambda photos, out: ["eval", "results", photos.parent / "made/scored", "-o", out]),
    "eval toyworld": ("f.json", lambda photos, out: ["eval", "toyworld", "--num", 2, "--sections", "vae", "--inspector", photos.parent / "made/inspector", "--json", out]),
    "eval best-of": ("f.json", lambda _, out: ["eval", "best-of", "--num", 2, "--candidates", 2, "--timesteps", 1, "--json", out, "--evidence", out.parent / "kept"]),
    "eval search": ("f.json", lambda _, out: ["eval", "search", "--num", 2, "--queries", 1, "--no-captions", "--json", out, "--evidence", out.parent / "kept"]),
    "eval doubts": ("f.json", lambda _, out: ["eval", "doubts", "--num", 4, "--json", out, "--evidence", out.parent / "kept"]),
}  # fmt: skip
_MODELS = {
    "caption", "embed", "reconstruct", "generate", "mix", "data caption", "demo", "verify",
    "toyworld ship", "eval toyworld", "index build",
}  # fmt: skip
_IN_PLACE = {"eval judge", "eval score"}
"""They write into the run that they read."""
_SLOWEST = {"eval doubts"}
"""It works and writes as `eval best-of` does."""
VANISHING = ("caption jsonl", "data filter", "train", "eval predict")
_LOAD_FIRST = {"convert", "toyworld ship", "toyworld pretrain"}
"""They are slow to find a place where nothing can be written."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Scenes, an inspector, and a run of an experiment after each of its steps."""
    folder = tmp_path_factory.mktemp("made")
    render_shards(folder / "scenes", Layout("train", 4, seed=0, per_shard=4), workers=1)
    make_inspector().save_pretrained(folder / "inspector")
    run_dir = folder / "predicted"
    predict = (
        "eval",
        "predict",
        "reconstruction",
        "--run-dir",
        run_dir,
        "--from",
        "true",
        "--num",
        2,
    )
    judge = COMMANDS["eval judge"][1](folder.parent / "photos", folder / "judged")
    judge[-1] = f"toy=inspector:{folder / 'inspector'}"
    steps = [
        (*predict, "--generator", f"model:{tiny_folder}", "--steps", 1),
        judge,
        ("eval", "score", folder / "scored"),
    ]
    for name, command in zip(("predicted", "judged", "scored"), steps, strict=True):
        if run_dir.exists():
            shutil.copytree(run_dir, folder / name)
        run_dir = folder / name
        assert run([str(word) for word in command]) == 0
    return folder


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, ingredients: Path, made: Path) -> None:
    """A configuration, captions, a bad file and finished work, which some commands read."""
    (tmp_path / "made").symlink_to(made)
    write_image(tmp_path / "captioned" / "1.png").with_suffix(".txt").write_text("A cube. A cone.")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"x")
    loop = {"steps": 2, "save_every": 1, "sample_every": None, "eval_every": None}
    data = {"held_out": []}
    write_config(tmp_path / "1.yaml", ingredients, "stage1", loop=loop, data=data)


def arguments(name: str, photos: Path, out: Path, model: Path) -> list[object]:
    command = COMMANDS[name][1](photos, out)
    uses_model = name in _MODELS or name.startswith("caption")
    return [*command, *(("--model", model) if uses_model else ())]


def place(name: str, folder: Path, made: Path) -> Path:
    """Where the command writes in a folder; what it goes on with is there."""
    out = folder / COMMANDS[name][0]
    if name in _IN_PLACE:
        shutil.copytree(made / out.name, out)
    return out


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A quota of the system itself: a file that would grow beyond it is not written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Syncs:
    """Stands in for os.fsync: counts, and from a call on does something else instead."""

    def __init__(self, then: Callable[[], None] | None = None, first: int = 0) -> None:
        self.count, self._then, self._first, self._sync = 0, then, first, os.fsync

    def __call__(self, descriptor: int) -> None:
        self.count += 1
        if self._then is not None and self.count > self._first:
            self._then()
        self._sync(descriptor)


def fill() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_one_sentence(result: Result) -> None:
    assert result.code == 1, result
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("vlv: ")
    assert "Errno" not in last


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - _SLOWEST))
def test_a_full_disk_is_one_sentence_and_a_rerun_goes_on(
    vlv: Vlv,
    name: str,
    photos: Path,
    made: Path,
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: Any,
) -> None:
    """Full from the beginning, and from half of the work on."""
    whole, out = (place(name, tmp_path / folder, made) for folder in ("whole", "out"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", syncs := Syncs())
        code = vlv(*arguments(name, photos, whole, tiny_folder)).code
    assert code in (0, 2)  # random weights write few good captions
    assert syncs.count
    command = arguments(name, photos, out, tiny_folder)
    with files_of_at_most(10):
        assert_one_sentence(vlv(*command))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Syncs(fill, syncs.count // 2))
        assert_one_sentence(vlv(*command))
    assert vlv(*command).code in (0, code)  # what failed and is kept as failed is told once
    assert {p.name for p in out.parent.iterdir()} == {p.name for p in whole.parent.iterdir()}
    if name.startswith(("caption", "mix", "embed")):
        assert out.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _LOAD_FIRST)) for n in COMMANDS]
)
def test_a_place_where_nothing_can_be_written_is_one_sentence(
    vlv: Vlv, name: str, photos: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/vlv"), tmp_path / ("n" * 300)):
        out = folder / COMMANDS[name][0]
        assert_one_sentence(vlv(*arguments(name, photos, out, tiny_folder)))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "caption jsonl")) for n in VANISHING]
)
def test_a_folder_that_vanishes_is_one_sentence_and_a_rerun_begins_anew(
    vlv: Vlv,
    name: str,
    photos: Path,
    made: Path,
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: Any,
) -> None:
    whole, out = (place(name, tmp_path / folder, made) for folder in ("whole", "out"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", syncs := Syncs())
        code = vlv(*arguments(name, photos, whole, tiny_folder)).code
    command = arguments(name, photos, out, tiny_folder)
    vanish = lambda: shutil.rmtree(out.parent, ignore_errors=True)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Syncs(vanish, syncs.count // 2))
        assert_one_sentence(vlv(*command))
    assert place(name, out.parent, made) == out
    assert vlv(*command).code == code
    assert {p.name for p in out.parent.iterdir()} == {p.name for p in whole.parent.iterdir()}


@pytest.mark.slow
def test_text_files_beside_images_keep_what_was_written(
    vlv: Vlv, photos: Path, tiny_folder: Path
) -> None:
    command = ["caption", photos, "--sidecar", ".txt", "--model", tiny_folder]
    with files_of_at_most(3):
        assert_one_sentence(vlv(*command))
    assert not list(photos.rglob("*.txt"))
    assert not list(photos.rglob(".*"))
    assert vlv(*command).code == 0
    assert len(list(photos.rglob("*.txt"))) == 5


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "vlv", "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("vlv: the output cannot be")
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
