"""The workbench in a real browser: keys, saving, long work, narrow and dark windows."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.search.support import telling_space
from tests.ui.conftest import CAPTIONS, write_folder, write_image
from vlv.evaluation.experiments import arena
from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.predicting import predict_captions
from vlv.evaluation.experiments.run import Run
from vlv.evaluation.experiments.samples import DataSet
from vlv.models.pipeline import VLVPipeline
from vlv.search.index import Index
from vlv.serve.sockets import listen
from vlv.ui.commands import ModelFlags
from vlv.ui.desk import Desk
from vlv.ui.searching import SearchableIndex
from vlv.ui.workbench import Workbench

pytest.importorskip("gradio", reason='the workbench needs pip install "vlv[ui]"')
sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright")

if TYPE_CHECKING:
    from vlv.ui.server import Server

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine"),
]
PALE = (Path(__file__).parent / "contrast.js").read_text("utf-8")
TABS = ("Caption", "Reconstruct", "Mix", "Search", "Arena")
WAIT_MS = 60_000  # of a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("ui") / "images")


@pytest.fixture(scope="module")
def server(folder: Path, tiny_folder: Path, tiny_pipeline: VLVPipeline) -> Iterator[Server]:
    import threading

    from vlv.ui.server import Server

    flags = ModelFlags(str(tiny_folder), device="cpu", dtype="float32")
    where = folder.parent / "images.index"
    space = telling_space(tiny_pipeline, sorted(folder.rglob("*.png")))
    Index.build([folder], where, tiny_pipeline, space=space)
    bench = Workbench(
        Desk(lambda: tiny_pipeline),
        flags,
        "float32",
        folder.parent / "work",
        SearchableIndex(where),
    )
    server = Server(bench, listen("127.0.0.1", 0), str(folder))
    bench.desk.preload()
    thread = threading.Thread(target=server.serve_until_signal, daemon=True)
    thread.start()
    yield server
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Window:
    """A page, and what must not happen in it."""

    def __init__(self, browser: Any, server: Server, **how: Any) -> None:
        self.context = browser.new_context(**how)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.outside: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(server.url)
        self.page.wait_for_selector(".vlv-card")

    def _note(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            self.outside.append(url)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def wait_for(self, selector: str, text: str) -> None:
        self.page.wait_for_function(
            "([s, t]) => [...document.querySelectorAll(s)].some(x => (x.value ?? x.innerText).includes(t))",
            arg=[selector, text],
        )

    def close(self) -> None:
        self.context.close()
        assert not self.outside
        assert not self.errors


@pytest.fixture
def window(browser: Any, server: Server) -> Iterator[Window]:
    window = Window(browser, server, viewport={"width": 1280, "height": 900})
    yield window
    window.close()


def wait_until(holds: Any) -> None:
    end = time.monotonic() + WAIT_MS / 1000
    while not holds():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


EDITOR = "#vlv-editor textarea"


def test_what_is_typed_while_it_is_saved_stays(window: Window, folder: Path) -> None:
    keys, page = window.page.keyboard, window.page
    window.wait_for(EDITOR, "A red cube.")
    before = (folder / "a.txt").read_text()
    page.evaluate(
        """() => {
            const fetch = window.fetch;
            window.fetch = async (...given) => {
                await new Promise(done => setTimeout(done, 1500));
                return fetch(...given);
            };
        }"""
    )
    keys.press("e")
    keys.press("Control+End")
    keys.type("!")
    keys.press("Control+s")
    keys.type("?")
    wait_until(lambda: (folder / "a.txt").read_text().endswith("!\n"))
    window.wait_for(".vlv-message", "saved: a.png")
    assert page.input_value(EDITOR).endswith("!?")
    keys.press("Control+s")
    wait_until(lambda: (folder / "a.txt").read_text().endswith("!?\n"))
    (folder / "a.txt").write_text(before)


def test_captions_are_edited_and_saved_by_keyboard(window: Window, folder: Path) -> None:
    keys = window.page.keyboard
    window.wait_for(EDITOR, "A red cube.")
    keys.press("j")
    window.wait_for(".vlv-card.is-current", "b.png")
    keys.press("e")
    keys.type("By hand.")
    window.wait_for(".vlv-counters", "2 words")
    keys.press("Control+s")
    wait_until((folder / "b.txt").exists)
    assert (folder / "b.txt").read_text() == "By hand.\n"
    window.wait_for(".vlv-message", "saved: b.png")
    keys.press("End")
    keys.type(" Twice.")
    keys.press("Control+Enter")
    window.wait_for(".vlv-card.is-current", "c.png")
    assert (folder / "b.txt").read_text() == "By hand. Twice.\n"
    keys.press("Escape")
    keys.press("k")
    window.wait_for(EDITOR, "By hand. Twice.")
    keys.press("x")
    window.wait_for(".vlv-where", "1 marked")


def test_filter_and_replace(window: Window, folder: Path) -> None:
    keys, page = window.page.keyboard, window.page
    keys.press("/")
    keys.type("red (cube or cone)")
    keys.press("Enter")
    window.wait_for(".vlv-where", "2 of 5 images")
    page.get_by_text("Find and replace").click()
    page.get_by_label("Find", exact=True).fill("red")
    page.get_by_label("Replace by").fill("green")
    page.get_by_role("button", name="Preview").click()
    window.wait_for(".vlv-changes", "green")
    assert (folder / "a.txt").read_text() == "A red cube.\n"
    page.get_by_role("button", name="Replace all").click()
    wait_until(lambda: (folder / "sub/d.txt").read_text() == "A green cone.\n")
    assert (folder / "a.txt").read_text() == "A green cube.\n"
    page.locator("#vlv-filter input, #vlv-filter textarea").fill("(")
    page.locator("#vlv-filter input, #vlv-filter textarea").press("Enter")
    window.wait_for(".vlv-message.is-error", "the filter lacks a condition")


def test_the_model_writes_captions_and_says_how(window: Window, folder: Path) -> None:
    page, before = window.page, (folder / "a.txt").read_text()
    page.get_by_label("all shown").first.check()
    window.wait_for(".vlv-command", f"vlv caption {folder} --sidecar .txt")
    (folder / "sub/e.txt").unlink(missing_ok=True)
    page.locator("#vlv-write").click()
    wait_until((folder / "sub/e.txt").exists)
    window.wait_for(".vlv-message", "done ")
    assert (folder / "sub/e.txt").read_text().endswith("\n")
    assert (folder / "a.txt").read_text() == before, "a caption that exists is kept"


def test_reconstruct_and_mix(window: Window, folder: Path) -> None:
    page = window.page
    window.wait_for(".vlv-card", "c.png")
    for name in ("a.png", "c.png"):
        page.get_by_label(f"mark {name}").click()
    window.wait_for(".vlv-where", "2 marked")
    page.get_by_role("tab", name="Reconstruct").click()
    page.get_by_role("button", name="Take the image of the Caption tab").click()
    window.wait_for(".vlv-command", "vlv reconstruct")
    page.locator("#vlv-reconstruct").click()
    wait_until((folder.parent / "work/reconstructed/a.png").exists)
    page.wait_for_selector("#vlv-slider img")
    page.get_by_role("tab", name="Mix").click()
    page.get_by_role("button", name="Take the marked images").click()
    page.get_by_label("Frames of a path").fill("5")
    page.get_by_label("Frames of a path").press("Tab")
    window.wait_for(".vlv-command", "--weights 0,1")
    page.locator("#vlv-mix").click()
    wait_until(lambda: list((folder.parent / "work/mixed").glob("*-strip.png")))
    (strip,) = (folder.parent / "work/mixed").glob("*-strip.png")
    with Image.open(strip) as path, Image.open(folder.parent / "work/reconstructed/a.png") as one:
        assert path.width >= 5 * one.width
        assert path.height >= one.height
    page.wait_for_selector("#vlv-mixes img")
    page.set_viewport_size({"width": 390, "height": 844})
    frames = page.locator("#vlv-mixes .grid-container > *")
    assert frames.count() == 5
    assert max(frames.evaluate_all("all => all.map(x => x.getBoundingClientRect().right)")) <= 390


def test_a_stop_keeps_what_is_finished(window: Window, tmp_path: Path) -> None:
    for number in range(400):
        write_image(tmp_path / f"{number:03d}.png", number)
    page = window.page
    path = page.locator("#vlv-path input, #vlv-path textarea")
    path.fill(str(tmp_path))
    path.press("Enter")
    window.wait_for(".vlv-where", "400 images")
    page.get_by_label("all shown").first.check()
    window.wait_for(".vlv-command", f"vlv caption {tmp_path}")
    page.locator("#vlv-write").click()
    wait_until(lambda: list(tmp_path.glob("*.txt")))
    page.locator("#vlv-stop").click()
    window.wait_for(".vlv-message", "stopped")
    written = list(tmp_path.glob("*.txt"))
    assert 0 < len(written) < 400
    assert all(x.read_text().endswith("\n") for x in written)


def test_search(window: Window, folder: Path) -> None:
    page = window.page
    page.get_by_role("tab", name="Search").click()
    field = page.get_by_label("What to find, in words")
    field.fill("a red cube")
    field.press("Enter")
    page.wait_for_selector("#vlv-found img")
    window.wait_for(".vlv-command", "'a red cube'")
    field.fill("")
    with page.expect_response(lambda answer: "/upload" in answer.url):
        page.set_input_files("input[type=file] >> nth=-1", folder / "c.png")
    page.wait_for_timeout(500)  # until the page has kept it
    page.locator("#vlv-find").click()
    window.wait_for(".vlv-command", "--image")
    assert page.locator("#vlv-found .grid-container > *").count() == len(CAPTIONS)


def test_a_ballot_by_keyboard(window: Window, tmp_path: Path) -> None:
    how = arena.settings(["true", "words"])
    run = Run.start(tmp_path / "run", arena.NAME, DataSet("test", 3, 2), how)
    predict_captions(run, Backends(batch_size=3))
    page, keys = window.page, window.page.keyboard
    page.get_by_role("tab", name="Arena").click()
    page.get_by_label("Run", exact=True).fill(str(run.folder))
    page.get_by_label("Your name in the results").fill("anna")
    page.get_by_role("button", name="Begin").click()
    for number, key in enumerate(("ArrowLeft", "t", "ArrowRight", "s")):
        window.wait_for(".vlv-message", f"{number} of 4 judged")
        assert "true" not in window.text("#vlv-arena .vlv-texts").split(), "it is blind"
        page.locator("#vlv-tie").focus()
        keys.press(key)
    window.wait_for(".vlv-message", "all is judged and saved")
    rows = run.rows("judgements/anna", arena.PAIR_KEY)
    assert [row.get("winner") for row in rows] == ["first", "tie", "second", None]
    assert {(row["first"], row["second"]) for row in rows} == {("true", "words"), ("words", "true")}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_holds_everything(browser: Any, server: Server, scheme: str) -> None:
    window = Window(browser, server, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for tab in TABS:
        window.page.get_by_role("tab", name=tab).click()
        wide = window.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, tab
    window.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(browser: Any, server: Server, scheme: str) -> None:
    window = Window(browser, server, viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    for tab in TABS:
        window.page.get_by_role("tab", name=tab).click()
        window.page.mouse.move(0, 0)
        assert window.page.evaluate(PALE) == [], tab
    window.close()
