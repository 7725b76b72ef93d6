"""Search over HTTP: the index of a server, and servers without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("usearch", reason='search needs the package usearch: pip install "vlv[search]"')

from tests.search.support import telling_space
from tests.serve.conftest import MODEL, Asked, assert_refused, data_url, image, png
from vlv.models.pipeline import VLVPipeline
from vlv.search.index import Index
from vlv.serve.app import build_app
from vlv.serve.service import Service
from vlv.serve.settings import Keys, ServeSettings


@pytest.fixture(scope="module")
def index(tiny_pipeline: VLVPipeline, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("search")
    (folder / "photos").mkdir()
    for number in range(4):
        (folder / "photos" / f"{number}.png").write_bytes(png(image(number)))
    space = telling_space(tiny_pipeline, sorted((folder / "photos").iterdir()))
    return Index.build([folder / "photos"], folder / "index", tiny_pipeline, space=space)


@pytest.fixture
def searching(index: Index) -> Iterator[Asked]:
    service = Service(index.pipe, ServeSettings(MODEL), index)
    service.batcher.start()
    yield Asked(service, build_app(service, Keys()))
    service.close()


def test_search_by_text_and_by_image(searching: Asked, index: Index) -> None:
    by_text, by_image = searching(
        ("/v1/search", {"text": "a red cube", "k": 2}),
        ("/v1/search", {"image": data_url(png(image(3))), "model": MODEL}),
    )
    rows = by_text.json()["data"]
    assert [row["id"] for row in rows] == [hit.id for hit in index.search("a red cube", k=2)]
    assert [row["index"] for row in rows] == [0, 1]
    assert rows[0].keys() == {"object", "index", "id", "score", "sha256"}, "no path of the server"
    assert by_image.json()["data"][0]["id"] == "3.png"


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({}, "invalid_request", "give one query"),
        ({"text": "a", "image": "data:,"}, "invalid_request", "give one query"),
        ({"text": "   "}, "limit_exceeded", "not only spaces"),
        ({"text": "a cube", "k": 0}, "invalid_request", "k: "),
        ({"text": "a cube", "k": 10**9}, "invalid_request", "k: "),
        ({"text": "a cube", "candidates": 3}, "invalid_request", "candidates"),
    ],
)
def test_bad_queries(searching: Asked, body: dict[str, object], code: str, words: str) -> None:
    assert words in assert_refused(searching.one("/v1/search", body), 400, code)


def test_a_server_without_an_index(asked: Asked) -> None:
    message = assert_refused(asked.one("/v1/search", {"text": "a cube"}), 404, "no_index")
    assert "--index" in message
