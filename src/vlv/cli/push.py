"""``vlv push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlv.cli import common


def push(
    folder: Annotated[Path, typer.Argument(help="A model folder, or the folder of an adapter.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; created if it is new.")],
    private: Annotated[
        bool | None, typer.Option(help="Of a new repository; by default as its owner has set.")
    ] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a VLV model",
) -> int:
    """Upload a model folder, or an adapter, to the Hugging Face hub, with its card.

    Read the card (README.md in the folder) first: it says what is known of licences, data and figures.
    Log in with `hf auth login`.
    """
    from vlv.jobs.push import push as push_folder
    from vlv.models.folder import find_folder

    pushed = push_folder(
        find_folder(folder, local_files_only=True), repo, private=private, message=message
    )
    if pushed.unknown:
        common.say(
            f"the licence of {', '.join(pushed.unknown)} is unknown: name it in the card before others use the model"
        )
    typer.echo(pushed.address)
    return 0
