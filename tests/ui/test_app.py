"""The page as an application: what it serves, and what it does not."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.ui.conftest import no_model
from vlv.ui.album import Album
from vlv.ui.searching import SearchableIndex
from vlv.ui.workbench import Workbench

gradio = pytest.importorskip("gradio", reason='the workbench needs pip install "vlv[ui]"')


class Page:
    def __init__(self, bench: Workbench) -> None:
        from vlv.ui.app import build_app

        self.app = build_app(bench)

    def get(self, path: str, **more: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            base = "http://127.0.0.1:7860"
            cookies = {"vlv_ui_7860": self.app.secret}
            async with httpx.AsyncClient(
                transport=transport, base_url=base, cookies=cookies
            ) as client:
                return await client.request(more.pop("method", "GET"), path, **more)

        return asyncio.run(go())


@pytest.fixture
def bench(make_bench: Callable[..., Workbench]) -> Workbench:
    return make_bench(no_model)


@pytest.fixture
def page(bench: Workbench) -> Page:
    return Page(bench)


def test_every_event_gets_what_its_function_takes(bench: Workbench) -> None:
    """Gradio only warns where it does not, and the event then fails in the browser."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        Page(bench)
    assert not [str(x.message) for x in told if issubclass(x.category, UserWarning)]


def test_an_index_brings_a_tab(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "What to find" not in Page(bench).get("/config").text
    monkeypatch.setattr("vlv.ui.searching.check_finished", lambda folder: {})
    bench.index = SearchableIndex(Path("images.index"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        page = Page(bench)
    assert "What to find" in page.get("/config").text


def test_images_of_open_folders_are_served_small_and_no_other_file(
    page: Page, bench: Workbench, folder: Path
) -> None:
    (folder / "c.png").write_bytes(b"no image")
    album = Album(folder)
    assert page.get(f"/vlv/image/{album.key}/0/192").status_code == 404
    bench.show(album)
    answer = page.get(f"/vlv/image/{album.key}/0/192")
    assert answer.headers["content-type"] == "image/jpeg"
    assert Image.open(BytesIO(answer.content)).size == (48, 40)
    bad = page.get(f"/vlv/image/{album.key}/2/192")
    assert (bad.status_code, "no image of a format" in bad.text) == (422, True)
    for path in (f"{album.key}/5/192", f"{album.key}/-1/192", "guess/0/192", f"{album.key}/x/192"):
        assert page.get(f"/vlv/image/{path}").status_code in (404, 422)


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/static/", "/assets/"])
def test_gradio_hands_out_no_files_of_this_machine(page: Page, folder: Path, route: str) -> None:
    secret = Path("pyproject.toml").absolute()
    for path in (
        str(secret),
        "pyproject.toml",
        str(folder / "a.png"),
        "/etc/passwd",
        "../../etc/passwd",
    ):
        answer = page.get(f"{route}{path}")
        assert answer.status_code >= 400, path
        assert "root:" not in answer.text
        assert "setuptools" not in answer.text


def test_a_path_that_a_browser_makes_up_is_no_upload(page: Page) -> None:
    config = json.loads(page.get("/config").text)
    drops = [d for d in config["dependencies"] if d["targets"] and d["targets"][0][1] == "upload"]
    assert drops
    for drop in drops:
        data: list[Any] = [None] * len(drop["inputs"])
        file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
        kinds = {c["id"]: c for c in config["components"]}
        place = next(i for i, c in enumerate(drop["inputs"]) if kinds[c]["type"] == "file")
        data[place] = (
            [file] if kinds[drop["inputs"][place]]["props"]["file_count"] == "multiple" else file
        )
        body = {"data": data, "fn_index": drop["id"], "session_hash": "x"}
        answer = page.get("/gradio_api/run/predict", method="POST", json=body)
        assert "root:" not in answer.text
        assert answer.status_code >= 400


def test_the_page_names_no_other_site_that_a_browser_would_ask(page: Page) -> None:
    answer = page.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "http" not in policy
    assert "default-src 'self'" in policy
    assert "fonts.g" not in answer.text
