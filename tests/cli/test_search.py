"""`vlv index build` and `vlv search`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("usearch", reason='search needs the package usearch: pip install "vlv[search]"')

from tests.cli.conftest import Result, Vlv, write_image
from tests.search.support import telling_space
from vlv.models.pipeline import VLVPipeline

Build = tuple[object, ...]


@pytest.fixture
def build(tiny_folder: Path, tiny_pipeline: VLVPipeline, photos: Path, tmp_path: Path) -> Build:
    space = tmp_path / "telling.safetensors"
    paths = [path for path in photos.rglob("*") if path.is_file()]
    telling_space(tiny_pipeline, paths).save(space)
    model = ("--model", tiny_folder, "--space", space)
    return ("index", "build", photos, *model, "-o", tmp_path / "index")


@pytest.fixture
def index(vlv: Vlv, build: Build, tmp_path: Path) -> Path:
    assert vlv(*build).code == 0
    return tmp_path / "index"


@pytest.mark.slow
def test_build_again_and_add(vlv: Vlv, build: Build, photos: Path) -> None:
    (photos / "bad.png").write_bytes(b"no image")
    first = vlv(*build, "--batch-size", 2)
    assert first.code == 2
    assert "done 5, skipped 0, failed 1" in first.err
    assert "failed: " in first.err
    (photos / "bad.png").unlink()
    assert "done 0, skipped 5, failed 0" in vlv(*build).err
    write_image(photos / "new.png", 7)
    assert "done 1, skipped 5, failed 0" in vlv(*build).err


def test_search_by_text_image_and_embedding(
    vlv: Vlv, index: Path, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    lines = vlv("search", index, "a red cube", "-k", 3).out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["1", "2", "3"]
    assert Path(lines[0].split("\t")[2]).is_file()

    result = vlv("search", index, "--image", photos / "2.png", "-o", "-")
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0].keys() == {"query", "rank", "score", "id", "file_name", "sha256"}
    assert (rows[0]["query"], rows[0]["id"]) == ("2.png", "2.png")

    z = tmp_path / "z.safetensors"
    vlv("embed", photos, "--model", tiny_folder, "-o", z)
    file = tmp_path / "found.jsonl"
    assert vlv("search", index, "--z", z, "-k", 1, "-o", file).code == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 5
    assert all(row["query"] == row["id"] for row in found)


@pytest.mark.slow
def test_embeddings_are_indexed_as_their_images_are(
    vlv: Vlv, build: Build, index: Path, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    z = tmp_path / "z.safetensors"
    vlv("embed", photos, "--model", tiny_folder, "-o", z)
    assert vlv(*build[:2], z, *build[3:-1], tmp_path / "other").code == 0
    results = [vlv("search", folder, "a cone", "-o", "-") for folder in (index, tmp_path / "other")]
    assert len({tuple(ids(result)) for result in results}) == 1
    assert "skipped 5" in vlv(*build[:2], z, *build[3:]).err, "they are there already"


def ids(result: Result) -> list[str]:
    return [json.loads(line)["id"] for line in result.out.splitlines()]


def test_the_contact_sheet(vlv: Vlv, index: Path, tmp_path: Path) -> None:
    page = tmp_path / "found.html"
    assert vlv("search", index, "<b>a cone</b>", "--page", page).code == 0
    text = page.read_text()
    assert text.count("data:image/jpeg") == 5
    assert "&lt;b&gt;a cone" in text
    assert "more/4.jpg" in text


@pytest.mark.slow
def test_near_duplicates(vlv: Vlv, build: Build, index: Path, photos: Path, tmp_path: Path) -> None:
    for copy in ("again.png", "more/again.png"):
        (photos / copy).write_bytes((photos / "2.png").read_bytes())
    vlv(*build)
    file = tmp_path / "same.jsonl"
    result = vlv("index", "duplicates", index, "--at-least", 0.999, "-o", file)
    assert "1 groups of 3 images among 7" in result.err
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["group"], row["id"]) for row in rows} == {
        (1, "2.png"),
        (1, "again.png"),
        (1, "more/again.png"),
    }
    assert len(vlv("index", "duplicates", index, "--at-least", -1).out.splitlines()) == 7
    assert vlv("index", "duplicates", photos).code == 1


@pytest.mark.slow
def test_bad_input_is_one_sentence(
    vlv: Vlv, index: Path, photos: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    z = tmp_path / "z.safetensors"
    vlv("embed", photos / "0.png", "--model", tiny_folder, "-o", z)
    for words, arguments in {
        "the query is empty": ("search", index, " "),
        "give one query": ("search", index),
        "is no index; make one": ("search", photos, "a cone"),
        "must end in .jsonl": ("search", index, "a cone", "-o", "x.csv"),
        "must end in .html": ("search", index, "a cone", "--page", "x.txt"),
        "the query must be embeddings": ("search", index, "--z", photos / "0.png"),
        "the query must be an image": ("search", index, "--image", z),
        "'-k': Input should be greater": ("search", index, "a cone", "-k", 0),
        "no such file": ("search", index, "--image", photos / "none.png"),
        "holds 5 images; name one": ("search", index, "--image", photos),
        "whose weights are not those of vlv-tiny": ("search", index, "a cone", "-m", "vlv-tiny"),
        "is an index of": ("index", "build", photos, "-o", index),
        "is no search space": ("index", "build", photos, "-o", tmp_path / "i", "--space", z),
    }.items():
        result = vlv(*arguments)
        assert result.code == 1, arguments
        assert words in result.err, (arguments, result.err)


def test_none_of_the_inputs_is_an_image(vlv: Vlv, build: Build, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no image")
    result = vlv(*build[:2], tmp_path / "bad", *build[3:])
    assert result.code == 1
    assert "none of the inputs could be embedded" in result.err
    assert "holds no images yet" in vlv("search", tmp_path / "index", "a cone").err
    assert vlv(*build).code == 0, "the same index takes good ones"


def test_without_the_package(vlv: Vlv, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    assert 'pip install "vlv[search]"' in vlv(*build).err


@pytest.mark.slow
def test_a_space_is_fitted_to_images_with_captions(
    vlv: Vlv, tiny_folder: Path, tmp_path: Path
) -> None:
    for number in range(9):
        image = write_image(tmp_path / "told" / f"{number}.png", number)
        if number < 8:
            image.with_suffix(".txt").write_text(f"A cube, number {number}. It is red.")
    space = tmp_path / "space.safetensors"
    fit = ("index", "fit", tmp_path / "told", "--model", tiny_folder, "--width", 4, "--steps", 2)
    assert "fitted to 8 images" in vlv(*fit, "-o", space).err
    build = ("index", "build", tmp_path / "told", "--model", tiny_folder, "--space", space)
    assert vlv(*build, "-o", tmp_path / "index").code == 0
    assert len(vlv("search", tmp_path / "index", "a cube").out.splitlines()) == 9
    write_image(tmp_path / "painted" / "3.png", 20)
    write_image(tmp_path / "others" / "a.png", 20)
    paired = (*fit, "--variants", tmp_path / "painted", "-o", tmp_path / "paired.safetensors")
    assert "fitted to 8 images, 1 of them with a variant" in vlv(*paired).err
    assert (tmp_path / "paired.safetensors").read_bytes() != space.read_bytes()
    for words, arguments in {
        "must end in .safetensors": (*fit, "-o", tmp_path / "x.pt"),
        "too few to fit": (*fit, "-o", space, "--limit", 3),
        "none of the variants has the id of an image, such as '0.png'; the first is 'a.png'": (
            *(*fit, "--variants", tmp_path / "others", "-o", space),
        ),
    }.items():
        assert words in vlv(*arguments).err


def test_images_without_captions_fit_no_space(
    vlv: Vlv, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    fit = ("index", "fit", photos, "--model", tiny_folder, "-o", tmp_path / "s.safetensors")
    assert "none of the images has a caption" in vlv(*fit).err
