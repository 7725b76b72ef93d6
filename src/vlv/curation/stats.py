"""What a collection looks like: sizes, shapes, captions, some of its images; as JSON and as one HTML page."""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vlv.curation.caption_stats import PAPER_MEAN, PAPER_MEDIAN, CaptionStats, add_sums, counter_of
from vlv.curation.engine import Engine
from vlv.curation.inputs import SequentialReader, image_parts
from vlv.data.images import DEFAULT_LIMITS, load_image, read_header
from vlv.data.parts import Part
from vlv.data.records import NOT_DOWNLOADED, UNREADABLE, Record
from vlv.errors import ConfigError, DataError
from vlv.pages import image_uri
from vlv.storage import Json

SIDE_STEP = 32  # pixels; a bin of the histograms of width and height
RATIO_STEPS = 8  # bins for each doubling of width / height
THUMBNAIL = 160
_TEXTS = 256  # captions that a tokenizer reads together


@dataclass(frozen=True)
class Sample:
    """One image for the page.

    Attributes:
        order: The samples with the least are shown; a hash of seed and id.
        id: Of the record.
        caption: Of the record.
        size: As in 640 x 480.
        uri: The thumbnail as a data URI.
    """

    order: str
    id: str
    caption: str
    size: str
    uri: str


@dataclass
class Stats:
    """Sums over a collection.

    Attributes:
        images: Readable images.
        faults: What cannot be read, by kind.
        bytes: Of the images.
        formats: Of the files.
        sides: (width, height) in steps of 32 pixels to number of images.
        ratios: log2(width / height) in steps of 1/8 to number of images.
        at_most_2_to_1: Images whose longer side is at most twice the shorter.
        short_sides: The shorter side in pixels to number of images.
        captions: See `CaptionStats`.
        samples: Some images.
    """

    images: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    sides: Counter[tuple[int, int]] = field(default_factory=Counter)
    ratios: Counter[int] = field(default_factory=Counter)
    at_most_2_to_1: int = 0
    short_sides: Counter[int] = field(default_factory=Counter)
    captions: CaptionStats = field(default_factory=CaptionStats)
    samples: list[Sample] = field(default_factory=list)

    def merge(self, other: Stats, num_samples: int) -> None:
        """Add the sums of another part."""
        add_sums(self, other)
        self.samples = sorted(self.samples, key=_order)[:num_samples]

    @property
    def exit_code(self) -> int:
        """0 when everything could be read, 2 otherwise."""
        return 2 if sum(self.faults.values()) - self.faults[NOT_DOWNLOADED] else 0

    def to_dict(self) -> Json:
        """As JSON values."""
        above = sum(count for side, count in self.short_sides.items() if side > 512)
        return {
            "images": self.images,
            "not_readable": dict(sorted(self.faults.items())),
            "bytes": self.bytes,
            "bytes_per_image": self.bytes / max(self.images, 1),
            "formats": dict(sorted(self.formats.items())),
            "short_side_median": _median(self.short_sides),
            "share_short_side_above_512": above / max(self.images, 1),
            "share_aspect_ratio_0.5_to_2": self.at_most_2_to_1 / max(self.images, 1),
            "sizes": {f"{w}x{h}": count for (w, h), count in sorted(self.sides.items())},
            "aspect_ratios": {
                f"{2 ** (step / RATIO_STEPS):.3f}": n for step, n in sorted(self.ratios.items())
            },
            **self.captions.to_dict(),
        }

    def lines(self) -> list[str]:
        """The figures that are printed."""
        figures = self.to_dict()
        lines = [
            f"{self.images} images, {self.bytes / 1e6:.1f} MB, median of the shorter side "
            f"{figures['short_side_median']} pixels"
        ]
        lines += [
            f"{kind.replace('_', ' ')}: {count}" for kind, count in sorted(self.faults.items())
        ]
        if not self.captions.captions:
            return [*lines, "no image has a caption"]
        lines.append(
            f"{self.captions.captions} captions, {figures['vocabulary']} different words, "
            f"{figures['captions_that_repeat_a_sentence']} repeat a sentence, "
            f"{figures['captions_that_occur_again']} occur again"
        )
        for name, row in figures["lengths"].items():
            share = 100 * row["share_170_to_280"]
            lines.append(
                f"tokens ({name}): mean {row['mean']:.1f}, median {row['median']}, {share:.1f} % in 170 to 280"
            )
        return [
            *lines,
            f"the paper's captions: mean {PAPER_MEAN}, median {PAPER_MEDIAN}, most in 170 to 280",
        ]


