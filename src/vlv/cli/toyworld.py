"""``vlv toyworld``: the rendered world, and the small pretrained parts that know it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from vlv.cli import common
from vlv.cli.options import options, takes_numbers, takes_options
from vlv.storage import Json

if TYPE_CHECKING:
    from vlv.toyworld.pretrain import Part, Recipe

app = typer.Typer(
    name="toyworld",
    help="Render the toy world, and pretrain the small parts on it.",
    no_args_is_help=True,
)

SHEET_IMAGES = 48

SizeName = Literal["small", "medium", "large"]
SplitName = Literal["train", "val", "test", "composition", "any"]

Split = Annotated[SplitName, typer.Option(help="Splits share no scene.")]
Num = Annotated[int, typer.Option(min=1, help="Number of scenes.")]


@options
class RenderOptions:
    """Options of ``vlv toyworld render``."""

    out: Annotated[Path, typer.Argument(help="Folder of the tar shards; created.")]
    num: Num
    split: Split = "train"
    seed: common.Seed = 0
    per_shard: Annotated[int, typer.Option(min=1, help="Scenes in a full shard.")] = 1000
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Processes; one for every processor by default."),
    ] = None
    wrong: Annotated[
        float, typer.Option(help="Share of the objects' attributes that captions state wrongly.")
    ] = 0.0
    mistakes: Annotated[
        Literal["random", "systematic"],
        typer.Option(help="Of --wrong: any other value, or always the same one for a value."),
    ] = "random"
    instruct: Annotated[
        bool,
        typer.Option(
            "--instruct",
            help="Also write captions in several styles, and questions with their answers, into the .json of each image.",
        ),
    ] = False
    sheet: Annotated[
        Path | None, typer.Option(help="Also lay the first images out in this FILE.png.")
    ] = None


@app.command()
@takes_options
def render(given: RenderOptions) -> int:
    """Render scenes into tar shards: images, captions and the truth about each.

    Whole shards that are there already are kept: an interrupted command goes on when it is given again.
    """
    from vlv.toyworld.dataset import Layout, render_shards

    layout = Layout(
        given.split,
        given.num,
        given.seed,
        given.per_shard,
        wrong=given.wrong,
        mistakes=given.mistakes,
        instruct=given.instruct,
    )
    try:
        paths = render_shards(given.out, layout, given.workers)
    except KeyboardInterrupt:
        common.say(f"the whole shards in {given.out} are kept; the same command goes on from there")
        raise
    if given.sheet is not None:
        _write_sheet(given.sheet, min(given.num, SHEET_IMAGES), given.seed, given.split)
    common.say(f"{given.num} scenes in {len(paths)} shards -> {given.out}")
    return 0


@app.command()
@takes_numbers
def sheet(
    out: Annotated[Path, typer.Argument(help="FILE.png")],
    num: Annotated[int, typer.Option(min=1, max=10_000, help="Number of scenes.")] = SHEET_IMAGES,
    split: Split = "train",
    seed: common.Seed = 0,
) -> int:
    """Draw the first scenes of a split on one page."""
    _write_sheet(out, num, seed, split)
    return 0


def _write_sheet(out: Path, num: int, seed: int, split: SplitName) -> None:
    from PIL import Image

    from vlv import pages
    from vlv.jobs.pictures import write_png
    from vlv.toyworld.render import render
    from vlv.toyworld.scene import sample_scene

    scenes = (sample_scene(seed, index, split) for index in range(num))
    page = pages.sheet([Image.fromarray(render(scene).image) for scene in scenes], columns=8)
    write_png(out, page, {"split": split, "seed": seed, "num": num})
    typer.echo(out)


@app.command()
@takes_numbers
def describe(
    index: Annotated[int, typer.Option(min=0, help="Number of the scene.")] = 0,
    split: Split = "train",
    seed: common.Seed = 0,
) -> int:
    """Print a scene in words: a caption of every form, and its questions with their answers."""
    import numpy as np

    from vlv.toyworld import writing
    from vlv.toyworld.questions import ask
    from vlv.toyworld.scene import sample_scene

    scene = sample_scene(seed, index, split)
    rng = np.random.default_rng([seed, index])
    for form in writing.FORMS:
        typer.echo(f"{form}: {writing.describe(scene, form, rng)}")
    for question in ask(scene, rng):
        typer.echo(f"{question.kind}: {question.question} {question.answer}")
    return 0


@options
class PretrainOptions:
    """Options of ``vlv toyworld pretrain``."""

    part: Annotated[
        str, typer.Argument(help="inspector, vae, text, unet, florence, llm and others.")
    ]
    data: Annotated[list[Path], typer.Option(help="Rendered shards (repeatable).")]
    models: Annotated[Path, typer.Option(help="Folder of the parts; earlier ones are read there.")]
    run_dir: common.RunDir
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None
    seed: common.Seed = 0
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop and save after this time; the same command goes on."),
    ] = None
    size: Annotated[
        SizeName, typer.Option(help="Of the llm; another is saved as llm-small or llm-large.")
    ] = "medium"
    batch_size: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None
    precision: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="Of the arithmetic, instead of the recipe's; the weights stay float32."),
    ] = None

    def recipe(self) -> Recipe:
        """The part's recipe with what was given in place of its own."""
        from vlv.toyworld.pretrain import recipe_of

        names = ("steps", "batch_size", "precision")
        changes: Json = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(recipe_of(cast("Part", self.part)), **given)


@app.command()
@takes_options
def pretrain(given: PretrainOptions) -> int:
    """Train one of the small parts that play the roles of the downloaded models.

    A part that needs another one, or an unknown name, is answered by the list of all in their order.
    """
    return common.train(lambda: _pretrain(given))


def _pretrain(given: PretrainOptions) -> str:
    from vlv.toyworld.pretrain import pretrain as train_part

    result = train_part(
        cast("Part", given.part),
        given.data,
        given.models,
        given.run_dir,
        recipe=given.recipe(),
        seed=given.seed,
        max_seconds=None if given.max_minutes is None else 60 * given.max_minutes,
        size=given.size,
    )
    return f"{given.part}: {result.step} steps done; the weights are in {given.models}"


@app.command()
def ship(
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    model: Annotated[Path, typer.Option(help="The model folder that stage 2 saved.")],
    parts: Annotated[Path, typer.Option(help="Folder of the pretrained parts.")],
    runs: Annotated[Path, typer.Option(help="Folder that holds the run of every part and stage.")],
    results: Annotated[
        Path | None, typer.Option(help="JSON of vlv eval toyworld, quoted in the model card.")
    ] = None,
    note: Annotated[
        str, typer.Option(help="A sentence for the card on how this training left the recipe.")
    ] = "",
) -> int:
    """Write the model folder that the package ships: half precision, inspector, logs, model card."""
    from vlv.toyworld.ship import ship as write_shipped

    write_shipped(model, parts, runs, out, results, note)
    typer.echo(out)
    return 0
