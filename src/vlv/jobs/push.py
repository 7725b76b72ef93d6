"""A model folder to the hub, with its card."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vlv.errors import OutputError
from vlv.models.adapter import ABOUT_NAME, read_about
from vlv.models.card import CARD_NAME, read_card, rename_card, unknown_licences
from vlv.models.folder import read_index
from vlv.models.hub import upload


@dataclass(frozen=True)
class Pushed:
    """What was uploaded.

    Attributes:
        address: Of the commit.
        unknown: Parts of which the card says that their licence is unknown.
    """

    address: str
    unknown: list[str]


def push(
    folder: Path, repo: str, *, private: bool | None = None, message: str = "Upload a VLV model"
) -> Pushed:
    """Upload all files of a model folder, or of an adapter, as they are; its card goes under the new name.

    Args:
        folder: A model folder, or an adapter.
        repo: ``owner/name``; created where it does not exist.
        private: Of a created repository; None is the default of its owner.
        message: Of the commit.

    Raises:
        ModelFolderError: The folder is neither.
        OutputError: A part lies elsewhere on this machine, or the hub refuses.
    """
    card = check_card(folder, repo)
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "model"
        shutil.copytree(folder.absolute(), copy, copy_function=os.symlink)
        (copy / CARD_NAME).unlink(missing_ok=True)  # a link to the file in the folder
        (copy / CARD_NAME).write_text(card, encoding="utf-8")
        address = upload(copy, repo, message, private=private, token=None)
    return Pushed(address, unknown_licences(card))


def check_card(folder: Path, repo: str) -> str:
    """The card that goes to the hub, after a look at the folder.

    Raises:
        ModelFolderError: The folder is neither a model nor an adapter.
        OutputError: A part is only named in it, and lies elsewhere on this machine.
    """
    if (folder / ABOUT_NAME).is_file():
        read_about(folder)
    else:
        _check_references(folder)
    card = read_card(folder)
    if card is None:
        raise OutputError(
            f"{folder} has no {CARD_NAME}; write one, or have one written with "
            "VLVPipeline.from_pretrained(...).save_pretrained(...)"
        )
    return rename_card(card, repo)


def _check_references(folder: Path) -> None:
    """Refuse a model whose parts others would not find."""
    index = read_index(folder)
    for part, reference in index.components.items():
        where = str(reference["repo"]) if reference else ""
        if where and (index.folder / where).is_dir():
            raise OutputError(
                f"the part {part} is only named in {folder} and lies in {where}, where nobody else finds it; save the "
                "model with VLVPipeline.save_pretrained(..., references={}) first"
            )
