"""The panel of find and replace in the Caption tab."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import gradio as gr

from vlv.ui import gallery
from vlv.ui.captioning import replace_all
from vlv.ui.replace import Replacement
from vlv.ui.workbench import LATER, SCOPES, Values, attempt

if TYPE_CHECKING:
    from vlv.ui.caption_tab import CaptionTab
    from vlv.ui.desk import Work
    from vlv.ui.view import View
    from vlv.ui.workbench import Workbench

MOST_PREVIEWED = 50


class ReplacePanel:
    """Builds the panel and answers its events.

    Args:
        tab: Whose captions.
        bench: What all tabs share.
    """

    def __init__(self, tab: CaptionTab, bench: Workbench) -> None:
        self._tab, self._bench = tab, bench
        self._build()

    def _build(self) -> None:
        with gr.Accordion("Find and replace", open=False):
            with gr.Row(elem_classes="vlv-row"):
                self.find = gr.Textbox(label="Find", min_width=160)
                self.to = gr.Textbox(label="Replace by", min_width=160)
                self.scope = gr.Radio(SCOPES, value="all shown", label="In captions of")
            with gr.Row(elem_classes="vlv-row"):
                self.whole = gr.Checkbox(True, label="Whole words", min_width=120)
                self.case = gr.Checkbox(False, label="Match case", min_width=120)
                self.pattern = gr.Checkbox(False, label="Regular expression", min_width=120)
                self.preview = gr.Button("Preview", min_width=100)
                self.replace = gr.Button("Replace all", variant="primary", min_width=100)
            self.changes = gr.HTML(js_on_load=None, apply_default_css=False)
        self.replacing = [self.find, self.to, self.whole, self.case, self.pattern]

    def wire(self) -> None:
        """Answer events, once the whole tab is built."""
        tab, given = self._tab, [self.scope, *self.replacing]
        self.preview.click(self._preview, [tab.view, *given], [self.changes], **LATER)
        outputs = [self.changes, *tab.screen]
        self.replace.click(self._replace, [tab.view, tab.editor, tab.of, *given], outputs, **LATER)

    def _preview(self, view: View, scope: str, *given: Any) -> str:
        """The first changes, as they would be."""
        lines: list[str] = []

        def action() -> str:
            how = Replacement(*given)
            changes = view.changes(view.scope(scope), how)
            for number, old, _ in islice(changes, MOST_PREVIEWED):
                lines.append(gallery.difference(view.opened.names[number], how.pieces(old)))
            if not lines:
                return "nothing would change"
            more = " (the first ones; there may be more)" if len(lines) == MOST_PREVIEWED else ""
            return f"{len(lines)} captions would change{more}"

        said = attempt(action)
        return gallery.message(*said) + f'<ul class="vlv-changes">{"".join(lines)}</ul>'

    def _replace(self, view: View, text: str, of: str, scope: str, *given: Any) -> Iterator[Values]:
        """Replace, each caption saved at once; a stop keeps those that are saved."""

        def replace(work: Work) -> str:
            how = Replacement(*given)
            view.save(text, of)
            numbers = view.scope(scope)
            work.total = len(numbers)
            return replace_all(view, numbers, how, work)

        start = partial(self._bench.reader.start, "replacing", replace)
        yield from self._tab.watch(view, start)
