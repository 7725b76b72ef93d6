"""What a window looks at: pages, filters, marks, saving on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ui.conftest import CAPTIONS, no_model, write_image
from vlv.errors import ConfigError
from vlv.models.pipeline import VLVPipeline
from vlv.ui import gallery
from vlv.ui.album import Album
from vlv.ui.replace import Replacement
from vlv.ui.tokens import count_tokens
from vlv.ui.view import PAGE, View


@pytest.fixture
def view(folder: Path) -> View:
    view = View()
    view.open(Album(folder))
    return view


def shown(view: View) -> list[str]:
    return [view.opened.names[n] for n in view.shown]


def test_before_a_folder_is_open() -> None:
    view = View()
    assert "Open a folder" in gallery.cards(view)
    for action in (lambda: view.opened, lambda: view.apply_filter("x", no_model)):
        with pytest.raises(ConfigError, match="no folder is open"):
            action()
    assert not view.save("x", "")


def test_moving_stays_among_the_images(view: View) -> None:
    assert (view.number, view.text) == (0, "A red cube.")
    view.go(-3)
    assert view.number == 0
    view.go(99)
    assert (view.number, view.text) == (4, "")
    view.look_at(2)
    assert view.text == "A blue sphere, far away."


def test_a_filter_keeps_the_image_that_is_looked_at(view: View) -> None:
    view.look_at(3)
    view.apply_filter("red", no_model)
    assert shown(view) == ["a.png", "sub/d.png"]
    assert view.number == 3
    view.apply_filter("words:=0", no_model)
    assert shown(view) == ["b.png", "sub/e.png"]
    assert view.number == 1
    with pytest.raises(ConfigError):
        view.apply_filter("(", no_model)
    assert shown(view) == ["b.png", "sub/e.png"]
    view.apply_filter("nothing", no_model)
    assert view.number is None
    assert "No image passes" in gallery.cards(view)
    assert not view.save("lost?", view.key)
    view.apply_filter("", no_model)
    assert len(view.shown) == 5


def test_saving_what_was_typed_and_nothing_else(view: View, folder: Path) -> None:
    assert not view.save("A red cube.", view.key)
    assert view.save("A red box.", view.key)
    assert (folder / "a.txt").read_text() == "A red box.\n"
    assert view.text == "A red box."


def test_what_was_typed_for_another_image_is_not_saved(view: View, folder: Path) -> None:
    """As a browser sends it whose answer to the last key has not come yet."""
    of = view.key
    view.go(1)
    assert not view.save("A red cube.", of)
    assert not (folder / "b.txt").exists()
    assert view.save("Mine.", view.key)


def test_marks(view: View) -> None:
    with pytest.raises(ConfigError, match="mark some"):
        view.scope("marked")
    view.mark(3)
    view.mark(1)
    view.mark(3)
    assert view.scope("marked") == [1]
    view.apply_filter("red", no_model)
    view.mark_shown()
    assert view.scope("marked") == [0, 1, 3]
    view.mark_shown()
    assert view.scope("marked") == [1]
    assert view.scope("all shown") == [0, 3]
    assert view.scope("this image") == [0]


def test_pages(tmp_path: Path) -> None:
    for number in range(PAGE + 3):
        write_image(tmp_path / f"{number:03d}.png")
    view = View()
    view.open(Album(tmp_path))
    assert (view.num_pages, len(list(view.on_page()))) == (2, PAGE)
    view.turn(1)
    assert [number for _, number in view.on_page()] == [PAGE, PAGE + 1, PAGE + 2]
    view.turn(5)
    assert view.page == 1
    view.turn(-5)
    assert view.number == 0


def test_what_a_replacement_would_change(view: View) -> None:
    found = list(view.changes(view.scope("all shown"), Replacement("red", "green")))
    assert found == [
        (0, "A red cube.", "A green cube."),
        (3, "A red cone.", "A green cone."),
    ]


def test_foreign_names_and_captions_are_escaped(tmp_path: Path) -> None:
    write_image(tmp_path / '"><img src=x onerror=alert(1)>.png')
    (tmp_path / '"><img src=x onerror=alert(1)>.txt').write_text("<script>alert(1)</script>")
    view = View()
    view.open(Album(tmp_path))
    page = gallery.cards(view) + gallery.picture(view) + gallery.message("<b>", "error")
    page += gallery.difference("<i>", Replacement("a", "<u>").pieces("a<s>"))
    for tag in ("<script", "<img src=x", "<b>", "<u>", "<s>", "<i>"):
        assert tag not in page.replace('<i class="vlv-soft">', "")


def test_tokens_are_counted_as_the_models_count_them(
    view: View, tiny_pipeline: VLVPipeline
) -> None:
    clip, own = count_tokens(tiny_pipeline, "a red cube " * 30)
    assert (clip.name, clip.limit, clip.is_over) == (
        "CLIP",
        tiny_pipeline.decoder.num_positions,
        True,
    )
    assert own.tokens > 0
    assert "the rest is cut" in gallery.counters("x", [clip, own])
    lengths = {
        name: count_tokens(tiny_pipeline, caption)[0].tokens
        for name, caption in CAPTIONS.items()
        if caption is not None
    }
    most = max(lengths.values())
    view.apply_filter(f"tokens:={most}", lambda: tiny_pipeline)
    assert shown(view) == [name for name, length in lengths.items() if length == most]
