"""The panel in which the model writes and judges captions of the Caption tab."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from vlv.errors import ConfigError
from vlv.ui import gallery
from vlv.ui.captioning import CaptionPlan, Writing
from vlv.ui.doubts import VerifyPlan, settings_of
from vlv.ui.workbench import LATER, NOW, SCOPES, Values, attempt

if TYPE_CHECKING:
    from vlv.ui.caption_tab import CaptionTab
    from vlv.ui.desk import Work
    from vlv.ui.view import View
    from vlv.ui.workbench import Workbench

ON_EXISTING = [
    ("keep captions that exist", "skip"),
    ("replace them", "overwrite"),
    ("add a line", "append"),
]


class WritingPanel:
    """Builds the panel and answers its events.

    Args:
        tab: Whose images.
        bench: What all tabs share.
    """

    def __init__(self, tab: CaptionTab, bench: Workbench) -> None:
        self._tab, self._bench = tab, bench
        self._build()

    def _build(self) -> None:
        with gr.Accordion("Let the model write captions", open=True):
            with gr.Row(elem_classes="vlv-row"):
                self.scope = gr.Radio(SCOPES, value="this image", label="Of")
                self.existing = gr.Radio(ON_EXISTING, value="skip", label="Where there is one")
                self.target = gr.Textbox(
                    ".txt",
                    label="Keep captions in",
                    info=".txt beside each image, or a table: captions.jsonl",
                )
            with gr.Row(elem_classes="vlv-row"):
                self.words = gr.Number(
                    0, label="Most words", info="0: no limit", precision=0, minimum=0, min_width=110
                )
                self.trigger = gr.Textbox(label="Trigger word", min_width=110)
                self.prefix = gr.Textbox(label="Text before", min_width=110)
                self.suffix = gr.Textbox(label="Text behind", min_width=110)
                self.temperature = gr.Number(
                    0,
                    label="Temperature",
                    info="0: the likeliest",
                    minimum=0,
                    step=0.1,
                    min_width=110,
                )
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)
                self.verify = gr.Number(
                    0,
                    label="Best of",
                    info="0: one, not verified",
                    precision=0,
                    minimum=0,
                    min_width=110,
                )
            with gr.Row(elem_classes="vlv-row"):
                self.write = gr.Button(
                    "Write captions (w)", variant="primary", elem_id="vlv-write", min_width=140
                )
                self.judge = gr.Button("Check the whole folder", elem_id="vlv-judge", min_width=140)
                self.stop = gr.Button("Stop", variant="stop", elem_id="vlv-stop", min_width=90)
            self.progress = gr.HTML(js_on_load=None, apply_default_css=False)
            self.command = gr.HTML(js_on_load=None, apply_default_css=False)
        self.writing = [
            self.scope,
            self.existing,
            self.target,
            self.words,
            self.trigger,
            self.prefix,
            self.suffix,
            self.temperature,
            self.seed,
            self.verify,
        ]

    @property
    def given(self) -> Values:
        """What a command depends on: the view and the form."""
        return [self._tab.view, *self.writing]

    def wire(self) -> None:
        """Answer events, once the whole tab is built."""
        tab, changes = self._tab, [x.change for x in self.writing]
        self.target.submit(self._keep_in, self.given, tab.screen, **NOW)
        gr.on(changes, self.show_command, self.given, [self.command], **NOW)
        given = [tab.view, tab.editor, tab.of, *self.writing]
        outputs = [self.progress, self.command, *tab.screen]
        for button, work in ((self.write, self._write), (self.judge, self._judge)):
            event = button.click(work, given, outputs, **LATER)
            event.then(self._settle, [tab.view, tab.editor, tab.of], tab.screen, **NOW)
        self.stop.click(self._bench.stop, None, None, **NOW)

    def _keep_in(self, view: View, *given: Any) -> Values:
        """Read and save captions elsewhere."""
        wish = Writing(*given)
        settings = wish.settings(self._bench.flags, self._bench.dtype)
        return self._tab.show(view, attempt(lambda: view.keep_in(wish.target, settings)))

    def show_command(self, view: View, *given: Any) -> str:
        """The command line that writes the same captions, or why there is none."""
        if view.album is None:
            return ""
        lines: list[str] = []
        said = attempt(lambda: lines.append(self._plan(view, given).command))
        return gallery.commands(*lines) if lines else gallery.message(*said)

    def _plan(self, view: View, given: tuple[Any, ...]) -> CaptionPlan:
        return Writing(*given).plan(view, self._bench)

    def _write(self, view: View, text: str, of: str, *given: Any) -> Iterator[Values]:
        """Have the model write captions."""

        def start() -> Work:
            view.save(text, of)
            wish = Writing(*given)
            view.keep_in(wish.target, wish.settings(self._bench.flags, self._bench.dtype))
            plan = self._plan(view, given)
            view.opened.close()  # the job writes to the same table
            return self._bench.desk.start("captioning", partial(plan.run, self._bench.desk))

        yield from self._long(view, start, self.show_command(view, *given))

    def _judge(self, view: View, text: str, of: str, *given: Any) -> Iterator[Values]:
        """Have the model judge all captions of the folder."""
        plans: list[VerifyPlan] = []

        def start() -> Work:
            view.save(text, of)
            wish = Writing(*given)
            view.keep_in(wish.target, wish.settings(self._bench.flags, self._bench.dtype))
            plans.append(self._verify_plan(view, wish.target))
            view.opened.close()
            return self._bench.desk.start("judging", partial(plans[0].run, self._bench.desk))

        said = attempt(lambda: plans.append(self._verify_plan(view, Writing(*given).target)))
        command = gallery.commands(plans.pop().command) if plans else gallery.message(*said)
        yield from self._long(view, start, command)

    def _verify_plan(self, view: View, target: str) -> VerifyPlan:
        album, bench = view.opened, self._bench
        is_table = target.endswith(".jsonl")
        if not is_table and target.strip() not in (".txt", "txt"):
            raise ConfigError(
                f"vlv verify reads .txt files beside images, and tables; captions in {target} cannot be checked"
            )
        settings = settings_of(bench.flags, bench.dtype)
        captions = album.folder / target if is_table else None
        return VerifyPlan(album.folder, album.recursive, captions, settings, bench.flags)

    def _long(self, view: View, start: Callable[[], Work], command: str) -> Iterator[Values]:
        """Long work of the model: progress above, captions on the page as they come."""
        started: list[Work] = []
        said = attempt(lambda: started.append(start()))
        unchanged = [gr.skip()] * (len(self._tab.screen) - 2)
        for work in self._bench.follow(started[0]) if started else ():
            if work.is_running:
                view.opened.forget(number for _, number in view.on_page())
                cards = gallery.cards(view)
                yield [gallery.progress(work), command, gr.skip(), cards, *unchanged]
        shown = gallery.progress(started[0]) if started else gallery.message(*said)
        yield [shown, command, *[gr.skip()] * len(self._tab.screen)]

    def _settle(self, view: View, text: str, of: str) -> Values:
        """Show what long work has left, without touching what was typed meanwhile."""
        is_edited = view.is_edited(text, of)
        if view.album is not None:
            view.refresh()
        values = self._tab.show(view)
        if is_edited:
            values[3] = text
        return values

    def resume(self) -> Iterator[str]:
        """Show work that runs already, in a page that was loaded again."""
        work = self._bench.desk.work
        for running in self._bench.follow(work) if work is not None else ():
            yield gallery.progress(running)
