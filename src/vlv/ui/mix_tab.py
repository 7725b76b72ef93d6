"""The Mix tab: the caption embeddings of several images as one image, or as a path of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vlv.errors import ConfigError
from vlv.ui import gallery
from vlv.ui.imaging import FOLDERS, MOST_FRAMES, MOST_MIXED, MixPlan, mix_of, path_of
from vlv.ui.reconstruct_tab import picture_grid, sample_settings, sampling_fields
from vlv.ui.workbench import LATER, NOW, Values, attempt

if TYPE_CHECKING:
    from PIL import Image

    from vlv.jobs.images import MixSettings
    from vlv.ui.desk import Work
    from vlv.ui.view import View
    from vlv.ui.workbench import Workbench

MODES = [
    ("average: blend by weights", "average"),
    ("slerp: blend on arcs", "slerp"),
    ("concat: join leading tokens", "concat"),
]
MOST_TOKENS = 77


class MixTab:
    """Builds the tab and answers its events.

    Args:
        bench: What all tabs share.
        view: State of the Caption tab, whose marked images can be taken.
    """

    def __init__(self, bench: Workbench, view: gr.State) -> None:
        self._bench = bench
        self.images: gr.State = gr.State([])
        self.negative: gr.State = gr.State("")
        with gr.Row(elem_classes="vlv-main"):
            with gr.Column(scale=3, min_width=280):
                self.drop = gr.File(
                    file_count="multiple",
                    file_types=["image"],
                    label="2 to 4 images, in order",
                    height=140,
                )
                self.take = gr.Button("Take the marked images of the Caption tab", size="sm")
                self.chosen = gr.HTML(js_on_load=None, apply_default_css=False)
                self.mode = gr.Radio(MODES, value="average", label="Mode")
                with gr.Row(elem_classes="vlv-row"):
                    self.weights = [self._weight(n) for n in range(MOST_MIXED)]
                    self.keep = [self._tokens(n) for n in range(MOST_MIXED)]
                self.frames = gr.Number(
                    1,
                    label="Frames of a path",
                    info="1: one mix; more: from the first of two images to the second, all from the same noise",
                    precision=0,
                    minimum=1,
                    maximum=MOST_FRAMES,
                )
                self.drop_negative = gr.File(
                    file_types=["image"],
                    label="Negative image, which no mix must resemble (optional)",
                    height=140,
                )
                self.sampling = sampling_fields()
                with gr.Row(elem_classes="vlv-row"):
                    self.draw = gr.Button(
                        "Mix", variant="primary", elem_id="vlv-mix", min_width=100
                    )
                    self.stop = gr.Button("Stop", variant="stop", min_width=80)
                self.message = gr.HTML(js_on_load=None, apply_default_css=False)
            with gr.Column(scale=4, min_width=280):
                self.drawn = picture_grid("Mixes", "vlv-mixes")
                self.strip = gr.Image(
                    label="Strip",
                    type="pil",
                    format="png",
                    interactive=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                )
        self.command = gr.HTML(js_on_load=None, apply_default_css=False)
        self._wire(view)

    def _weight(self, number: int) -> gr.Slider:
        shown = number < 2
        label = f"Weight {number + 1}"
        return gr.Slider(0, 1, 0.5, step=0.05, label=label, visible=shown, min_width=150)

    def _tokens(self, number: int) -> gr.Slider:
        label = f"Tokens of {number + 1}"
        return gr.Slider(0, MOST_TOKENS, 32, step=1, label=label, visible=False, min_width=150)

    def _wire(self, view: gr.State) -> None:
        sliders = [*self.weights, *self.keep]
        given = [self.images, self.mode, self.frames, self.negative, *sliders, *self.sampling]
        chosen = [self.images, self.chosen, self.message]
        for event in (
            self.drop.upload(self._drop, [self.drop], chosen, **NOW),
            self.take.click(self._take, [view], chosen, **NOW),
            self.mode.change(lambda: None, None, None, **NOW),
        ):
            event.then(self._fit, [self.images, self.mode], sliders, **NOW).then(
                self._show_command, given, [self.command], **NOW
            )
        for event in (self.drop_negative.upload, self.drop_negative.clear):
            event(
                self._bench.keep_one, [self.drop_negative], [self.negative, self.message], **NOW
            ).then(self._show_command, given, [self.command], **NOW)
        changing = [x.change for x in (self.frames, *sliders, *self.sampling)]
        gr.on(changing, self._show_command, given, [self.command], **NOW)
        self.draw.click(
            self._draw,
            given,
            [self.drawn, self.strip, self.message, self.command],
            **LATER,
        )
        self.stop.click(self._bench.stop, None, None, **NOW)

    def _choose(self, paths: list[Path], said: tuple[str, str]) -> tuple[list[str], str, str]:
        if paths and not 2 <= len(paths) <= MOST_MIXED:
            said = f"{len(paths)} images are chosen; a mix takes 2 to {MOST_MIXED}", "error"
            paths = []
        names = ", ".join(f"{n}: {path.name}" for n, path in enumerate(paths, 1))
        return [str(path) for path in paths], gallery.message(names), gallery.message(*said)

    def _drop(self, files: list[str] | None) -> tuple[list[str], str, str]:
        kept: list[Path] = []

        def action() -> None:
            folder = self._bench.keep_dropped(files or [])
            kept.extend(sorted(folder.iterdir()))

        said = attempt(action)
        return self._choose(kept, said)

    def _take(self, view: View) -> tuple[list[str], str, str]:
        kept: list[Path] = []
        said = attempt(lambda: kept.extend(view.opened.path(n) for n in view.scope("marked")))
        return self._choose(kept, said)

    def _fit(self, images: list[str], mode: str) -> Values:
        """One slider for each image, of the kind that the mode reads."""
        count = max(2, len(images))
        pipe = self._bench.desk.ready
        most = (
            MOST_TOKENS if pipe is None or pipe.encoder is None else int(pipe.encoder.num_queries)
        )
        updates = [gr.update(visible=mode != "concat" and n < count) for n in range(MOST_MIXED)]
        for n in range(MOST_MIXED):
            share = most // count + (n < most % count)
            shown = mode == "concat" and n < count
            updates.append(gr.update(visible=shown, maximum=most, value=share))
        return updates

    def _plan(self, images: list[str], mode: Any, frames: Any, rest: tuple[Any, ...]) -> MixPlan:
        negative, *values = rest
        weights, keep = values[:MOST_MIXED], values[MOST_MIXED : 2 * MOST_MIXED]
        hows: tuple[MixSettings, ...] = (mix_of(mode, len(images), weights, keep),)
        if int(frames or 1) > 1:
            if len(images) != 2:
                raise ConfigError(
                    f"a path leads from one image to another; {len(images)} are chosen"
                )
            total = int(sum(keep[:2])) if mode == "concat" else 0
            hows = path_of(mode, int(frames), total)
        settings = sample_settings(self._bench, *values[2 * MOST_MIXED :])
        folder, flags = self._bench.folder / FOLDERS[1], self._bench.flags
        away = Path(negative) if negative else None
        return MixPlan(tuple(map(Path, images)), hows, settings, folder, flags, away)

    def _show_command(self, images: list[str], mode: Any, frames: Any, *rest: Any) -> str:
        if not images:
            return ""
        plans: list[MixPlan] = []
        said = attempt(lambda: plans.append(self._plan(images, mode, frames, rest)))
        return gallery.commands(*plans[0].commands) if plans else gallery.message(*said)

    def _draw(self, images: list[str], mode: Any, frames: Any, *rest: Any) -> Iterator[Values]:
        """Draw, and show the mixes and their strip."""
        plans: list[MixPlan] = []
        drawn: list[Image.Image] = []
        started: list[Work] = []

        def start() -> None:
            plans.append(plan := self._plan(images, mode, frames, rest))

            def draw(work: Work) -> str:
                drawn.extend(plan.run(self._bench.desk, work))
                return f"written: {plan.folder}"

            started.append(self._bench.desk.start("mixing", draw))

        said = attempt(start)
        if not started:
            yield [gr.skip(), gr.skip(), gallery.message(*said), gr.skip()]
            return
        plan = plans[0]
        for work in self._bench.follow(started[0]):
            yield [gr.skip(), gr.skip(), gallery.progress(work), gallery.commands(*plan.commands)]
        if drawn:
            strip = gr.update(
                value=str(plan.strip) if len(drawn) > 1 else None, visible=len(drawn) > 1
            )
            named = [(image, label(how)) for image, how in zip(drawn, plan.hows, strict=True)]
            yield [named, strip, gr.skip(), gr.skip()]


def label(how: MixSettings) -> str:
    """Shares of the images in a mix: weights, or tokens."""
    return " : ".join(f"{share:g}" for share in (how.keep or how.weights or ()))
