"""The demo page: claims judged in place, everything inside one file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlv.demo.cases import Case, Demo, Sampling, Subject, held_out_subjects, make_mixes, run
from vlv.demo.page import EVALUATION_NAME, make_page, save_page
from vlv.errors import ModelFolderError, OutputError
from vlv.models.calibration import Calibration, Logistic
from vlv.models.decoding import Caption
from vlv.models.doubts import ClaimDoubt, SentenceDoubt, Verdict
from vlv.models.pipeline import VLVPipeline
from vlv.toyworld.claims import find_claims
from vlv.toyworld.scene import sample_scene

QUICK = Sampling(steps=2, max_new_tokens=5)
FIGURES = {
    "sections": {
        "captions": {
            "title": "Captions",
            "figures": {
                "captions.f1": {
                    "label": "F1 <of> claims",
                    "unit": "share",
                    "value": 0.953,
                    "low": 0.95,
                    "high": 0.957,
                    "n": 2000,
                },
                "other": {
                    "label": "b",
                    "unit": "dB",
                    "value": None,
                    "low": None,
                    "high": None,
                    "n": 0,
                },
            },
        },
        "control": {"title": "Control", "not_measured": "no folder was named"},
    }
}


class Reader(HTMLParser):
    """Collects texts, tags and sources; complains about tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def demo(tiny_pipeline: VLVPipeline) -> Demo:
    return run(tiny_pipeline, held_out_subjects(2, 0), QUICK)


def page_of(demo: Demo, folder: Path) -> str:
    return make_page(demo, "a & b", QUICK, notes=["only <toys>"], folder=folder)


def same(a: Image.Image, b: Image.Image) -> bool:
    """Equal up to the rounding of a pixel."""
    return bool(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max() <= 1)


def case(caption: str, *, scene: bool = True, name: str = "picture") -> Case:
    image = Image.new("RGB", (8, 8))
    subject = Subject(name, image, sample_scene(0, 0, "test") if scene else None)
    return Case(subject, image, Caption(caption, 3, finished=True), image, cut=False)


def test_run_shows_everything(demo: Demo, tiny_pipeline: VLVPipeline) -> None:
    assert [c.subject.name for c in demo.cases] == ["test-0000000", "test-0000001"]
    assert [mix.label for mix in demo.mixes] == [
        "6 + 2 tokens",
        "4 + 4 tokens",
        "2 + 6 tokens",
        "average",
    ]
    assert demo.shape == (8, 32)
    first = demo.cases[0]
    assert first.caption.text == tiny_pipeline.caption(first.subject.image, max_new_tokens=5)
    again = tiny_pipeline.reconstruct(first.subject.image, seed=0, steps=2)
    assert same(first.reconstruction, again)
    redrawn = tiny_pipeline.generate(first.caption.text, seed=0, steps=2)
    assert same(first.regenerated, redrawn)


def test_whole_embedding_is_the_end_of_the_mixes(demo: Demo, tiny_pipeline: VLVPipeline) -> None:
    z = tiny_pipeline.embed([c.subject.image for c in demo.cases])
    *_, average = make_mixes(tiny_pipeline, z[0], z[0], QUICK)
    assert same(average.image, demo.cases[0].reconstruction)


def test_one_picture_has_no_mix(tiny_pipeline: VLVPipeline, tmp_path: Path) -> None:
    single = run(tiny_pipeline, held_out_subjects(1, 0), QUICK)
    assert not single.mixes
    assert "Two embeddings" not in page_of(single, tmp_path)


def test_page_is_whole_and_needs_nothing_else(demo: Demo, tmp_path: Path) -> None:
    page = page_of(demo, tmp_path)
    reader = Reader(page)
    assert reader.open == []
    sources = [value for _, name, value in reader.attributes if name in {"src", "href"}]
    assert len(sources) == 3 * len(demo.cases) + len(demo.mixes) + 2
    assert all(value and value.startswith("data:image/png;base64,") for value in sources)
    assert "<script" not in page
    assert not re.search(r"https?:|url\(|@import|\$\w", page)
    assert "prefers-color-scheme: dark" in page
    assert "only <toys>" in reader.texts
    assert "vlv demo: a & b" in reader.texts


