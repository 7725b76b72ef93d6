"""The Arena tab: captions of unknown sources, judged by keyboard; every vote is saved where `vlv eval score` reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from vlv.evaluation.experiments.arena import CRITERIA, SCALE, TOP
from vlv.ui import gallery
from vlv.ui.arena import Arena
from vlv.ui.workbench import NOW, Values, attempt

if TYPE_CHECKING:
    from vlv.evaluation.experiments.arena import Mode
    from vlv.ui.workbench import Workbench

MODES = [("choose between two", "pairs"), ("rate each from 0 to 6", "rating")]


class ArenaTab:
    """Builds the tab and answers its events.

    Args:
        bench: What all tabs share.
    """

    def __init__(self, bench: Workbench) -> None:
        self._arena = Arena()
        bench.closing.callback(self._arena.close)
        with gr.Column(elem_id="vlv-arena"):
            with gr.Row(elem_classes="vlv-bar"):
                self.folder = gr.Textbox(
                    label="Run",
                    placeholder="folder of vlv eval predict arena",
                    scale=3,
                    min_width=200,
                )
                self.rater = gr.Textbox(label="Your name in the results", scale=1, min_width=140)
                self.mode = gr.Radio(MODES, value="pairs", label="Task", scale=2)
                self.begin = gr.Button("Begin", variant="primary", scale=1, min_width=90)
            self.message = gr.HTML(js_on_load=None, apply_default_css=False)
            self.item = gr.HTML(js_on_load=None, apply_default_css=False)
            with gr.Row(elem_classes="vlv-row", visible=False) as self.choices:
                self.votes: list[tuple[gr.Button, int | str | None]] = [
                    (gr.Button("← left", elem_id="vlv-first", min_width=80), "first"),
                    (gr.Button("tie (t)", elem_id="vlv-tie", min_width=80), "tie"),
                    (gr.Button("right →", elem_id="vlv-second", min_width=80), "second"),
                ]
            with gr.Row(elem_classes="vlv-row", visible=False) as self.ratings:
                for n in range(TOP + 1):
                    self.votes.append((gr.Button(str(n), elem_id=f"vlv-rate-{n}", min_width=45), n))
            with gr.Row(elem_classes="vlv-row", visible=False) as self.others:
                self.votes.append((gr.Button("skip (s)", elem_id="vlv-skip", min_width=80), None))
            with gr.Accordion("What to judge by", open=False):
                gr.Markdown(
                    f"{CRITERIA}\n\n" + "\n".join(f"- {line}" for line in SCALE.splitlines())
                )
            self.command = gr.HTML(js_on_load=None, apply_default_css=False)
        self._wire()

    def _wire(self) -> None:
        self.screen = [
            self.message,
            self.item,
            self.choices,
            self.ratings,
            self.others,
            self.command,
        ]
        given = [self.folder, self.rater, self.mode]
        self.begin.click(self._start, given, self.screen, **NOW)
        for button, value in self.votes:
            button.click(self._voter(value), None, self.screen, **NOW)

    def _start(self, folder: str, rater: str, mode: Mode) -> Values:
        return self._screen(attempt(lambda: self._arena.start(folder, rater, mode)))

    def _voter(self, value: int | str | None) -> Any:
        return lambda: self._screen(attempt(lambda: self._arena.vote(value)))

    def _screen(self, said: tuple[str, str]) -> Values:
        arena = self._arena
        is_open = arena.item is not None and "item" in arena.item
        pairs = arena.mode == "pairs"
        return [
            gallery.message(said[0] or arena.line, said[1]),
            arena.html,
            gr.update(visible=is_open and pairs),
            gr.update(visible=is_open and not pairs),
            gr.update(visible=is_open),
            gallery.commands(arena.command) if arena.command else "",
        ]
