"""What is drawn, and its names: concepts with label, tags and group, and which of them training may see.

What cannot be told apart in a picture without reading it is left out: flags, letters, keycaps and clock faces, and of people
the variants that differ by skin, gender or direction only.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.pictograms.fetch import Package, member, members, package

from vlv.errors import DataError

Seen = Literal["seen", "val", "test"]
"""Whether training sees a concept, or which of the two sets of unseen ones has it."""

_SHARES: tuple[tuple[Seen, float], ...] = (("test", 0.12), ("val", 0.08))
_NO_GROUPS = {"component", "flags"}
_NO_SUBGROUPS = {"alphanum", "keycap"}
_CLOCK = re.compile(r".*(o.clock|-thirty)$")
_GENDERS = {"2640", "2642", "27A1"}  # and the arrow that turns a person to the right
_PEOPLE = {"1F468", "1F469"}


@dataclass(frozen=True, slots=True)
class Concept:
    """Something that several hands have drawn."""

    code: str
    """Its code points, hexadecimal, joined by hyphens, without variation selectors."""
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str

    @property
    def seen(self) -> Seen:
        """By a hash of its code: neither further concepts nor further styles change it."""
        draw = int(hashlib.sha256(f"split {self.code}".encode()).hexdigest()[:8], 16) / 16**8
        for name, share in _SHARES:
            if draw < share:
                return name
            draw -= share
        return "seen"


def plain_code(code: str) -> str:
    """Upper case, and no variation selectors, which packages handle differently."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def slug(text: str) -> str:
    """As icon sets name files.

    >>> slug("face with tears of joy")
    'face-with-tears-of-joy'
    """
    return re.sub(r"[^a-z0-9]+", "-", re.sub("[\u2019\u201c\u201d'.]", "", text.lower())).strip("-")


def read_concepts(folder: Path) -> list[Concept]:
    """The concepts that pictures are named by, in the order of the word list.

    Raises:
        DataError: The package of words is missing, or another than expected.
    """
    words = package("emojibase-data")
    entries = json.loads(member(words, folder, "en/data.json"))
    groups = json.loads(member(words, folder, "meta/groups.json"))
    return list(_concepts(entries, groups))


def _concepts(
    entries: Sequence[Mapping[str, object]], groups: Mapping[str, Mapping[str, str]]
) -> Iterator[Concept]:
    labels = set()
    for entry in entries:
        if "group" not in entry or "subgroup" not in entry:  # parts of emoji
            continue
        code, label = plain_code(str(entry["hexcode"])), str(entry["label"]).lower()
        group = groups["groups"][str(entry["group"])]
        subgroup = groups["subgroups"][str(entry["subgroup"])]
        tags = entry.get("tags") or []
        if not isinstance(tags, list):
            raise DataError(f"the word list has no list of tags for {label}; fetch it again")
        if _is_told_apart(code, label, group, subgroup) and label not in labels:
            labels.add(label)
            yield Concept(code, label, tuple(map(str, tags)), group, subgroup)


def _is_told_apart(code: str, label: str, group: str, subgroup: str) -> bool:
    parts = code.split("-")
    variant = _GENDERS & set(parts[1:]) or (len(parts) > 1 and parts[0] in _PEOPLE)
    return (
        group not in _NO_GROUPS
        and subgroup not in _NO_SUBGROUPS
        and not variant
        and not _CLOCK.match(label)
    )


def drawings(package: Package, folder: Path, concepts: Sequence[Concept]) -> dict[str, bytes]:
    """A style's pictures, SVG or WebP, by the concept's code; not every style has all concepts.

    Icon sets say the code points of their pictures, or name them as the word list or Unicode does.
    """
    if package.name.startswith("@iconify-json/"):
        return dict(_icons(package, folder, concepts))
    codes = {concept.code for concept in concepts}
    files = {plain_code(Path(name).stem): data for name, data in members(package, folder, ".webp")}
    return {code: data for code, data in files.items() if code in codes}


def _icons(
    package: Package, folder: Path, concepts: Sequence[Concept]
) -> Iterator[tuple[str, bytes]]:
    icons = json.loads(member(package, folder, "icons.json"))
    chars = json.loads(member(package, folder, "chars.json"))
    by_code = {plain_code(code): name for code, name in chars.items()}
    aliases = {name: entry["parent"] for name, entry in icons.get("aliases", {}).items()}
    squashed = {name.replace("-", ""): name for name in icons["icons"]}
    for concept in concepts:
        names = [by_code.get(concept.code), slug(concept.label), *_unicode_names(concept.code)]
        names = [aliases.get(name, name) for name in names if name]
        names += [squashed.get(name.replace("-", "")) for name in names]
        name = next((name for name in names if name in icons["icons"]), None)
        if name is not None:
            yield concept.code, svg(icons, name)


def _unicode_names(code: str) -> list[str]:
    """The slug of the name that Unicode gives a single code point."""
    if "-" in code:
        return []
    name = unicodedata.name(chr(int(code, 16)), "")
    return [slug(name)] if name else []


def svg(icons: Mapping[str, object], name: str) -> bytes:
    """An icon of an Iconify set as an SVG file of its own."""
    table = icons["icons"]
    assert isinstance(table, dict)
    icon = table[name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    ).encode()