def test_page_escapes_what_the_model_says(tmp_path: Path) -> None:
    text = "<b>A photo</b> & a <script>red</script> ball"
    cases = (case(text), case(text, scene=False, name="<i>.png"))
    page = page_of(Demo(cases, (), (8, 32)), tmp_path)
    assert "<b>" not in page
    assert "<i>.png" in "".join(Reader(page).texts)
    assert "".join(Reader(page).texts).count(text) == 2


def test_page_judges_claims(tmp_path: Path) -> None:
    page = page_of(Demo((case("A photo of a red ball."),), (), (8, 32)), tmp_path)
    assert '<span class="right">photo</span>' in page
    assert '<span class="wrong">red</span>' in page
    assert "2 of 11 facts said, 1 wrong" in page
    unknown = page_of(Demo((case("A red ball.", scene=False),), (), (8, 32)), tmp_path)
    assert "<span" not in unknown


def verdict(text: str, word: str, instead: str) -> Verdict:
    start = text.index(word)
    claim = ClaimDoubt(start, start + len(word), word, 0.83, "colour", instead, 0.1)
    return Verdict(text, 0.5, 1, (SentenceDoubt(0, len(text), text, 0.9, (claim,)),), threshold=0.4)


def test_page_underlines_what_the_decoder_doubts(tmp_path: Path) -> None:
    text = "A photo of a red ball."
    known = replace(case(text), verdict=verdict(text, "red", "blue"))
    page = page_of(Demo((known,), (), (8, 32)), tmp_path)
    assert '<span class="right">photo</span>' in page
    assert '<span class="wrong doubtful">red</span>' in page
    assert "2 of 11 facts said, 1 wrong; “red” or rather “blue”: 83 %" in page
    unknown = replace(case(text, scene=False), verdict=verdict(text, "red", "blue"))
    page = page_of(Demo((unknown,), (), (8, 32)), tmp_path)
    assert '<span class="doubtful">red</span>' in page
    assert "frozen decoder has judged" in page
    assert "frozen decoder has judged" not in page_of(Demo((case(text),), (), (8, 32)), tmp_path)


def test_a_calibrated_model_judges_its_captions(
    tiny_pipeline: VLVPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Logistic((1.0,), 0.0)
    both = Logistic((1.0, 0.0), 0.0)
    calibration = Calibration(0.01, 0.5, line, both, both, claims="toyworld")
    monkeypatch.setattr(tiny_pipeline, "calibration", calibration)
    (shown,) = run(tiny_pipeline, held_out_subjects(1, 0), QUICK).cases
    text = shown.caption.text
    expected = tiny_pipeline.verify(shown.subject.image, text, read_claims=find_claims)
    assert shown.verdict == expected


def test_page_says_when_a_caption_is_incomplete(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    broken = Case(Subject("x", image), image, Caption("", 5, finished=False), image, cut=True)
    page = page_of(Demo((broken,), (), (8, 32)), tmp_path)
    assert "(no words)" in page
    assert "stopped at its longest length; the decoder reads only its beginning" in page


def test_figures_of_the_model(demo: Demo, tmp_path: Path) -> None:
    assert "holds no measured figures" in page_of(demo, tmp_path)
    path = tmp_path / EVALUATION_NAME
    path.write_text(json.dumps(FIGURES))
    page = page_of(demo, tmp_path)
    assert (
        "<td>F1 &lt;of&gt; claims</td><td>95.3 %</td><td>95.0 % to 95.7 %</td><td>2000</td>" in page
    )
    assert "<td>b</td><td>-</td><td></td><td>0</td>" in page
    assert "not measured: no folder was named" in page
    for damaged in ("{", "[]", '{"sections": {"a": {}}}'):
        path.write_text(damaged)
        with pytest.raises(ModelFolderError, match=r"evaluation\.json holds no evaluation"):
            page_of(demo, tmp_path)


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_page(tmp_path / "file" / "demo.html", "page")
