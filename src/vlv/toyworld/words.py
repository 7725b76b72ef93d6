"""The words of the world: every fact and the phrases that state it."""

from __future__ import annotations

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "sphere": ("sphere", "ball"),
        "cube": ("cube", "block"),
        "cylinder": ("cylinder", "drum"),
        "cone": ("cone",),
    },
    "colour": {
        "red": ("red",),
        "yellow": ("yellow",),
        "green": ("green",),
        "turquoise": ("turquoise",),
        "blue": ("blue",),
        "purple": ("purple",),
    },
    "size": {"small": ("small", "little"), "large": ("large", "big")},
    "material": {
        "matte": ("matte", "dull"),
        "shiny": ("shiny", "glossy"),
        "striped": ("striped", "banded"),
    },
    "column": {
        "left": ("on the left", "at the left"),
        "middle": ("in the middle", "in the centre"),
        "right": ("on the right", "at the right"),
    },
    "row": {
        "front": ("in front", "in the foreground"),
        "back": ("at the back", "in the background"),
    },
    "style": {
        "photo": ("photo", "photograph"),
        "cartoon": ("cartoon", "comic"),
        "sketch": ("pencil sketch", "pencil drawing"),
        "sepia": ("sepia print", "sepia picture"),
    },
    "ground": {
        "grass": ("a meadow", "a grassy plain"),
        "sand": ("a desert", "a sandy plain"),
        "snow": ("a snowfield", "a snowy plain"),
    },
    "time": {
        "day": ("by day", "in daylight"),
        "sunset": ("at sunset", "at dusk"),
        "night": ("at night", "by night"),
    },
    "light": {
        "left": ("lit from the left", "light comes from the left"),
        "right": ("lit from the right", "light comes from the right"),
    },
    "view": {
        "high": ("seen from above", "seen from high up"),
        "low": ("seen from a low angle", "seen from low down"),
    },
}
"""Every fact and the phrases of the captions that state it; the first phrase is the plainest."""

PLAIN: dict[str, dict[str, tuple[str, ...]]] = {
    "style": {"sketch": ("sketch", "drawing"), "sepia": ("sepia photo",)},
    "ground": {
        "grass": ("on grass", "in the grass"),
        "sand": ("on sand", "in the sand"),
        "snow": ("on snow", "in the snow"),
    },
    "time": {
        "day": ("under a blue sky",),
        "sunset": ("under a low sun", "in the evening"),
        "night": ("under a dark sky",),
    },
    "view": {"high": ("from above",), "low": ("from low down",)},
}
"""Further phrases that people type."""

SCENE_FACTS = ("style", "ground", "time", "light", "view")
OBJECT_FACTS = ("shape", "colour", "size", "material", "column", "row")
NAME_FACTS = ("size", "material", "colour", "shape")
"""The facts that name an object, in the order of the words."""

UNKNOWN_SHAPE = "object"
"""The noun of an object whose shape is not said."""

RELATIONS = {
    "to the left of": "left",
    "left of": "left",
    "to the right of": "right",
    "right of": "right",
    "in front of": "front",
    "behind": "behind",
}
"""What is said of two objects and the relation that it states."""


def phrases_of(fact: str) -> dict[str, str]:
    """Every phrase that states a fact, and the value that it states."""
    tables = (WORDS[fact], PLAIN.get(fact, {}))
    return {
        phrase: value for table in tables for value, phrases in table.items() for phrase in phrases
    }
