"""The page with its tabs, and the application around it."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import gradio as gr
from fastapi import FastAPI, Response

from vlv.errors import DataError
from vlv.ui.arena_tab import ArenaTab
from vlv.ui.caption_tab import CaptionTab
from vlv.ui.guard import Guard
from vlv.ui.mix_tab import MixTab
from vlv.ui.reconstruct_tab import ReconstructTab
from vlv.ui.search_tab import SearchTab
from vlv.ui.thumbnails import thumbnail
from vlv.ui.workbench import LATER, NOW

if TYPE_CHECKING:
    from vlv.ui.workbench import Workbench

MAX_FILE_BYTES = 20_000_000
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif")
_MONO = ("ui-monospace", "DejaVu Sans Mono", "monospace")


def build_page(bench: Workbench, folder: str | None = None) -> gr.Blocks:
    """All tabs.

    Args:
        bench: What they share.
        folder: Of images, to open at the start.
    """
    with gr.Blocks(title="vlv workbench", analytics_enabled=False, fill_width=True) as page:
        with gr.Tabs(elem_id="vlv-tabs", overflow_behavior="wrap"):
            with gr.Tab("Caption", id="caption"):
                caption = CaptionTab(bench, folder)
            with gr.Tab("Reconstruct", id="reconstruct"):
                ReconstructTab(bench, caption.view)
            with gr.Tab("Mix", id="mix"):
                MixTab(bench, caption.view)
            if bench.index is not None:
                with gr.Tab("Search", id="search"):
                    SearchTab(bench, bench.index)
            with gr.Tab("Arena", id="arena"):
                ArenaTab(bench)
        writer = caption.writer
        opened = page.load(caption.start, [caption.view, caption.path], caption.screen, **NOW)
        opened.then(writer.show_command, writer.given, [writer.command], **NOW)
        page.load(writer.resume, None, [writer.progress], **LATER)
    return page


def _theme() -> gr.themes.Base:
    """Gradio's own, darker where white text or a white page would make it hard to read (WCAG 2.2, 1.4.3)."""
    theme = gr.themes.Default(
        font=_FONTS, font_mono=_MONO, primary_hue="indigo", neutral_hue="slate"
    )
    return theme.set(
        body_text_color_subdued="*neutral_600",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
    )


def build_app(bench: Workbench, folder: str | None = None) -> Guard:
    """The page as an ASGI application that answers to one browser on this machine.

    It serves the images of folders that were opened, made small, and no other file.

    Args:
        bench: What all tabs share.
        folder: Of images, to open at the start.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def image(key: str, number: int, side: int) -> Response:
        album = bench.album(key)
        if album is None or not 0 <= number < len(album):
            return Response("there is no such image", 404)
        try:
            data = thumbnail(album.path(number), side)
        except DataError as error:
            return Response(str(error), 422)
        return Response(
            data, media_type="image/jpeg", headers={"Cache-Control": "private, no-cache"}
        )

    app.add_api_route("/vlv/image/{key}/{number}/{side}", image, methods=["GET"])
    assets = resources.files("vlv.ui")
    gr.mount_gradio_app(
        app,
        build_page(bench, folder),
        path="/",
        server_name="127.0.0.1",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=True,
        max_file_size=MAX_FILE_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css=(assets / "style.css").read_text("utf-8"),
        head=f"<script>{(assets / 'keys.js').read_text('utf-8')}</script>",
    )
    return Guard(app)
