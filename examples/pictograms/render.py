"""Pictures and their words into tar shards: `python -m examples.pictograms.render PACKAGES OUT`.

    train/         seen concepts in the styles for training, several copies of each, placed and coloured differently
    val-style/     seen concepts in the style for validation          val-concepts/   unseen ones in the training styles
    test-style/    seen concepts in a style that nothing has looked at    test-concepts/  unseen ones in the training styles
    test-both/     unseen concepts in that style

Whole shards that are there are kept; the same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from examples.pictograms.concepts import Concept, drawings, read_concepts
from examples.pictograms.drawing import compose, draw, place
from examples.pictograms.fetch import Package, packages
from PIL import Image

from vlv.data.shards import TarShardWriter, shard_path
from vlv.errors import DataError, OutputError, VLVError
from vlv.progress import Progress, say
from vlv.storage import check_settings, read_settings, write_json

MANIFEST = "pictograms.json"
SPLITS = ("train", "val-style", "val-concepts", "test-style", "test-concepts", "test-both")


@dataclass(frozen=True, slots=True)
class Layout:
    """What is rendered; the same layout and packages give the same bytes."""

    copies: int = 4
    """Of each picture for training; the first is upright."""
    per_shard: int = 2000
    per_set: int | None = None
    """Most pictures of each set but training, drawn by a hash; None takes all."""


@dataclass(frozen=True, slots=True)
class Item:
    """One picture to be made."""

    style: Package
    concept: Concept
    copy: int

    @property
    def key(self) -> str:
        """Of its record."""
        return f"{self.style.style}-{self.concept.code.lower()}-{self.copy}"

    def rng(self) -> np.random.Generator:
        """Of its placement: of its key alone."""
        return np.random.default_rng(int(hashlib.sha256(self.key.encode()).hexdigest()[:12], 16))


def split_of(style: Package, concept: Concept) -> str | None:
    """The set that a concept in a style belongs to; None is none."""
    if style.split == "train":
        return "train" if concept.seen == "seen" else f"{concept.seen}-concepts"
    if concept.seen == "seen":
        return f"{style.split}-style"
    return "test-both" if style.split == concept.seen == "test" else None


def plan(
    found: Mapping[str, Mapping[str, bytes]], concepts: Sequence[Concept], layout: Layout
) -> dict[str, list[Item]]:
    """The pictures of every set; those of the training set are shuffled, so that a shard has something of everything.

    Args:
        found: Of every style, the codes of the concepts that it has.
        concepts: All of them.
        layout: How many copies, and how many pictures at most.
    """
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for style in packages("pictures"):
        for concept in concepts:
            split = split_of(style, concept)
            if split is None or concept.code not in found.get(str(style.style), {}):
                continue
            copies = layout.copies if split == "train" else 1
            items[split] += [Item(style, concept, copy) for copy in range(copies)]
    for split, each in items.items():
        each.sort(key=lambda item: hashlib.sha256(item.key.encode()).hexdigest())
        if split != "train" and layout.per_set is not None:
            del each[layout.per_set :]
    return items


def describe(item: Item, background: str) -> dict[str, object]:
    """What is known about a picture: all that its texts are made of."""
    return {
        "concept": item.concept.code,
        "label": item.concept.label,
        "tags": list(item.concept.tags),
        "group": item.concept.group,
        "style": item.style.style,
        "form": item.style.form,
        "background": background,
    }


def record(item: Item, drawing: Image.Image) -> dict[str, bytes | str | Mapping[str, object]]:
    """The picture, its name, and what is known about it."""
    how = place(item.rng(), varied=item.copy > 0)
    picture = compose(drawing, how)
    png = io.BytesIO()
    picture.save(png, "png")
    return {
        "png": png.getvalue(),
        "txt": item.concept.label,
        "json": describe(item, how.background),
    }


def render(source: Path, out: Path, layout: Layout) -> dict[str, int]:
    """Render all sets; returns how many pictures each has.

    Raises:
        DataError: A package is missing, or a picture cannot be drawn.
        OutputError: The folder holds something else, or the disk refuses.
    """
    claim(out, layout)
    concepts = read_concepts(source)
    styles = packages("pictures")
    found = {str(style.style): drawings(style, source, concepts) for style in styles}
    items = plan(found, concepts, layout)
    drawn: dict[tuple[str, str], Image.Image] = {}
    progress = Progress(sum(map(len, items.values())), what="pictures", unit="picture")
    for split, each in items.items():
        for number, shard in enumerate(shards_of(each, layout.per_shard)):
            if not shard_path(out / split, number, split).exists():
                write_shard(out / split, split, number, shard, found, drawn)
            progress.advance(len(shard))
    progress.close()
    return {split: len(each) for split, each in items.items()}


def claim(out: Path, layout: Layout) -> None:
    """Write down what the folder will hold, or refuse one that holds something else."""
    mend = "name another folder, or delete this one"
    known = read_settings(out / MANIFEST, mend="delete the folder")
    if known is not None:
        check_settings(out, known, asdict(layout), mend=mend)
    elif out.exists() and any(out.iterdir()):
        raise OutputError(f"{out} holds files but no {MANIFEST} that says what they are; {mend}")
    else:
        write_json(out / MANIFEST, asdict(layout))


def shards_of(items: Sequence[Item], per_shard: int) -> Iterator[Sequence[Item]]:
    """Runs of as many items as a shard holds."""
    for start in range(0, len(items), per_shard):
        yield items[start : start + per_shard]


def write_shard(
    folder: Path,
    split: str,
    number: int,
    items: Sequence[Item],
    found: Mapping[str, Mapping[str, bytes]],
    drawn: dict[tuple[str, str], Image.Image],
) -> None:
    """One shard; files that are drawn are kept in `drawn` for their other copies."""
    with TarShardWriter(folder, split, len(items), index=number) as writer:
        for item in items:
            key = str(item.style.style), item.concept.code
            if key not in drawn:
                try:
                    drawn[key] = draw(found[key[0]][key[1]])
                except DataError as error:
                    raise DataError(f"{item.key}: {error}") from error
            writer.write(item.key, record(item, drawn[key]))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "packages", type=Path, help="folder of `python -m examples.pictograms.fetch`"
    )
    parser.add_argument("out", type=Path, help="folder of the shards")
    parser.add_argument(
        "--copies", type=int, default=Layout().copies, help="of each training picture"
    )
    given = parser.parse_args(argv)
    try:
        counts = render(given.packages, given.out, Layout(given.copies))
    except VLVError as error:
        say(f"render: {error}")
        return 1
    say(", ".join(f"{split} {count}" for split, count in counts.items()) + f" -> {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
