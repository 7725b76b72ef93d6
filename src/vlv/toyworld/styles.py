"""What a caption decoder that takes instructions learns of the world: captions in several styles, and questions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlv.toyworld.language import parse, true_claims
from vlv.toyworld.questions import ask_at_length
from vlv.toyworld.words import NAME_FACTS, WORDS
from vlv.toyworld.writing import describe, describe_partly

if TYPE_CHECKING:
    import numpy as np

    from vlv.storage import Json
    from vlv.toyworld.language import Claims
    from vlv.toyworld.scene import Scene
    from vlv.toyworld.writing import Form

_FORMS: dict[str, Form] = {
    "detailed": "detailed",
    "short": "short",
    "tags": "tags",
    "prompt": "plain",
}
STYLES = (*_FORMS, "partial")
"""A prompt is what people type; a partial caption tells of some objects, at any length."""


def texts_of(scene: Scene, rng: np.random.Generator) -> Json:
    """The fields of a record that teach instructions: `captions`, `questions` and `known`, all true."""
    asked = ask_at_length(scene, rng)
    captions = {style: write(style, scene, rng) for style in STYLES}
    return {
        "captions": captions,
        "questions": [{"question": one.question, "answer": one.answer} for one in asked],
        "known": known_facts(scene, rng),
    }


def write(style: str, scene: Scene, rng: np.random.Generator) -> str:
    """A true caption of a scene in one of the styles."""
    return describe(scene, _FORMS[style], rng) if style in _FORMS else describe_partly(scene, rng)


def known_facts(scene: Scene, rng: np.random.Generator) -> str:
    """What somebody knows of a scene, as tags: up to three of its objects, its ground and its time."""
    claims = true_claims(scene)
    tags = [claims.scene[fact] for fact in ("ground", "time") if fact in claims.scene]
    tags += [
        " ".join(
            facts[x] for x in NAME_FACTS if x == "shape" or (x in facts and rng.random() < 0.5)
        )
        for facts in claims.objects
    ]
    count = 1 + int(rng.integers(min(3, len(tags))))
    return ", ".join(tags[i] for i in rng.permutation(len(tags))[:count])


def is_written_as(style: str, text: str) -> bool:
    """Whether a text has the form of a style, true or not; a prompt or a partial caption may look like a short one.

    >>> is_written_as("short", "A photo of a red cube."), is_written_as("tags", "A photo of a red cube.")
    (True, False)
    """
    claims, is_list = parse(text), _is_list(text)
    if not claims.objects or is_list != (style == "tags"):
        return False
    if style == "detailed":
        return _is_detailed(text, claims)
    if style == "short":
        return _is_short(text, claims)
    return style == "tags" or _num_sentences(text) <= 1


def _is_list(text: str) -> bool:
    """A list of tags: the style in one word, then light and view, then the objects."""
    tags = [tag.strip() for tag in text.lower().split(",")]
    sides = [f"{side} light" for side in WORDS["light"]]
    return "." not in text and tags[0] in WORDS["style"] and any(tag in sides for tag in tags)


def _is_detailed(text: str, claims: Claims) -> bool:
    placed = all({"column", "row"} <= facts.keys() for facts in claims.objects)
    return {"style", "light", "view"} <= claims.scene.keys() and placed and text.endswith(".")


def _is_short(text: str, claims: Claims) -> bool:
    named = all(facts.keys() <= {"colour", "shape"} for facts in claims.objects)
    return (
        claims.scene.keys() == {"style"}
        and named
        and not claims.relations
        and _num_sentences(text) == 1
    )


def _num_sentences(text: str) -> int:
    """Full stops, one of which may end the text."""
    return text.count(".")
