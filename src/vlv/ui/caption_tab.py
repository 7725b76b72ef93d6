"""The Caption tab: images of a folder, their captions by keyboard, and the model that writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from vlv.errors import ConfigError, VLVError
from vlv.ui import gallery
from vlv.ui.album import Album
from vlv.ui.doubts import judge_one, marked, settings_of
from vlv.ui.replace_panel import ReplacePanel
from vlv.ui.tokens import count_tokens
from vlv.ui.view import View
from vlv.ui.workbench import LATER, NOW, Values, attempt
from vlv.ui.writing_panel import WritingPanel

if TYPE_CHECKING:
    from pathlib import Path

    from vlv.ui.desk import Work
    from vlv.ui.workbench import Workbench

_ON_CARDS = """element.addEventListener("click", event => {
  const card = event.target.closest("[data-vlv]");
  if (card) trigger("click", {action: card.dataset.vlv});
});"""


class CaptionTab:
    """Builds the tab and answers its events.

    Args:
        bench: What all tabs share.
        folder: To open at the start; None waits for one.
    """

    def __init__(self, bench: Workbench, folder: str | None) -> None:
        self._bench, self._folder = bench, folder
        self._build()
        self._wire()

    # --- what is there ---------------------------------------------------------------------------

    def _build(self) -> None:
        self.view = gr.State(View())  # each window gets a copy
        with gr.Row(elem_classes="vlv-bar"):
            self.path = gr.Textbox(
                self._folder or "",
                label="Folder",
                placeholder="/path/to/images",
                elem_id="vlv-path",
                scale=5,
            )
            self.open_button = gr.Button("Open", variant="primary", scale=1, min_width=90)
            self.filter = gr.Textbox(
                label="Filter (press /)",
                placeholder="cube not tag:red words:>20",
                elem_id="vlv-filter",
                scale=4,
            )
        with gr.Accordion("Drop images", open=False):
            self.drop = gr.File(
                file_count="multiple", file_types=["image"], show_label=False, height=140
            )
        with gr.Row(elem_classes="vlv-main"):
            with gr.Column(scale=5, min_width=300):
                self.where = gr.HTML(js_on_load=None)
                self.cards = gr.HTML(
                    gallery.cards(View()), js_on_load=_ON_CARDS, apply_default_css=False
                )
                with gr.Row(elem_classes="vlv-row"):
                    self.page_back = gr.Button(
                        "◀ Page", size="sm", elem_id="vlv-page-back", min_width=80
                    )
                    self.page_on = gr.Button(
                        "Page ▶", size="sm", elem_id="vlv-page-on", min_width=80
                    )
                    self.mark_all = gr.Button(
                        "Mark all shown (a)", size="sm", elem_id="vlv-mark-all", min_width=120
                    )
                    self.again = gr.Button("Read again", size="sm", min_width=90)
            with gr.Column(scale=4, min_width=300):
                self._build_editor()
        self.writer = WritingPanel(self, self._bench)
        self.replacer = ReplacePanel(self, self._bench)

    def _build_editor(self) -> None:
        self.picture = gr.HTML(gallery.picture(View()), js_on_load=None, apply_default_css=False)
        self.editor = gr.Textbox(
            label="Caption (press e)", lines=5, max_lines=12, elem_id="vlv-editor"
        )
        self.of = gr.Textbox(
            visible="hidden"
        )  # the key of the image whose caption the editor holds
        self.counters = gr.HTML(js_on_load=None, apply_default_css=False)
        with gr.Row(elem_classes="vlv-row"):
            self.back = gr.Button("◀ Back (k)", size="sm", elem_id="vlv-back", min_width=90)
            self.next = gr.Button("Next (j) ▶", size="sm", elem_id="vlv-next", min_width=90)
            self.save = gr.Button(
                "Save (Ctrl+S)", size="sm", variant="primary", elem_id="vlv-save", min_width=110
            )
            self.save_next = gr.Button(
                "Save, next (Ctrl+Enter)", size="sm", elem_id="vlv-save-next", min_width=150
            )
            self.check = gr.Button("Doubts (d)", size="sm", elem_id="vlv-check", min_width=90)
        self.message = gr.HTML(js_on_load=None, apply_default_css=False)
        self.doubts = gr.HTML(js_on_load=None, apply_default_css=False)

    # --- what happens ----------------------------------------------------------------------------

    def _wire(self) -> None:
        view, editor = self.view, self.editor
        self.screen = [
            self.where,
            self.cards,
            self.picture,
            self.editor,
            self.of,
            self.counters,
            self.doubts,
            self.message,
        ]
        typed = [view, editor, self.of]

        def shows_command(event: Any) -> None:
            event.then(self.writer.show_command, self.writer.given, [self.writer.command], **NOW)

        def moves(button: gr.Button, move: Callable[[View], None]) -> None:
            shows_command(button.click(partial(self._move, move), typed, self.screen, **NOW))

        opens = [self.open_button.click, self.path.submit]
        shows_command(gr.on(opens, self._open, [view, self.path], self.screen, **NOW))
        dropped = [self.path, self.drop, *self.screen]
        shows_command(self.drop.upload(self._drop, [view, self.drop], dropped, **LATER))
        shows_command(self.cards.click(self._act, typed, self.screen, **NOW))
        moves(self.back, lambda v: v.go(v.position - 1))
        moves(self.next, lambda v: v.go(v.position + 1))
        moves(self.page_back, lambda v: v.turn(-1))
        moves(self.page_on, lambda v: v.turn(1))
        moves(self.save, lambda v: None)
        moves(self.save_next, lambda v: v.go(v.position + 1))
        moves(self.mark_all, View.mark_shown)
        moves(self.again, View.refresh)
        editor.input(
            self._count, [view, editor], [self.counters], trigger_mode="always_last", **NOW
        )
        self.check.click(self._check, typed, [self.writer.progress, *self.screen], **LATER)
        filtered = [self.writer.progress, *self.screen]
        shows_command(self.filter.submit(self._filter, [*typed, self.filter], filtered, **LATER))
        self.writer.wire()
        self.replacer.wire()

    def show(self, view: View, said: tuple[str, str] = ("", "info")) -> Values:
        """What the tab shows, in the order of `screen`."""
        if view.error is not None and not said[0]:
            said = view.error, "error"
        return [
            gallery.where(view),
            gallery.cards(view),
            gallery.picture(view),
            view.text,
            view.key,
            self._count(view, view.text),
            self._marks(view),
            gallery.message(*said),
        ]

    def _marks(self, view: View) -> str:
        row = None if view.number is None else view.verdict(view.number, view.text)
        if row is None:
            return ""
        try:
            threshold = settings_of(self._bench.flags, self._bench.dtype).calibration.threshold
        except VLVError:  # verdicts of another model
            threshold = 0.5
        return marked(row, threshold)

    def _count(self, view: View, text: str) -> str:
        if view.album is None:
            return ""
        pipe = self._bench.desk.ready
        return gallery.counters(text, None if pipe is None else count_tokens(pipe, text))

    def _open(self, view: View, path: str) -> Values:
        def action() -> str:
            album = Album.open(path)
            view.open(album)
            self._bench.show(album)
            return ""

        return self.show(view, attempt(action))

    def start(self, view: View, path: str) -> Values:
        """Open the folder that the command line named."""
        return self._open(view, path) if path else self.show(view)

    def _drop(self, view: View, files: list[str] | None) -> Values:
        kept: list[Path] = []
        said = attempt(lambda: kept.append(self._bench.keep_dropped(files or [])))
        path = str(kept[0]) if kept else ""
        return [path, None, *(self._open(view, path) if kept else self.show(view, said))]

    def _move(self, move: Callable[[View], None], view: View, text: str, of: str) -> Values:
        """Save what was edited, then look elsewhere; where it cannot be saved, stay."""
        saved = False

        def action() -> str:
            nonlocal saved
            number = view.number
            saved = view.save(text, of)
            move(view)
            return f"saved: {view.opened.names[number]}" if saved and number is not None else ""

        with view.lock:
            said = attempt(action)
            values = self.show(view, said)
            if said[1] == "error" and view.is_edited(text, of):  # what was typed is not lost
                values[3] = text
            elif saved and view.key == of:  # nor what has been typed since
                values[3] = gr.skip()
            return values

    def _act(self, view: View, text: str, of: str, event: gr.EventData) -> Values:
        """What a card asks for: `look:NUMBER`, `mark:NUMBER`, or `mark:current`."""
        verb, _, rest = str(event.action).partition(":")
        number = view.number if rest == "current" else int(rest) if rest.isdecimal() else None
        if view.album is None or number is None or not 0 <= number < len(view.album):
            return self.show(view)
        move = View.look_at if verb == "look" else View.mark
        return self._move(lambda v: move(v, number), view, text, of)

    def _filter(self, view: View, typed: str, of: str, text: str) -> Iterator[Values]:
        """Save what was edited, then read all captions that the filter asks for."""
        said = attempt(lambda: None if not view.save(typed, of) else "saved")
        if said[1] == "error":
            yield ["", *self.show(view, said)]
            return

        def read(work: Work) -> str:
            view.apply_filter(text, self._bench.desk.pipe, work.advance)
            return ""

        total = 0 if view.album is None else len(view.album)
        yield from self.watch(
            view, partial(self._bench.reader.start, "reading captions", read, total)
        )

    def _check(self, view: View, text: str, of: str) -> Iterator[Values]:
        """Have the model judge the caption in the editor, saved first."""

        def judge(work: Work) -> str:
            settings = settings_of(self._bench.flags, self._bench.dtype)
            view.save(text, of)
            number = view.number
            if number is None or view.verdicts is None or not view.text:
                raise ConfigError("there is no caption to judge; write one first")
            row = judge_one(self._bench.desk, view.opened.record(number), view.text, settings)
            if row["error"] is not None:
                raise ConfigError(str(row["error"]))
            view.verdicts.keep(row)
            return f"the most doubtful sentence is wrong with a probability of {row['doubt']:.0%}"

        yield from self.watch(view, partial(self._bench.desk.start, "judging", judge))

    def watch(self, view: View, start: Callable[[], Work]) -> Iterator[Values]:
        """Start some work, show how it goes on, and in the end what has come of it."""
        started: list[Work] = []
        said = attempt(lambda: started.append(start()))
        for work in self._bench.follow(started[0]) if started else ():
            if work.is_running:
                yield [gallery.progress(work), *[gr.skip()] * len(self.screen)]
            else:
                said = work.line, "error" if work.state == "failed" else "info"
        yield ["", *self.show(view, said)]