def _median(counts: Counter[int]) -> int:
    left = counts.total() // 2
    for value in sorted(counts):
        left -= counts[value]
        if left < 0:
            return value
    return 0


def _order(sample: Sample) -> tuple[str, str]:
    return sample.order, sample.id


@dataclass(frozen=True)
class StatsTask:
    """One part to count.

    Attributes:
        part: What to read.
        tokenizers: Names, see `counter_of`.
        num_samples: Images to return at most.
        seed: Of the choice of samples.
    """

    part: Part
    tokenizers: tuple[str, ...]
    num_samples: int
    seed: int


def collect(
    inputs: Sequence[str],
    engine: Engine,
    *,
    tokenizers: Sequence[str],
    num_samples: int = 24,
    seed: int = 0,
    report: Callable[[str, int, int], None] = lambda what, done, of: None,
    image_root: str | None = None,
) -> Stats:
    """Count a collection; the result does not depend on the number of workers.

    Images that a table names lie below its folder, or below `image_root`.

    Raises:
        ConfigError: A tokenizer is named twice or cannot be loaded.
        DataError: The inputs are missing or empty.
    """
    if len(set(tokenizers)) < len(tokenizers):
        raise ConfigError(f"a tokenizer is named twice: {', '.join(tokenizers)}; name each once")
    for name in tokenizers:
        counter_of(name)  # complain now
    parts = image_parts(inputs, image_root)
    tasks = [StatsTask(part, tuple(tokenizers), num_samples, seed) for part in parts]
    total = Stats()
    report("counted", 0, len(tasks))
    for number, stats in enumerate(engine.run(count_part, tasks), 1):
        total.merge(stats, num_samples)
        report("counted", number, len(tasks))
    return total


def count_part(task: StatsTask) -> Stats:
    """Count one part: headers, captions, and thumbnails of its samples."""
    stats = Stats()
    chosen: list[tuple[str, Record, int, int]] = []
    texts: list[str] = []
    with SequentialReader(DEFAULT_LIMITS.max_bytes) as reader:
        for record, width, height in _readable(task.part, reader, stats):
            if record.caption:
                texts.append(record.caption)
            else:
                stats.captions.without += 1
            chosen.append((_draw(task.seed, record.id), record, width, height))
            if len(chosen) > 4 * task.num_samples:
                chosen = heapq.nsmallest(task.num_samples, chosen, key=lambda one: one[0])
            if len(texts) >= _TEXTS:
                stats.captions.add(texts, task.tokenizers)
                texts = []
        if texts:
            stats.captions.add(texts, task.tokenizers)
        best = heapq.nsmallest(task.num_samples, chosen, key=lambda one: one[0])
        stats.samples = [sample for one in best if (sample := _sample(reader, *one)) is not None]
    return stats


def _readable(
    part: Part, reader: SequentialReader, stats: Stats
) -> Iterator[tuple[Record, int, int]]:
    """The records with a readable header, counted; the others are counted as faults."""
    for entry in part.entries("all"):
        if not isinstance(entry, Record):
            stats.faults[entry.kind] += 1
            continue
        try:
            data = reader.read(entry.source)
            header = read_header(data, name=entry.name)
        except DataError:
            stats.faults[UNREADABLE] += 1
            continue
        width, height = header.width, header.height
        stats.images += 1
        stats.bytes += len(data)
        stats.formats[header.format] += 1
        stats.sides[_step(width), _step(height)] += 1
        stats.ratios[round(math.log2(width / height) * RATIO_STEPS)] += 1
        stats.at_most_2_to_1 += max(width, height) <= 2 * min(width, height)
        stats.short_sides[min(width, height)] += 1
        yield entry, width, height


def _step(side: int) -> int:
    return side // SIDE_STEP * SIDE_STEP


def _draw(seed: int, key: str) -> str:
    return hashlib.sha256(f"{seed}:{key}".encode("utf-8", "replace")).hexdigest()


def _sample(
    reader: SequentialReader, order: str, record: Record, width: int, height: int
) -> Sample | None:
    """A thumbnail; None where the image cannot be decoded, which `vlv data check` names."""
    try:
        image = load_image(reader.read(record.source), name=record.name)
    except DataError:
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    uri = image_uri(image, "JPEG")
    return Sample(order, record.id, record.caption or "", f"{width} x {height}", uri)


def to_json(stats: Stats) -> str:
    """The figures as the text of a JSON object."""
    return json.dumps(stats.to_dict(), indent=1, ensure_ascii=False) + "\n"
