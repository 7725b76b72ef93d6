"""Indexes: built, added to, killed, damaged, of another model, and searched."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("usearch", reason='search needs the package usearch: pip install "vlv[search]"')

from tests import tiny
from tests.cli.conftest import write_image
from tests.search.support import telling_space
from vlv.data.source import find_records
from vlv.errors import ConfigError, DataError, OutputError
from vlv.models.pipeline import VLVPipeline
from vlv.models.search_space import PlainSpace
from vlv.search.build import IndexJob, ModelName
from vlv.search.engine import load_usearch
from vlv.search.index import Index
from vlv.search.parts import Part, read_parts


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for number in range(7):
        write_image(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlv.search.build.rows_of_part", lambda batch: 2)


@pytest.fixture
def space(photos: Path, tiny_pipeline: VLVPipeline) -> PlainSpace:
    return telling_space(tiny_pipeline, sorted(photos.iterdir()))


@pytest.fixture
def index(photos: Path, tmp_path: Path, tiny_pipeline: VLVPipeline, space: PlainSpace) -> Index:
    return Index.build([photos], tmp_path / "index", tiny_pipeline, space=space)


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_each_image_is_found_by_itself(index: Index, photos: Path) -> None:
    assert len(index) == 7
    for number in range(7):
        first, *others = index.search(image=photos / f"{number}.png")
        assert (first.rank, first.id) == (1, f"{number}.png")
        assert first.score == pytest.approx(1, abs=2e-3)
        assert len(others) == 6
        assert all(other.score < first.score for other in others)
        assert first.file_name == str(photos / f"{number}.png")
        assert len(first.sha256 or "") == 64


def test_an_embedding_finds_what_its_image_finds(index: Index, photos: Path) -> None:
    z = index.pipe.embed(photos / "3.png")
    found = index.search(z=z, k=3)
    assert found == index.search(image=photos / "3.png", k=3)
    assert [hit.id for hit in index.search(z=z.tolist(), k=1)] == ["3.png"]


def test_scores_of_a_text_are_those_of_late_interaction(index: Index, photos: Path) -> None:
    hits = index.search("a red cube")
    z = index.pipe.embed([photos / hit.id for hit in hits])
    tokens = index.space.images(index.pipe.context(z).sequence).tokens
    (query,) = index.text_queries(["a red cube"])
    expected = (tokens @ query.tokens.T).amax(1).mean(1)  # (7,)
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=2e-3)
    assert [hit.rank for hit in hits] == list(range(1, 8))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_few_candidates_come_from_the_first_stage(index: Index) -> None:
    assert len(index.search("a red cube", k=2, candidates=1)) == 2
    assert len(index.search("a red cube", k=500)) == 7


def test_the_graph_finds_what_a_comparison_with_all_finds(
    index: Index, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = index.search(image=photos / "2.png", k=3)
    monkeypatch.setattr("vlv.search.engine.EXACT_BELOW", 0)
    assert index.search(image=photos / "2.png", k=3) == expected


def test_small_pictures_are_kept(index: Index) -> None:
    (hit,) = index.search("a cone", k=1)
    assert index.picture(hit)[:2] == b"\xff\xd8"


@pytest.mark.usefixtures("small_parts")
def test_new_images_are_added_and_old_ones_stay(
    photos: Path, tmp_path: Path, tiny_pipeline: VLVPipeline, space: PlainSpace
) -> None:
    later = [(photos / name, (photos / name).read_bytes()) for name in ("1.png", "6.png")]
    for path, _ in later:
        path.unlink()
    Index.build([photos], tmp_path / "index", tiny_pipeline, space=space)
    before = files(tmp_path / "index" / "parts")
    for path, data in later:
        path.write_bytes(data)
    index = Index.build([photos], tmp_path / "index", tiny_pipeline)
    after = files(tmp_path / "index" / "parts")
    assert len(index) == 7
    assert before.items() < after.items(), "parts are never changed"
    assert index.search(image=photos / "1.png", k=1)[0].id == "1.png"
    whole = files(tmp_path / "index")
    Index.build([photos], tmp_path / "index", tiny_pipeline)
    assert files(tmp_path / "index") == whole, "nothing new, nothing written"


class StoppedError(Exception):
    """The process ends here."""


def stopping(after: int) -> Callable[..., None]:
    """A report that ends the build after some batches."""
    seen: Iterator[int] = iter(range(1, 100))

    def report(batch: object) -> None:
        if next(seen) >= after:
            raise StoppedError

    return report


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_build_goes_on_to_the_same_index(
    photos: Path, tmp_path: Path, tiny_pipeline: VLVPipeline, after: int
) -> None:
    (photos / "0b.png").write_bytes(b"no image")
    name, records = ModelName("vlv-random"), find_records([str(photos)])
    whole = IndexJob(records, name, tmp_path / "whole")
    tally = whole.run(lambda: tiny_pipeline, batch_size=2)
    assert (tally.done, tally.failed) == (7, 1)
    job = IndexJob(records, name, tmp_path / "index")
    with pytest.raises(StoppedError):
        job.run(lambda: tiny_pipeline, batch_size=2, report=stopping(after))
    with pytest.raises(DataError, match=r"is not finished; .* goes on|holds no images yet"):
        Index.open(tmp_path / "index", tiny_pipeline)
    again = IndexJob(records, name, tmp_path / "index")
    assert again.run(lambda: tiny_pipeline, batch_size=2).failed == 1
    assert files(tmp_path / "index") == files(tmp_path / "whole")


@pytest.mark.usefixtures("small_parts")
def test_a_truncated_part_is_embedded_again(
    index: Index, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "index" / "parts" / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"000001.safetensors is damaged .*given again"):
        Index.open(tmp_path / "index", index.pipe)
    mended = Index.build([photos], tmp_path / "index", index.pipe)
    assert "is damaged; its images are embedded again" in capsys.readouterr().err
    assert {hit.id for hit in mended.search("a cone")} == {f"{n}.png" for n in range(7)}


@pytest.mark.parametrize("damage", ["cut", "gone", "noise"])
def test_a_damaged_graph_is_made_anew(
    index: Index, photos: Path, tmp_path: Path, damage: str
) -> None:
    expected = index.search("a cone")
    (path,) = (tmp_path / "index").glob("*.usearch")
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "noise":
        path.write_bytes(bytes(len(data)))
    with pytest.raises(DataError, match="is damaged; vlv index build, given again"):
        Index.open(tmp_path / "index", index.pipe)
    assert Index.build([photos], tmp_path / "index", index.pipe).search("a cone") == expected


def test_an_index_of_another_model_is_refused_by_name(
    index: Index, photos: Path, tmp_path: Path
) -> None:
    other = tiny.make_pipeline()
    assert other.encoder is not None
    with torch.no_grad():
        other.encoder.queries += 1
    with pytest.raises(DataError, match=r"is an index of .*, whose weights are not those of"):
        Index.open(tmp_path / "index", other)
    write_image(photos / "new.png", 9)
    with pytest.raises(DataError, match="is an index of"):
        Index.build([photos], tmp_path / "index", other)
    same = tiny.make_pipeline().to(torch.bfloat16)
    assert len(Index.open(tmp_path / "index", same)) == 7, "rounded weights are the same model"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "give one query"),
        ({"text": "a cube", "z": torch.zeros(8, 32)}, "give one query"),
        ({"text": "  "}, "the query is empty"),
        ({"z": torch.zeros(8, 31)}, "reads up to 16 tokens of width 32"),
        ({"z": torch.zeros(2, 8, 32)}, r"one caption embedding \(Q, D\)"),
        ({"z": torch.full((8, 32), float("nan"))}, "NaN"),
        ({"text": "a cube", "k": 0}, "k is 0"),
        ({"text": "a cube", "k": 10**6}, "k is 1000000"),
        ({"text": "a cube", "candidates": 0}, "candidates is 0"),
    ],
)
def test_bad_queries_are_one_sentence(index: Index, query: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        index.search(**query)


def test_folders_that_are_no_index(
    tmp_path: Path, photos: Path, tiny_pipeline: VLVPipeline
) -> None:
    with pytest.raises(DataError, match="is no index; make one with vlv index build"):
        Index.open(tmp_path / "nothing", tiny_pipeline)
    with pytest.raises(OutputError, match="exists and is no index"):
        Index.build([photos], photos, tiny_pipeline)
    Index.build([photos], tmp_path / "index", tiny_pipeline)
    about = tmp_path / "index" / "index.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="of format 99"):
        Index.open(tmp_path / "index", tiny_pipeline)


def test_another_space_is_another_index(
    index: Index, photos: Path, tmp_path: Path, tiny_pipeline: VLVPipeline, space: PlainSpace
) -> None:
    space = PlainSpace(space.centre, space.matrix[:, :5])
    write_image(photos / "new.png", 9)
    with pytest.raises(OutputError, match="another search space"):
        Index.build([photos], tmp_path / "index", tiny_pipeline, space=space)
    small = Index.build([photos], tmp_path / "small", tiny_pipeline, space=space)
    (part,), _ = read_parts(tmp_path / "small" / "parts")
    assert part.tokens([0, 7]).shape == (2, tiny.NUM_QUERIES, 5)
    assert small.search(image=photos / "new.png", k=1)[0].id == "new.png"
    wide = PlainSpace(torch.zeros(9), torch.eye(9))
    with pytest.raises(DataError, match="contexts of width 9"):
        Index.build([photos], tmp_path / "wide", tiny_pipeline, space=wide)


def test_rows_of_a_part(index: Index, photos: Path, tmp_path: Path) -> None:
    part = Part(tmp_path / "index" / "parts" / "000000.safetensors")
    tokens = part.tokens(range(7))
    assert (tokens.dtype, tokens.shape) == (np.float16, (7, tiny.NUM_QUERIES, index.space.width))
    np.testing.assert_array_equal(part.tokens([2, 3, 6, 0]), tokens[[2, 3, 6, 0]])
    assert part.pooled().shape == (7, index.space.width)
    made = index.pipe.context(index.pipe.embed(photos / "4.png")).sequence
    np.testing.assert_allclose(tokens[4], index.space.images(made).tokens[0], atol=1e-3)


def test_two_builds_at_once_are_refused(
    photos: Path, tmp_path: Path, tiny_pipeline: VLVPipeline
) -> None:
    name, records = ModelName("vlv-random"), find_records([str(photos)])
    jobs = [IndexJob(records, name, tmp_path / "index") for _ in range(2)]

    def second() -> VLVPipeline:
        with pytest.raises(OutputError, match="another process works in"):
            jobs[1].run(lambda: tiny_pipeline)
        return tiny_pipeline

    jobs[0].run(second)
    with pytest.raises(OutputError, match="another process has added to"):
        jobs[1].run(lambda: tiny_pipeline)


def test_the_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(ConfigError, match=r'pip install "vlv\[search\]"'):
        load_usearch()
