"""How many images each rule took: as a table in words, as JSON values and as a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlv.curation import rules
from vlv.data.records import DUPLICATE_KEY, MISSING_IMAGE, NOT_DOWNLOADED, REFUSED, UNREADABLE
from vlv.pages import charts
from vlv.storage import Json, write_text

PLOT_NAME = "summary.svg"
"""No PNG: beside the shards it would be taken for an image of the collection."""

FAULTS = (REFUSED, NOT_DOWNLOADED, DUPLICATE_KEY, MISSING_IMAGE, UNREADABLE)
"""No image was there to judge."""

REASONS = (
    *FAULTS[:4],
    "watermark",
    "nsfw",
    "aesthetic",
    rules.LANGUAGE,
    FAULTS[4],
    rules.SHORT_SIDE,
    rules.ASPECT,
    rules.COMPRESSION,
    rules.FLAT,
    rules.CAPTION,
    rules.EXACT,
    rules.NEAR,
    rules.ALIKE,
)
"""In the order in which the rules look."""

_WORDS = {name: name.replace("_", " ") for name in REASONS}


@dataclass
class Summary:
    """What a job did.

    Attributes:
        images: Records of the inputs, with those that turned out to be none.
        kept: Images in the shards.
        dropped: Reason to number of images, in the order in which the rules look; 0 is left out.
        damaged_files: Files of the inputs that are damaged; what is whole in them was used.
        shards: Number of shards.
        bytes: Of the images in the shards.
        splits: Folder to number of images, where there are several.
    """

    images: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    damaged_files: int = 0
    shards: int = 0
    bytes: int = 0
    splits: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> Json:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Json) -> Summary:
        """From what `to_dict` gave; other values are passed over."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @property
    def faults(self) -> int:
        """Images and files that are damaged; what was never downloaded is no fault of the data."""
        broken = (self.dropped.get(name, 0) for name in FAULTS if name != NOT_DOWNLOADED)
        return sum(broken) + self.damaged_files

    @property
    def exit_code(self) -> int:
        """0 when every record was whole, 2 when some were damaged."""
        return 2 if self.faults else 0

    def steps(self) -> list[tuple[str, int, int]]:
        """Reason, images that it took, and images left after it."""
        left, steps = self.images, []
        for reason in sorted(self.dropped, key=REASONS.index):
            left -= self.dropped[reason]
            steps.append((reason, self.dropped[reason], left))
        return steps

    def table(self) -> str:
        """The table that is printed."""
        lines = [f"{'':<24}{'dropped':>10}{'left':>10}{'share':>9}"]
        lines.append(f"{'images':<24}{'':>10}{self.images:>10}{'':>9}")
        for reason, count, left in self.steps():
            share = f"{100 * count / max(self.images, 1):.2f} %"
            lines.append(f"{_WORDS[reason]:<24}{count:>10}{left:>10}{share:>9}")
        share = f"{100 * self.kept / max(self.images, 1):.2f} %"
        lines.append(f"{'kept':<24}{'':>10}{self.kept:>10}{share:>9}")
        for name, count in self.splits.items():
            share = f"{100 * count / max(self.kept, 1):.2f} %"
            lines.append(f"{'  ' + name:<24}{'':>10}{count:>10}{share:>9}")
        return "\n".join(lines)


def draw(summary: Summary, path: Path) -> None:
    """Draw what each rule took as an SVG; the same counts give the same bytes.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    steps = summary.steps()
    names = ["images", *(_WORDS[reason] for reason, _, _ in steps), "kept"]
    left = [summary.images, *(left for _, _, left in steps), summary.kept]
    taken = [0, *(count for _, count, _ in steps), 0]
    figure, (axes,) = charts.new_chart(8, 1 + 0.38 * len(names))
    axes.barh(names, left, color=["#4a6fa5", *["#b8c6db"] * len(steps), "#3b7d4f"])
    axes.barh(names, taken, left=left, color="#c8553d")
    for place, (count, rest) in enumerate(zip(taken, left, strict=True)):
        share = f"{100 * count / max(summary.images, 1):.1f} %"
        text = f"-{count:,} ({share})" if count else f"{rest:,}"
        axes.annotate(text, (rest + count, place), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, max(1, summary.images) * 1.2)
    axes.set_xlabel("images: left after each rule, and taken by it")
    write_text(path, charts.svg(figure, alone=True))
