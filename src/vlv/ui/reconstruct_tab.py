"""The Reconstruct tab: an image, and what the decoder draws from its caption embedding alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vlv.jobs.images import SampleSettings
from vlv.ui import gallery
from vlv.ui.imaging import FOLDERS, ReconstructPlan
from vlv.ui.workbench import LATER, NOW, Values, attempt

if TYPE_CHECKING:
    from PIL import Image

    from vlv.ui.desk import Work
    from vlv.ui.view import View
    from vlv.ui.workbench import Workbench

Pair = tuple["Image.Image", "Image.Image"]


class ReconstructTab:
    """Builds the tab and answers its events.

    Args:
        bench: What all tabs share.
        view: State of the Caption tab, whose image can be taken.
    """

    def __init__(self, bench: Workbench, view: gr.State) -> None:
        self._bench = bench
        self.image = gr.State("")
        with gr.Row(elem_classes="vlv-main"):
            with gr.Column(scale=2, min_width=280):
                self.drop = gr.File(file_types=["image"], label="Image", height=140)
                self.take = gr.Button("Take the image of the Caption tab", size="sm")
                self.chosen = gr.HTML(js_on_load=None, apply_default_css=False)
                self.sampling = sampling_fields()
                self.draw = gr.Button("Reconstruct", variant="primary", elem_id="vlv-reconstruct")
                self.message = gr.HTML(js_on_load=None, apply_default_css=False)
            with gr.Column(scale=3, min_width=280):
                self.slider = gr.ImageSlider(
                    label="original | reconstruction",
                    type="pil",
                    format="png",
                    interactive=False,
                    elem_id="vlv-slider",
                )
        self.command = gr.HTML(js_on_load=None, apply_default_css=False)
        self._wire(view)

    def _wire(self, view: gr.State) -> None:
        given = [self.image, *self.sampling]
        chosen = [self.image, self.chosen, self.message]
        for event in (
            self.drop.upload(self._drop, [self.drop], chosen, **NOW),
            self.take.click(self._take, [view], chosen, **NOW),
        ):
            event.then(self._show_command, given, [self.command], **NOW)
        gr.on([x.change for x in self.sampling], self._show_command, given, [self.command], **NOW)
        self.draw.click(
            self._draw,
            given,
            [self.slider, self.message, self.command],
            **LATER,
        )

    def _drop(self, file: str | None) -> tuple[str, str, str]:
        kept: list[Path] = []

        def action() -> None:
            folder = self._bench.keep_dropped([file] if file else [])
            kept.extend(folder.iterdir())

        said = attempt(action)
        return chosen(kept[0] if kept else None, said)

    def _take(self, view: View) -> tuple[str, str, str]:
        kept: list[Path] = []
        said = attempt(lambda: kept.extend(view.opened.path(n) for n in view.scope("this image")))
        return chosen(kept[0] if kept else None, said)

    def _plan(self, image: str, given: tuple[Any, ...]) -> ReconstructPlan:
        settings = sample_settings(self._bench, *given)
        folder = self._bench.folder / FOLDERS[0]
        return ReconstructPlan(Path(image), settings, folder, self._bench.flags)

    def _show_command(self, image: str, *given: Any) -> str:
        return gallery.commands(self._plan(image, given).command) if image else ""

    def _draw(self, image: str, *given: Any) -> Iterator[Values]:
        """Draw, and show both."""
        if not image:
            yield [gr.skip(), gallery.message("no image is chosen; drop one first", "error"), ""]
            return
        plan = self._plan(image, given)
        pairs: list[Pair] = []
        started: list[Work] = []

        def draw(work: Work) -> str:
            pairs.append(plan.run(self._bench.desk, work))
            return f"written: {plan.folder}"

        said = attempt(lambda: started.append(self._bench.desk.start("reconstructing", draw)))
        for work in self._bench.follow(started[0]) if started else ():
            yield [gr.skip(), gallery.progress(work), gallery.commands(plan.command)]
        if pairs:
            yield [pairs[0], gallery.progress(started[0]), gr.skip()]
        elif not started:
            yield [gr.skip(), gallery.message(*said), gr.skip()]


def picture_grid(label: str, elem_id: str) -> gr.Gallery:
    """Pictures side by side, as many as fit."""
    return gr.Gallery(
        label=label,
        columns=5,
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],  # and none that shares
        elem_id=elem_id,
        elem_classes="vlv-grid",
    )


def sampling_fields() -> list[gr.components.Component]:
    """Seed, steps, guidance and sampler."""
    with gr.Row(elem_classes="vlv-row"):
        return [
            gr.Number(0, label="Seed", precision=0, minimum=0, min_width=90),
            gr.Number(20, label="Steps", precision=0, minimum=1, maximum=200, min_width=90),
            gr.Number(2.0, label="Guidance", info="1: none", minimum=0, step=0.5, min_width=90),
            gr.Dropdown(["dpm", "ddim", "ddpm"], value="dpm", label="Sampler", min_width=90),
        ]


def sample_settings(
    bench: Workbench, seed: Any, steps: Any, guidance: Any, sampler: Any
) -> SampleSettings:
    """What the form says about sampling; empty fields have their defaults."""
    return SampleSettings(
        bench.flags.name,
        bench.flags.revision,
        int(steps or 20),
        2.0 if guidance is None else float(guidance),
        sampler,
        int(seed or 0),
    )


def chosen(path: Path | None, said: tuple[str, str]) -> tuple[str, str, str]:
    """The chosen image, its name, and what went wrong."""
    name = gallery.message(f"image: {path.name}") if path is not None else ""
    return "" if path is None else str(path), name, gallery.message(*said)
