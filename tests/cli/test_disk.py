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
from tests.cli.test_train import write_config
from vlv.storage import Journal

COMMANDS: dict[str, tuple[str, Callable[..., list[object]]]] = {
    "caption jsonl": ("c.jsonl", lambda photos, out: ["caption", photos, "-o", out]),
    "caption parquet": ("c.parquet", lambda photos, out: ["caption", photos, "-o", out]),
    "caption csv": ("c.csv", lambda photos, out: ["caption", photos, "-o", out]),
    "embed": ("z.safetensors", lambda photos, out: ["embed", photos, "-o", out]),
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
    "eval predict": ("run", lambda photos, out: ["eval", "predict", "arena", "--run-dir", out, "--from", "true", "--num", 2]),
}  # fmt: skip
_MODELS = {"caption", "embed", "reconstruct", "generate", "mix", "data caption", "demo", "verify"}


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, ingredients: Path) -> None:
    """A configuration, captions, and a bad file, which some commands read."""
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


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A quota of the system itself: a file that would grow beyond it is not written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_one_sentence(result: Result) -> None:
    assert result.code == 1, result
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("vlv: ")
    assert "Errno" not in last


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_sentence_and_a_rerun_goes_on(
    vlv: Vlv, name: str, photos: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "out" / COMMANDS[name][0]
    command = arguments(name, photos, out, tiny_folder)
    with files_of_at_most(10):
        assert_one_sentence(vlv(*command))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert_one_sentence(vlv(*command))
    result = vlv(*command)
    assert result.code in (0, 2), result.err  # random weights write few good captions
    whole = tmp_path / "whole" / COMMANDS[name][0]
    assert vlv(*arguments(name, photos, whole, tiny_folder)).code == result.code
    assert {p.name for p in out.parent.iterdir()} == {p.name for p in whole.parent.iterdir()}
    if name.startswith(("caption", "mix", "embed")):
        assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_where_nothing_can_be_written_is_one_sentence(
    vlv: Vlv, name: str, photos: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/vlv"), tmp_path / ("n" * 300)):
        out = folder / COMMANDS[name][0]
        assert_one_sentence(vlv(*arguments(name, photos, out, tiny_folder)))


def test_a_folder_that_vanishes_is_one_sentence_and_a_rerun_begins_anew(
    vlv: Vlv, photos: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "c.jsonl"
    command = ["caption", photos, "-o", out, "--model", tiny_folder, "--batch-size", 2]
    append = Journal.append

    def vanish(self: Journal, rows: Any) -> None:
        append(self, rows)
        shutil.rmtree(tmp_path / "out")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", vanish)
        assert_one_sentence(vlv(*command))
    assert vlv(*command).code == 0
    assert len(out.read_text().splitlines()) == 5


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "vlv", "info", "vlv-tiny"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("vlv: the output cannot be")
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
