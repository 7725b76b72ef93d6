"""``vlv info`` and ``vlv doctor``."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlv.cli import common
from vlv.cli.options import takes_numbers

if TYPE_CHECKING:
    from vlv.jobs.model_info import Part


@takes_numbers
def info(
    model: Annotated[
        str,
        typer.Argument(help="vlv-tiny, vlv-3b, a model folder, OWNER/NAME, or a preset of models."),
    ] = common.SHIPPED_MODEL,
    revision: common.Revision = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of a preset: change a part: model.llm=FOLDER (repeatable)."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of a preset: images together, for the memory.")
    ] = None,
) -> int:
    """Show the parts of a model, their sizes and licences, and what it knows.

    Of a preset such as paper also what is downloaded, and how much memory each use will need.
    Nothing is fetched; a model of the hub is looked up among the downloaded ones.
    """
    from vlv.config import model_preset_names
    from vlv.models.folder import released_names

    if model in model_preset_names() or model.endswith((".yaml", ".yml")):
        return _preset(model, overrides or [], batch_size)
    released = model in released_names() and not Path(model).is_dir()
    near = difflib.get_close_matches(model, [*model_preset_names(), *released_names()], n=1)
    if near and not released and not Path(model).exists():
        common.say(f'vlv: there is no model or preset "{model}"; did you mean {near[0]}?')
        return 1
    if overrides or batch_size:
        common.say(
            f"vlv: --set and --batch-size are for presets, and {model} is none; leave them out"
        )
        return 1
    return _released(model, revision) if released else _folder(model, revision)


def _preset(name: str, overrides: list[str], batch_size: int | None) -> int:
    from vlv.config import load_models
    from vlv.jobs.plans import describe_preset, plan_uses

    preset = load_models(name, overrides)
    parts = describe_preset(preset)
    typer.echo(f"{name}  (models to start from; nothing is downloaded to print this)")
    typer.echo(f"  {'part':<20} {'parameters':>11} {'download':>9}  from, and licence")
    for part in parts:
        size = f"{part.download / 1e9:6.2f} GB" if part.download else f"{'-':>9}"
        row = f"  {part.name:<20} {part.num_parameters / 1e6:9.2f} M {size}  {part.source}"
        typer.echo(f"{row}  {part.licence}".rstrip())
    count, download = sum(p.num_parameters for p in parts), sum(p.download for p in parts)
    typer.echo(f"  {'in all':<20} {count / 1e6:9.2f} M {download / 1e9:6.2f} GB")
    typer.echo(
        f"{'memory in GB':<16} {'batch':>6} {'type':<5}" + "".join(f"{n:>12}" for n in _COLUMNS)
    )
    for use in plan_uses(preset, batch_size=batch_size):
        values = (getattr(use.footprint, column) / 1e9 for column in _COLUMNS)
        numbers = "".join(f"{value:12.2f}" for value in values)
        typer.echo(f"  {use.name:<14} {use.batch_size:>6} {use.precision:<5}{numbers}")
    typer.echo(
        "Predicted from shapes; on a GPU the driver and the kernels' workspaces come on top."
    )
    return 0


def _released(name: str, revision: str | None) -> int:
    from vlv.cli.released import describe
    from vlv.models.released import is_cached

    for line in describe(name, revision):
        typer.echo(line)
    return _folder(name, revision) if is_cached(name, revision) else 0


_COLUMNS = ("weights", "gradients", "optimizer", "activations", "peak")


def _folder(model: str, revision: str | None) -> int:
    from vlv.jobs.model_info import describe_model
    from vlv.models.folder import find_folder

    about = describe_model(find_folder(model, revision=revision, local_files_only=True))
    typer.echo(f"{model}  ({about.folder})")
    for part in about.parts:
        typer.echo(_line(part))
    total = sum(part.num_parameters for part in about.parts)
    size = sum(part.num_bytes for part in about.parts)
    typer.echo(f"  {'in all':<16} {'':<28} {total / 1e6:9.2f} M {size / 1e6:9.1f} MB")
    typer.echo(f"licence: {about.licence or 'the model card names none'}")
    typer.echo(f"knows:   {about.knows or 'the model card does not say'}")
    typer.echo(f"can:     {', '.join(about.commands) or 'nothing: parts are missing'}")
    if about.styles:
        typer.echo(f"styles:  {', '.join(about.styles)}  (vlv caption --style NAME)")
    if about.obeys_lengths:
        typer.echo("lengths: as many words as are asked for  (vlv caption --words N)")
    if about.uses_known:
        typer.echo("uses:    what is known about an image  (vlv caption --context-column NAME)")
    if about.answers_questions:
        typer.echo("answers: questions about images  (vlv ask)")
    return 0


def _line(part: Part) -> str:
    if part.reference:
        return f"  {part.name:<16} -> {part.reference}  {part.licence}".rstrip()
    numbers = f"{part.num_parameters / 1e6:9.2f} M {part.num_bytes / 1e6:9.1f} MB"
    return f"  {part.name:<16} {part.kind:<28} {numbers}  {'/'.join(part.dtypes):<5} {part.licence}".rstrip()


def doctor() -> int:
    """Check the installation: versions, extras, the cache of the hub, the device."""
    from vlv.jobs.doctor import examine

    findings = examine()
    for finding in findings:
        mark = "BAD" if not finding.good else "-  " if finding.lacks else "ok "
        typer.echo(f"{mark}  {finding.text}")
    bad = sum(not finding.good for finding in findings)
    lacking = sum(finding.lacks for finding in findings)
    verdict = f"{bad} of {len(findings)} checks failed" if bad else "all is well"
    common.say(f"vlv: {verdict}" + (f"; optional extras missing: {lacking}" if lacking else ""))
    return 1 if bad else 0
