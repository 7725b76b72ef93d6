"""The Search tab: images of an index that are nearest to a text, or to an image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from vlv.ui import gallery
from vlv.ui.reconstruct_tab import picture_grid
from vlv.ui.searching import MOST_FOUND, Found, SearchPlan
from vlv.ui.workbench import LATER, NOW, Values, attempt

if TYPE_CHECKING:
    from vlv.ui.desk import Work
    from vlv.ui.searching import SearchableIndex
    from vlv.ui.workbench import Workbench


class SearchTab:
    """Builds the tab and answers its events.

    Args:
        bench: What all tabs share.
        index: That is searched.
    """

    def __init__(self, bench: Workbench, index: SearchableIndex) -> None:
        self._bench, self._index = bench, index
        self.image = gr.State("")
        with gr.Row(elem_classes="vlv-main"):
            with gr.Column(scale=2, min_width=280):
                self.text = gr.Textbox(
                    label="What to find, in words",
                    info=f"among the images of {index.folder}",
                    elem_id="vlv-search",
                )
                self.drop = gr.File(
                    file_types=["image"], label="Or images that are like this one", height=140
                )
                self.k = gr.Number(
                    10, label="How many images", precision=0, minimum=1, maximum=MOST_FOUND
                )
                self.find = gr.Button("Search", variant="primary", elem_id="vlv-find")
                self.message = gr.HTML(js_on_load=None, apply_default_css=False)
            with gr.Column(scale=4, min_width=280):
                self.found = picture_grid("Found, the nearest first", "vlv-found")
        self.command = gr.HTML(js_on_load=None, apply_default_css=False)
        self._wire()

    def _wire(self) -> None:
        given = [self.text, self.image, self.k]
        for event in (self.drop.upload, self.drop.clear):
            event(self._bench.keep_one, [self.drop], [self.image, self.message], **NOW)
        gr.on(
            [self.find.click, self.text.submit],
            self._search,
            given,
            [self.found, self.message, self.command],
            **LATER,
        )

    def _search(self, text: str, image: str, k: float | None) -> Iterator[Values]:
        """Search, and show what was found."""
        plans: list[SearchPlan] = []
        found: list[Found] = []
        started: list[Work] = []

        def start() -> None:
            path = Path(image) if image else None
            plan = SearchPlan(self._index, text or "", path, int(k or 0), self._bench.flags)
            plans.append(plan)

            def search(work: Work) -> str:
                work.message = "loading the model"
                pipe = self._bench.desk.pipe()
                work.message = ""
                found.extend(plan.run(pipe))
                return f"{len(found)} images found"

            started.append(self._bench.desk.start("searching", search))

        said = attempt(start)
        if not started:
            yield [gr.skip(), gallery.message(*said), gr.skip()]
            return
        line = gallery.commands(plans[0].command)
        for work in self._bench.follow(started[0]):
            yield [gr.skip(), gallery.progress(work), line]
        if found:
            shown = [(x.picture, label(x)) for x in found if x.picture is not None]
            yield [shown, gr.skip(), gr.skip()]


def label(found: Found) -> str:
    """Rank, file and score."""
    hit = found.hit
    return f"{hit.rank}. {hit.id} ({hit.score:.3f})"
