"""The texts of a picture: its name in several styles, and its colours, cell by cell.

`name` is what captions say. `drawn` says who drew it, `tagged` adds tags, `grid` begins with the colours of the cells from
the top left (`drawing.colour_grids`): what no name says, and what a picture can be rebuilt from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

Form = Literal["name", "drawn", "tagged", "grid"]
SHARES: dict[Form, float] = {"name": 0.1, "drawn": 0.2, "tagged": 0.1, "grid": 0.6}
"""How often the diffusion decoder reads each form."""
FORMS = tuple(SHARES)


def article(label: str) -> str:
    """The label with its article: none for a plural, or for what is the only one of its kind.

    >>> article("fox"), article("owl"), article("grapes")
    ('a fox', 'an owl', 'grapes')
    """
    if label.endswith("s") and not label.endswith("ss"):
        return label
    return f"an {label}" if label[0] in "aeiou" else f"a {label}"


def say(about: Mapping[str, object], form: Form, grid: str, rng: np.random.Generator) -> str:
    """Write a text of a picture.

    Args:
        about: What its record says (`render.describe`).
        form: Which text.
        grid: The words of its colours.
        rng: Of what is left open: tags, and whether the background is said.
    """
    label, kind = str(about["label"]), str(about["form"])
    if form == "name":
        return label
    if form == "grid":
        return f"{grid} {label}, {kind.partition(' ')[2]}"
    drawn = f"{kind} of {article(label)}"
    if form == "drawn":
        return drawn if rng.random() < 0.5 else f"{drawn} on {about['background']}"
    tags = [str(tag) for tag in about["tags"]]  # type: ignore[attr-defined]
    chosen = [tags[i] for i in rng.permutation(len(tags))[:3]]
    return ", ".join([drawn, str(about["group"]).replace("-", " "), *chosen])


def say_any(about: Mapping[str, object], grid: str, rng: np.random.Generator) -> str:
    """A text in a form drawn by `SHARES`."""
    form = FORMS[int(rng.choice(len(FORMS), p=list(SHARES.values())))]
    return say(about, form, grid, rng)
