"""Captions by the model: what the command line that is shown would write, with a stop that keeps what is finished."""

from __future__ import annotations

import shlex
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Vlv, vlv
from tests.ui.conftest import no_model, write_folder, write_image
from vlv.errors import ConfigError, OutputError
from vlv.models.pipeline import VLVPipeline
from vlv.ui.album import Album
from vlv.ui.captioning import CaptionPlan, Writing, replace_all
from vlv.ui.desk import Desk, StoppedError, Work
from vlv.ui.replace import Replacement
from vlv.ui.view import View
from vlv.ui.workbench import Workbench, attempt

__all__ = ["vlv"]  # a fixture

Make = Callable[..., Workbench]


@pytest.fixture
def view(folder: Path) -> View:
    view = View()
    view.open(Album(folder))
    return view


def finished(work: Work) -> Work:
    assert work.thread is not None
    work.thread.join(300)
    assert not work.is_running
    return work


def texts(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*.txt"))}


@pytest.mark.slow
@pytest.mark.usefixtures("loads_once")
@pytest.mark.parametrize(
    ("scope", "given"),
    [
        ("all shown", {}),
        ("all shown", {"existing": "overwrite", "words": 3, "trigger": "sks", "prefix": "-", "suffix": " #"}),
        ("marked", {"existing": "append", "temperature": 0.7, "seed": 3}),
        ("this image", {"existing": "overwrite", "verify": 2}),
        ("all shown", {"target": "captions.jsonl"}),
    ],
)  # fmt: skip
def test_it_does_what_its_command_line_does(
    view: View,
    folder: Path,
    tiny_folder: Path,
    tiny_pipeline: VLVPipeline,
    make_bench: Make,
    vlv: Vlv,
    scope: str,
    given: dict[str, Any],
) -> None:
    bench = make_bench(lambda: tiny_pipeline, tiny_folder)
    view.mark(1)
    view.mark(3)
    wish = Writing(scope, **{"existing": "skip", "target": ".txt", **given})
    plan = wish.plan(view, bench)
    copy = folder.with_name("before")
    shutil.copytree(folder, copy)
    work = finished(bench.desk.start("captioning", partial(plan.run, bench.desk)))
    assert work.state == "done", work.message
    ours = texts(folder), _rows(folder)
    shutil.rmtree(folder)
    copy.rename(folder)
    words = shlex.split(plan.command)
    assert words[0] == "vlv"
    result = vlv(*words[1:])
    assert result.code == 0, result.err
    assert (texts(folder), _rows(folder)) == ours
    assert ours != (texts(write_folder(folder.with_name("fresh"))), "")


def _rows(folder: Path) -> str:
    table = folder / "captions.jsonl"
    return table.read_text() if table.exists() else ""


def test_many_images_are_named_in_a_list(
    tmp_path: Path, tiny_folder: Path, make_bench: Make, vlv: Vlv
) -> None:
    for number in range(20):
        write_image(tmp_path / "many" / f"it's {number:02d}.png", number)
    view = View()
    view.open(Album(tmp_path / "many"))
    for number in range(15):
        view.mark(number)
    plan = Writing("marked", "skip", ".txt").plan(view, make_bench(no_model, tiny_folder))
    assert plan.inputs[0].startswith("@")
    assert vlv(*shlex.split(plan.command)[1:], "--dry-run").out.count(".png") == 15


def test_a_table_holds_the_whole_folder(view: View, make_bench: Make) -> None:
    bench = make_bench(no_model)
    with pytest.raises(ConfigError, match="the whole folder"):
        Writing("this image", "skip", "captions.jsonl").plan(view, bench)
    with pytest.raises(OutputError, match="suffix of captions"):
        Writing("this image", "skip", ".png").plan(view, bench).job()
    with pytest.raises(ConfigError, match="temperature is -1"):
        Writing("this image", "skip", ".txt", temperature=-1).settings(bench.flags, "float32")


@pytest.mark.slow
def test_a_stop_keeps_what_is_finished(
    view: View, folder: Path, tiny_folder: Path, tiny_pipeline: VLVPipeline, make_bench: Make
) -> None:
    bench = make_bench(lambda: tiny_pipeline, tiny_folder)
    wish = Writing("all shown", "overwrite", ".txt")
    plan = wish.plan(view, bench)
    one = CaptionPlan(plan.inputs, plan.settings, plan.output, plan.flags, batch_size=1)

    def stopped_after_two(work: Work) -> str:
        advance = work.advance

        def counted(count: int = 1, errors: Any = ()) -> None:
            if work.done + count == 2:
                work.stop()
            advance(count, errors)

        work.advance = counted  # type: ignore[method-assign]
        return one.run(bench.desk, work)

    work = finished(bench.desk.start("captioning", stopped_after_two))
    assert (work.state, work.done, work.total) == ("stopped", 2, 5)
    assert "2 results are kept" in work.line
    written = texts(folder)
    assert written["a.txt"] != "A red cube.\n"
    assert written["c.txt"] == "A blue sphere, far away.\n"
    assert "b.txt" in written


def test_a_bad_image_is_named_and_the_others_are_captioned(
    view: View, folder: Path, tiny_folder: Path, tiny_pipeline: VLVPipeline, make_bench: Make
) -> None:
    (folder / "b.png").write_bytes(b"no image")
    bench = make_bench(lambda: tiny_pipeline, tiny_folder)
    plan = Writing("all shown", "skip", ".txt").plan(view, bench)
    work = finished(bench.desk.start("captioning", partial(plan.run, bench.desk)))
    assert (work.state, len(work.failures)) == ("done", 1)
    assert "b.png" in work.failures[0]
    assert "failed 1" in work.line
    assert (folder / "sub/e.txt").exists()


def test_replacing_in_all_captions(view: View, folder: Path) -> None:
    (folder / "c.txt").write_bytes(b"\xff")
    work = Work("replacing", 5)
    line = replace_all(view, view.scope("all shown"), Replacement("red", "green"), work)
    assert line.startswith("2 captions changed, 1 failed: ")
    assert (folder / "a.txt").read_text() == "A green cube.\n"
    assert not (folder / "b.txt").exists()


# --- the desk ------------------------------------------------------------------------------------


def test_one_piece_of_work_at_a_time() -> None:
    desk, go = Desk(no_model), threading.Event()

    def wait(work: Work) -> str:
        go.wait(30)
        work.check()
        return "never"

    work = desk.start("waiting", wait)
    with pytest.raises(ConfigError, match="waiting; wait for it, or stop it first"):
        desk.start("another", lambda work: "")
    desk.stop()
    go.set()
    assert finished(work).state == "stopped"
    assert finished(desk.start("another", lambda work: "all is done")).line == "all is done"


def test_what_goes_wrong_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    def fails(error: Exception, work: Work) -> str:
        raise error

    desk = Desk(no_model)
    work = finished(desk.start("working", partial(fails, ConfigError("the\nsentence"))))
    assert (work.state, work.line) == ("failed", "the sentence")
    work = finished(desk.start("working", partial(fails, ZeroDivisionError("x"))))
    assert "working failed (ZeroDivisionError" in work.line
    assert "Traceback" in caplog.text
    assert (
        attempt(partial(fails, FileNotFoundError(2, "No such file", "x.png"), work))[1] == "error"
    )  # type: ignore[arg-type]


def test_progress_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work("captioning", 100)
    began = time.monotonic()
    work.advance(10, [None, "x.png: bad"])
    monkeypatch.setattr("vlv.ui.desk.time.monotonic", lambda: began + 10)
    assert "10 of 100, about 9" in work.line
    assert work.failures == ["x.png: bad"]
    work.stop()
    with pytest.raises(StoppedError):
        work.advance()


# --- dropped images ------------------------------------------------------------------------------


def test_dropped_files_get_names_of_their_own(tmp_path: Path, make_bench: Make) -> None:
    bench = make_bench(no_model)
    files = []
    for number, name in enumerate(["x.png", "x.PNG", "x.jpg", "..png", "a b'(1).png"]):
        path = tmp_path / "sent" / str(number) / name
        write_image(tmp_path / "sent" / str(number) / "tmp.png", number)
        (tmp_path / "sent" / str(number) / "tmp.png").rename(path)
        files.append(str(path))
    kept = bench.keep_dropped(files)
    assert kept.is_relative_to(bench.folder)
    names = sorted(path.name for path in kept.iterdir())
    assert len({Path(name).stem for name in names}) == 5
    assert "a b_(1).png" in names
    with pytest.raises(ConfigError, match="0 files"):
        bench.keep_dropped([])
