"""The rules that look at one image: what its table says, what its header says, what its pixels say."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vlv.curation.settings import column_of
from vlv.storage import Json

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vlv.curation.settings import FilterConfig
    from vlv.data.images import ImageHeader

LANGUAGE = "language"
SHORT_SIDE = "short_side"
ASPECT = "aspect_ratio"
COMPRESSION = "compression"
FLAT = "flat"
EXACT = "exact_duplicate"
NEAR = "near_duplicate"
ALIKE = "embedding_duplicate"
CAPTION = "caption_score"


class Drop(NamedTuple):
    """Why an image is dropped."""

    reason: str
    value: str
    detail: str


class Columns:
    """The columns that the rules read, whatever their capitals; remembers which were ever seen."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.wanted = {
            name: column
            for name, rule in config.scores.items()
            if (column := column_of(name, rule)) is not None
        }
        if config.languages:
            self.wanted[LANGUAGE] = config.language_column
        self.seen: set[str] = set()
        self.known: set[str] = set()

    def read(self, meta: Mapping[str, object]) -> Json:
        """The values that the rules want, by rule; what is absent is left out."""
        if not self.wanted:
            return {}
        self.known.update(meta)
        lower = {name.lower(): value for name, value in meta.items()}
        found: Json = {}
        for rule, column in self.wanted.items():
            if column.lower() in lower:
                self.seen.add(rule)
                found[rule] = _value(rule, lower[column.lower()])
        return found

    def absent(self) -> list[tuple[str, str]]:
        """Rules whose column no record had, though they need it: pairs of rule and column."""
        forgiving = {name for name, rule in self.config.scores.items() if rule.unknown == "keep"}
        return [
            (rule, column)
            for rule, column in self.wanted.items()
            if rule not in self.seen and rule not in forgiving
        ]


def _value(rule: str, value: object) -> float | str | None:
    if rule == LANGUAGE:
        return None if value is None else str(value)
    try:
        return None if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def check_known(config: FilterConfig, values: Json) -> Drop | None:
    """The rules on what the table says; `values` by rule."""
    for name, rule in config.scores.items():
        if rule.model is None and (drop := check_score(config, name, values.get(name))):
            return drop
    if config.languages:
        language = values.get(LANGUAGE)
        if language not in config.languages:
            wanted = ", ".join(config.languages)
            return Drop(LANGUAGE, str(language), f"the language is {language}, not {wanted}")
    return None


def check_score(config: FilterConfig, name: str, value: float | None) -> Drop | None:
    """One rule about a number."""
    rule = config.scores[name]
    if rule.keeps(value):
        return None
    if value is None or value != value:
        return Drop(name, "", f"{name} is not known")
    bound = f"not below {rule.below:g}" if rule.below is not None else f"below {rule.at_least:g}"
    return Drop(name, f"{value:.6g}", f"{name} is {value:.6g}, {bound}")


def check_size(config: FilterConfig, width: float, height: float) -> Drop | None:
    """Shorter side and aspect ratio (paper, section 4.1)."""
    short = min(width, height)
    if config.short_side_above is not None and not short > config.short_side_above:
        detail = f"the shorter side is {short:g} pixels, not more than {config.short_side_above}"
        return Drop(SHORT_SIDE, f"{short:g}", detail)
    ratio = width / max(height, 1e-9)
    low, high = config.aspect_min or 0.0, config.aspect_max or float("inf")
    if not low <= ratio <= high:
        return Drop(
            ASPECT, f"{ratio:.4g}", f"width / height is {ratio:.4g}, not {low:g} to {high:g}"
        )
    return None


def check_header(config: FilterConfig, header: ImageHeader, num_bytes: int) -> Drop | None:
    """The rules that need no pixel."""
    if drop := check_size(config, header.width, header.height):
        return drop
    density = num_bytes / (header.width * header.height)
    if config.min_bytes_per_pixel is not None and density < config.min_bytes_per_pixel:
        detail = f"{density:.4g} bytes per pixel, less than {config.min_bytes_per_pixel:g}"
        return Drop(COMPRESSION, f"{density:.4g}", detail)
    return None


def check_contrast(config: FilterConfig, contrast: float) -> Drop | None:
    """Whether there is anything to see."""
    if config.min_contrast is None or contrast >= config.min_contrast:
        return None
    detail = f"the grey values vary by {contrast:.3g}, less than {config.min_contrast:g}"
    return Drop(FLAT, f"{contrast:.3g}", detail)


def check_caption(config: FilterConfig, score: float | None) -> Drop | None:
    """Whether the caption explains the image; `score` is None where there is none."""
    rule = config.caption_score
    if rule is None or (score is None and rule.unknown == "keep"):
        return None
    if score is None:
        return Drop(CAPTION, "", "there is no caption")
    if score >= rule.at_least:
        return None
    detail = f"the caption recovers {score:.3g} of what the image's embedding says, less than {rule.at_least:g}"
    return Drop(CAPTION, f"{score:.6g}", detail)


def unknown_column(absent: Iterable[tuple[str, str]], known: Iterable[str], where: str) -> str:
    """One sentence about a column that is not there."""
    rule, column = next(iter(absent))
    names = ", ".join(sorted(known)) or "none"
    setting = "language_column" if rule == LANGUAGE else f"{rule}.column"
    off = "languages=[]" if rule == LANGUAGE else f"{rule}=null"
    return (
        f"{where}: the rule {rule} needs the column {column}, which no record has (columns: {names}); "
        f"name another with --set {setting}=NAME, or switch the rule off with --set {off}"
    )
