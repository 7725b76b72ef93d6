"""The figures of a collection, against captions and images counted by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.curation.files import jpeg, write_folder, write_tar
from vlv.curation.caption_stats import (
    CaptionStats,
    counter_of,
    length_figures,
    repeated_ngrams,
    repeats_sentence,
)
from vlv.curation.engine import LocalEngine
from vlv.curation.stats import Stats, collect, to_json
from vlv.curation.stats_page import make_page
from vlv.data import source as sources
from vlv.errors import ConfigError


def gather(*inputs: Path, workers: int = 1, **options: object) -> Stats:
    options = {"tokenizers": ["words"], "num_samples": 3, **options}
    with LocalEngine(workers) as engine:
        return collect([str(path) for path in inputs], engine, **options)  # type: ignore[arg-type]


@pytest.fixture
def collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven images in chunks of two; a fault; captions of known words."""
    monkeypatch.setattr(sources, "RECORDS", 2)
    folder = write_folder(tmp_path / "in", range(4), (640, 520))
    (folder / "wide.jpg").write_bytes(jpeg(9, (640, 256)))
    (folder / "tall.jpg").write_bytes(jpeg(9, (100, 200)))
    (folder / "twin.txt").write_text("a caption of 1")
    (folder / "twin.jpg").write_bytes(jpeg(8, (64, 64)))
    (folder / "zero.jpg").write_bytes(b"")
    return folder


def test_counts(collection: Path) -> None:
    stats = gather(collection)
    figures = stats.to_dict()
    assert (figures["images"], figures["not_readable"]) == (7, {"unreadable": 1})
    assert stats.exit_code == 2
    assert figures["bytes"] == sum(path.stat().st_size for path in collection.glob("*.jpg"))
    assert figures["share_short_side_above_512"] == 4 / 7
    assert figures["share_aspect_ratio_0.5_to_2"] == 6 / 7
    assert figures["sizes"] == {"64x64": 1, "96x192": 1, "640x256": 1, "640x512": 4}
    assert figures["short_side_median"] == 520
    assert (figures["captions"], figures["images_without_caption"]) == (5, 2)
    assert figures["captions_that_occur_again"] == 1
    assert (figures["vocabulary"], figures["words"], figures["words_seen_once"]) == (7, 20, 3)
    assert list(figures["commonest_words"].items())[:3] == [("a", 5), ("caption", 5), ("of", 5)]
    assert figures["commonest_openings"] == {"a caption of": 5}
    assert figures["lengths"]["words"]["histogram"] == {"4": 5}


def test_workers_and_chunks_change_nothing(
    collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = gather(collection)
    two = gather(collection, workers=2)
    assert (to_json(two), two.samples) == (to_json(one), one.samples)
    monkeypatch.setattr(sources, "RECORDS", 100)
    whole = gather(collection)
    assert to_json(whole) == to_json(one)
    assert whole.samples == one.samples
    assert len(one.samples) == 3
    assert [sample.id for sample in gather(collection, seed=1).samples] != [
        s.id for s in one.samples
    ]


def test_repetition() -> None:
    assert repeats_sentence("A red cube stands here. The sky is blue. A red cube stands here!")
    assert not repeats_sentence("Yes. Yes. The sky is blue.")
    assert repeated_ngrams(["a", "b", "c", "d", "a", "b", "c", "d"]) == (1, 5)
    assert repeated_ngrams(["a", "b"]) == (0, 0)
    stats = CaptionStats()
    stats.add(["one two three four one two three four", "it is it. it is it."], ["words"])
    figures = stats.to_dict()
    assert figures["captions_that_repeat_a_sentence"] == 1
    assert figures["share_of_repeated_4grams"] == 1 / 8


def test_length_figures() -> None:
    lengths = np.random.default_rng(0).integers(100, 330, 999)
    values, counts = np.unique(lengths, return_counts=True)
    stats = CaptionStats()
    stats.add(["word " * int(length) for length in lengths], ["words"])
    figures = length_figures(stats.lengths["words"])
    assert figures["mean"] == pytest.approx(lengths.mean())
    assert figures["median"] == np.median(lengths)
    assert figures["share_170_to_280"] == np.mean((lengths >= 170) & (lengths <= 280))
    assert (figures["min"], figures["max"]) == (values[0], values[-1])
    assert sum(figures["histogram"].values()) == counts.sum()


def test_tokenizers(tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    folder = tiny_folder / "caption_decoder" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "A photo of a red cube."
    assert counter_of(str(folder))([text, ""]) == [len(tokenizer.tokenize(text)), 0]
    with pytest.raises(ConfigError, match="the tokenizer /nowhere cannot be loaded"):
        counter_of("/nowhere")


def test_page(collection: Path) -> None:
    stats = gather(collection)
    (collection / "000.txt").write_text("<script>alert(1)</script>")
    page = make_page(gather(collection, num_samples=8), [str(collection)], "Some <title>")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Some &lt;title&gt;" in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "nothing is fetched"
    assert page.count("data:image/jpeg") == 7
    assert page.count("<svg") == 3
    assert "226.82" in page
    figures = json.loads(to_json(stats))
    assert figures["paper"]["mean"] == 226.82


def test_no_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(1))])
    stats = gather(tmp_path / "a.tar")
    assert "No image has a caption" in make_page(stats, ["a.tar"])
    assert stats.lines()[-1] == "no image has a caption"
