"""``vlv convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlv.cli import common
from vlv.cli.options import takes_numbers

WrittenDType = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights written.")
]

app = typer.Typer(
    name="convert",
    help="Turn checkpoints of other code, and adapters, into models.",
    no_args_is_help=True,
)


@app.callback()
def _group() -> None:
    """Turn checkpoints of other code, and adapters, into models."""


@app.command()
@takes_numbers
def official(
    checkpoint: Annotated[
        Path, typer.Argument(help="A .safetensors, .bin or .pt file, an index, or a folder.")
    ],
    output: Annotated[Path, typer.Argument(help="Model folder that is written.")],
    florence: Annotated[Path, typer.Option(help="Folder of Florence-2.")],
    diffusion: Annotated[Path, typer.Option(help="Folder of Stable Diffusion.")],
    llm: Annotated[
        Path | None, typer.Option(help="Folder of the language model; stage 2 needs it.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Side of the images; 384 or the U-Net's, if smaller.")
    ] = None,
    dtype: WrittenDType = "float32",
) -> int:
    """Convert a checkpoint of the VLV authors' code, of stage 1 or stage 2.

    The report says what was used and where the rest came from; nothing is written when a trained part
    is missing or does not fit.
    """
    import torch

    from vlv.models.official import Components, convert_official

    report = convert_official(
        checkpoint,
        Components(florence, diffusion, llm),
        output,
        image_size=image_size,
        dtype=getattr(torch, dtype),
    )
    for line in report.lines():
        typer.echo(line)
    common.say(f"-> {output}")
    return 0


@app.command()
@takes_numbers
def adapter(
    adapter: Annotated[str, typer.Argument(help="Folder of a LoRA adapter, or OWNER/NAME.")],
    output: Annotated[Path, typer.Argument(help="Model folder that is written.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The base of the adapter.")],
    revision: common.Revision = None,
    dtype: WrittenDType = "float32",
) -> int:
    """Merge a LoRA adapter with its base into a model of its own, which needs neither."""
    import torch

    from vlv.models.components import check_replaceable
    from vlv.models.pipeline import VLVPipeline

    check_replaceable(output)
    pipe = VLVPipeline.from_pretrained(model, revision=revision, adapter=adapter)
    pipe.save_pretrained(output, dtype=None if dtype == "float32" else getattr(torch, dtype))
    common.say(f"-> {output}")
    return 0
