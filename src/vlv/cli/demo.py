"""``vlv demo``."""

from __future__ import annotations

import sys
import time
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.options import options, takes_options

if TYPE_CHECKING:
    from vlv.demo.cases import Demo, Subject

DEFAULT_NUM = 6


@options
class DemoOptions:
    """Options of ``vlv demo``."""

    files: Annotated[
        list[str] | None, typer.Argument(metavar=r"\[FILE]...", help="More images of your own.")
    ] = None
    images: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="Show your own images instead of scenes."),
    ] = field(default_factory=list)
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page; replaced if it exists.")
    ] = Path("demo.html")
    num: Annotated[
        int | None,
        typer.Option(min=1, help=f"Held-out scenes to show; {DEFAULT_NUM} by default."),
    ] = None
    image_root: common.ImageRoot = None
    model: common.Model = common.SHIPPED_MODEL
    revision: common.Revision = None
    adapter: common.Adapter = None
    device: common.Device = "auto"
    steps: common.Steps = 20
    guidance: common.Guidance = 2.0
    seed: common.Seed = 0


@takes_options
def demo(given: DemoOptions) -> int:
    """Write one HTML page: images, reconstructed, captioned, generated from the captions, and mixed.

    The images are freshly rendered scenes of the toy world that no training has seen, or your own (--images).
    Captions also go to stdout.
    """
    from vlv.demo.cases import Sampling, run
    from vlv.demo.page import make_page, save_page
    from vlv.errors import OutputError
    from vlv.models.folder import find_folder
    from vlv.storage import check_writable

    started = time.monotonic()
    model, output = given.model, given.output
    if output.is_dir():
        raise OutputError(f"{output} is a folder; name the page, such as {output / 'demo.html'}")
    check_writable(output)
    files = [*given.images, *(given.files or [])]
    subjects, num_failed = _subjects(files, given)
    pipe = common.load_pipeline(
        model,
        ["caption", "reconstruct"],
        revision=given.revision,
        adapter=given.adapter,
        placement=common.placement(given.device),
    )
    sampling = Sampling(seed=given.seed, steps=given.steps, guidance=given.guidance)
    result = run(pipe, subjects, sampling, progress=sys.stderr.isatty())
    folder = find_folder(model, revision=given.revision, local_files_only=True)
    page = make_page(result, model, sampling, notes=_notes(model), folder=folder)
    save_page(output, page)
    _print(result)
    common.say(f"{output}: {len(subjects)} images in {time.monotonic() - started:.1f} s")
    return 2 if num_failed else 0


def _subjects(inputs: list[str], given: DemoOptions) -> tuple[list[Subject], int]:
    """The images to show, and how many files were bad."""
    from vlv.data.records import Columns
    from vlv.data.source import find_records
    from vlv.demo.cases import held_out_subjects, own_subjects
    from vlv.errors import ConfigError, DataError

    if not inputs:
        if given.image_root is not None:
            raise ConfigError("--image-root has no effect without images of your own; leave it out")
        return held_out_subjects(given.num or DEFAULT_NUM, given.seed), 0
    if given.num is not None:
        raise ConfigError(
            "--num counts rendered scenes and has no effect on --images; leave it out"
        )
    subjects, errors = own_subjects(
        find_records(inputs, columns=Columns(image_root=given.image_root))
    )
    for error in errors:
        common.say(f"failed: {error}")
    if not subjects:
        raise DataError(f"none of the {len(errors)} images can be read; name others")
    return subjects, len(errors)


def _notes(model: str) -> list[str]:
    if model != common.SHIPPED_MODEL:
        return []
    return [
        "vlv-tiny knows the toy world only: one to three rendered solids on a plain. It shows the method, not "
        "what a real model can do; in any other image it will see spheres, cubes, cylinders and cones."
    ]


def _print(result: Demo) -> None:
    for case in result.cases:
        typer.echo(f"{case.subject.name}\t{' '.join(case.caption.text.split())}")
