"""``vlv tour``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlv.cli import common


def tour(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the documentation.")
    ] = Path("docs"),
    model: common.Model = common.SHIPPED_MODEL,
    revision: common.Revision = None,
    steps: common.Steps = 20,
    guidance: common.Guidance = 2.0,
    seed: common.Seed = 0,
) -> int:
    """Write the generated pages of the documentation: tour.md with its pictures, and settings.md.

    The tour follows one image through every tensor of a model; the other page lists the settings of training. Where
    the folder lies beside a README.md with a table of figures, that table is renewed from the model's evaluation.json.
    """
    from vlv.models.folder import find_folder
    from vlv.tour.figures import BEGIN, write_figures
    from vlv.tour.page import TourSettings, write_tour
    from vlv.tour.settings import write_settings

    pipe = common.load_pipeline(
        model, ["caption", "reconstruct"], revision=revision, placement=common.placement("cpu")
    )
    settings = TourSettings(model=model, seed=seed, steps=steps, guidance=guidance)
    typer.echo(write_tour(pipe, output, settings))
    typer.echo(write_settings(output))
    readme = output.resolve().parent / "README.md"
    evaluation = find_folder(model, revision=revision) / "evaluation.json"
    if evaluation.is_file() and readme.is_file() and BEGIN in readme.read_text("utf-8"):
        typer.echo(write_figures(readme, evaluation))
    return 0
