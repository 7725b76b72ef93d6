"""What an experiment looks at: images with what is known about them, from the toy world or from files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlv.data.foreign import decode_text, parse_object, read_file
from vlv.data.framing import frame
from vlv.data.records import Columns, Record
from vlv.data.source import find_records
from vlv.errors import ConfigError, DataError
from vlv.jobs.caption_files import names_of
from vlv.models.arguments import whole_number
from vlv.storage import Json
from vlv.toyworld.render import render
from vlv.toyworld.scene import MOST_SCENES, Scene, Split, sample_scene
from vlv.toyworld.writing import describe

_MAX_BYTES = 2**31  # of a file of JSON lines


@dataclass(frozen=True, slots=True)
class Sample:
    """One image.

    Attributes:
        id: Unique in its data set.
        seed: Of whatever is sampled for it, in every run.
        references: Captions that are right, by whoever wrote the data set; may be none.
        scene: The whole truth, in the toy world.
        load: Opens the image, upright and RGB.
    """

    id: str
    seed: int
    references: tuple[str, ...]
    scene: Scene | None
    load: Callable[[], Image.Image]

    @property
    def known_scene(self) -> Scene:
        """The scene.

        Raises:
            ConfigError: The truth is not known.
        """
        if self.scene is None:
            raise ConfigError(
                f"the truth of {self.id} is not known, as it is in the toy world only; use another judge or source"
            )
        return self.scene

    def square(self, side: int) -> Image.Image:
        """The image, centre-cropped and resized (Lanczos) to a square."""
        image = self.load()
        return image if image.size == (side, side) else frame(image, side)


@dataclass(frozen=True, slots=True)
class DataSet:
    """Which samples, as settings that JSON can hold; the same settings give the same samples.

    Attributes:
        split: Of the toy world; None takes files.
        seed: Of the scenes, and of what is sampled for each image.
        num: How many; None is all files.
        inputs: Files and folders of images, as `find_records` takes them.
        references: A file with right captions, see `read_references`.
        image_root: Folder below which the images of a table may lie, beside its own.
    """

    split: Split | None = "test"
    seed: int = 1
    num: int | None = 1000
    inputs: tuple[str, ...] = ()
    references: str | None = None
    image_root: str | None = None

    def __post_init__(self) -> None:
        if (self.split is None) == (not self.inputs):
            raise ConfigError("name either a split of the toy world or files, one of the two")
        if self.num is not None:
            whole_number("num", self.num, 1, MOST_SCENES)

    def samples(self) -> list[Sample]:
        """The samples; images are rendered or opened when they are asked for.

        Raises:
            DataError: There is no image, or the references belong to other images.
        """
        if self.split is not None:
            return [_rendered(self.split, self.seed, index) for index in range(self.num or 0)]
        columns = Columns(image_root=self.image_root)
        records = find_records(list(self.inputs), columns=columns)[: self.num]
        if not records:
            raise DataError(f"there is no image in {', '.join(self.inputs)}")
        texts = {} if self.references is None else read_references(Path(self.references))
        samples = [
            Sample(
                id=record.id,
                seed=int(np.random.default_rng([self.seed, number, 1]).integers(2**62)),
                references=_captions_of(record, texts),
                scene=None,
                load=record.load,
            )
            for number, record in enumerate(records)
        ]
        if texts and not any(sample.references for sample in samples):
            raise DataError(
                f"{self.references} has captions for {next(iter(texts))} and others, but for none of the images such as "
                f"{samples[0].id}; name the file that belongs to them"
            )
        return samples


def _rendered(split: Split, seed: int, index: int) -> Sample:
    scene = sample_scene(seed, index, split)
    rng = np.random.default_rng([seed, index, 1])
    caption = describe(scene, "detailed", rng)
    return Sample(
        id=f"{split}-{index:07d}",
        seed=int(rng.integers(2**62)),
        references=(caption,),
        scene=scene,
        load=lambda: Image.fromarray(_render(split, seed, index)),
    )


@lru_cache(maxsize=4096)
def _render(split: Split, seed: int, index: int) -> NDArray[np.uint8]:
    """A rendered scene; several judges look at the same."""
    return render(sample_scene(seed, index, split)).image


def _captions_of(record: Record, texts: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    for name in names_of(record.id):
        if name in texts:
            return tuple(texts[name])
    return () if record.caption is None or texts else (record.caption,)


def read_references(path: Path) -> dict[str, list[str]]:
    """Captions by file name: COCO's annotation file (.json), or JSON lines with ``id`` and ``caption`` or ``captions``.

    Raises:
        DataError: The file cannot be read, or has another form.
    """
    found: defaultdict[str, list[str]] = defaultdict(list)
    try:
        if path.suffix == ".jsonl":
            for row in read_rows(path):
                captions = row["captions"] if "captions" in row else [row["caption"]]
                found[str(row["id"])] += map(str, captions)
            return dict(found)
        content = json.loads(path.read_text("utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        for annotation in content["annotations"]:
            found[names[annotation["image_id"]]].append(str(annotation["caption"]))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} holds no captions ({type(error).__name__}: {error}); it must be COCO's annotation file, or JSON lines "
            "with id and caption"
        ) from error
    return dict(found)


def read_rows(path: Path) -> list[Json]:
    """The objects of a file of JSON lines.

    Raises:
        DataError: The file cannot be read, or a line is no JSON object.
    """
    lines = decode_text(read_file(path, _MAX_BYTES), path).split("\n")  # a text may hold U+2028
    return [
        parse_object(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
