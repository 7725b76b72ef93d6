"""The page of a run: what it shows is what the run folder holds, and it needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.training.support import train
from vlv.data.records import Record
from vlv.errors import ConfigError
from vlv.pages import sheet
from vlv.training import summary
from vlv.training.held_out import choose
from vlv.training.interrupt import Interrupted
from vlv.training.summary import write_summary

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_charts() -> None:
    """Draw them here."""


def plain(colour: str, side: int = 8) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def sample(step: int, folder: Path) -> None:
    images = [plain(colour) for colour in ("red", "blue", "green", "white")]
    sheet(images, columns=2).save(folder / f"{step:07d}.png")
    (folder / f"{step:07d}.txt").write_text(f"a.png: <one> at {step}\nb.png: two: or three\n")


def page(run: Path) -> str:
    return (run / "summary.html").read_text("utf-8")


class Balanced(HTMLParser):
    """Checks that tags are closed in order, and collects what would be fetched."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"path", "use", "rect"}, "a shape of a chart"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_finished_run_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "stage2"
    quarantine = [{"id": f"{n}.jpg", "source": "x", "reason": "is no image"} for n in range(3)]
    run.mkdir()
    (run / "quarantine.jsonl").write_text("".join(f"{json.dumps(bad)}\n" for bad in quarantine))
    common: dict[str, Any] = {"settings": {"stage": "stage2"}, "usd_per_gpu_hour": 2.5}
    evaluate = lambda step: {"held_out_loss": 1 / step, "share_null_to_true": 0.5}  # noqa: E731
    train(run, sample=sample, sample_every=3, evaluate=evaluate, **common)
    text = page(run)

    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert parser.sources, "the samples"
    assert all(source.startswith("data:image/jpeg;base64,") for source in parser.sources)
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert {"loss", "learning rate", "held out: loss", "images per second"} <= set(titles)
    assert text.count("<tr><th>step 3</th>") == 2 + 1, "pictures, and two captions"
    assert "&lt;one&gt; at 9" in text
    assert "two: or three" in text
    assert "at 2.5 USD per GPU hour" in text
    assert "3 bad records were left out" in text
    assert "is no image" in text
    assert f"vlv caption IMAGES --model {run / 'model'}" in text
    assert "weight_decay" in text
    assert "torch" in text


def test_an_interrupted_run_has_one_too(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, max_seconds=0, log_every=1)
    text = page(tmp_path)
    assert "11 % done" in text
    assert "Go on with the same command" in text
    assert "to go" in text
    assert "No samples" in text
    assert "No record was bad" in text


def test_a_page_that_cannot_be_written_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(summary, "write_text", full)
    assert train(tmp_path).finished
    assert "the summary could not be written: [Errno 28] No space" in caplog.text


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no run folder: it has no config\.yaml"):
        write_summary(tmp_path)


# --- samples


def test_the_same_images_whatever_is_added(tmp_path: Path) -> None:
    records = [Record(id=f"{n:02d}.png", source=f"{n:02d}.png") for n in range(12)]
    file = tmp_path / "images.json"
    first = choose(records[2:], file)
    assert [record.id for record in first] == [f"{n:02d}.png" for n in range(2, 10)]
    assert choose(records, file) == first
    assert choose(records[3:], file) == first[1:], "one of them is gone"
