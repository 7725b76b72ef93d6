"""What the grammar writes, and that the parser reads all of it back."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from transformers import CLIPTokenizer

from tests.toyworld.world import make_scene, make_solid
from vlv.errors import ConfigError
from vlv.toyworld.components import TEXT_POSITIONS
from vlv.toyworld.language import Claims, compare, parse, true_claims
from vlv.toyworld.scene import COLOURS, Scene
from vlv.toyworld.words import OBJECT_FACTS, PLAIN, SCENE_FACTS, WORDS, phrases_of
from vlv.toyworld.writing import FORMS, Form, describe


def write(scene: Scene, form: Form, seed: int = 0) -> str:
    return describe(scene, form, np.random.default_rng(seed))


@pytest.mark.parametrize("form", FORMS)
def test_every_caption_is_read_back_without_a_wrong_claim(form: Form, scenes: list[Scene]) -> None:
    for number, scene in enumerate(scenes):
        caption = write(scene, form, number)
        claims = parse(caption)
        counts = compare(claims, scene)
        assert counts.precision == 1, caption
        assert not claims.contradictions, caption
        assert len(claims.objects) == len(scene.solids), caption
        if form in ("tags", "detailed"):
            assert counts.recall == 1, caption
            assert counts.f1 == 1


def test_the_forms_of_one_scene() -> None:
    solids = (
        make_solid(column="left"),
        make_solid("cone", "blue", "small", "shiny", "right", "back"),
    )
    scene = make_scene(*solids, time="night", view="high")
    assert write(scene, "tags") == (
        "photo, grass, night, left light, high view, large matte red cube left front, "
        "small shiny blue cone right back"
    )
    assert re.fullmatch(
        r"A photo(graph)? of a red (cube|block) and a blue cone\.", write(scene, "short")
    )
    assert parse(write(scene, "detailed")).scene == true_claims(scene).scene


@pytest.mark.parametrize("style", ["sketch", "sepia"])
@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_seen_is_not_said(form: Form, style: str) -> None:
    scene = make_scene(make_solid(), make_solid("cone", "blue", column="left"), style=style)
    hidden = [*COLOURS, *phrases_of("ground"), *phrases_of("time")]
    for seed in range(20):
        caption = write(scene, form, seed)
        assert not [phrase for phrase in hidden if re.search(rf"\b{phrase}\b", caption)], caption
    assert "colour" not in true_claims(scene).objects[0]
    assert not {"ground", "time"} & true_claims(scene).scene.keys()


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ConfigError, match="'long'; choose one of short, tags, detailed, plain"):
        write(make_scene(), "long")  # type: ignore[arg-type]


# --- variety and length -------------------------------------------------------------------------


def skeleton(caption: str) -> str:
    """A caption with every fact replaced by its kind: the template it was written from."""
    text = caption.lower()
    for kind in (*SCENE_FACTS, "column", "row", "shape", "colour", "size", "material"):
        phrases = sorted((p for v in WORDS[kind].values() for p in v), key=len, reverse=True)
        text = re.sub(rf"\b({'|'.join(phrases)})\b", f"<{kind}>", text)
    return text


def test_detailed_captions_are_not_one_template(scenes: list[Scene]) -> None:
    templates = Counter(skeleton(write(s, "detailed", n)) for n, s in enumerate(scenes))
    assert len(templates) > 100
    assert max(templates.values()) < 0.1 * len(scenes)


def test_one_scene_is_described_in_many_ways() -> None:
    scene = make_scene(make_solid(column="left"), make_solid("cone", "blue", column="right"))
    assert len({write(scene, "detailed", seed) for seed in range(100)}) >= 95
    assert len({write(scene, "short", seed) for seed in range(100)}) >= 4
    assert len({write(scene, "tags", seed) for seed in range(100)}) == 1


def test_every_phrase_is_used(scenes: list[Scene]) -> None:
    detailed, plain = (
        " ".join(write(s, form, n) for n, s in enumerate(scenes)).lower()
        for form in ("detailed", "plain")
    )
    assert all(
        p in detailed for table in WORDS.values() for values in table.values() for p in values
    )
    assert all(p in plain for table in PLAIN.values() for values in table.values() for p in values)


@pytest.mark.parametrize("form", FORMS)
def test_captions_fit_into_the_text_tower(
    form: Form, scenes: list[Scene], text_tokenizer: CLIPTokenizer
) -> None:
    rows = text_tokenizer([write(scene, form, n) for n, scene in enumerate(scenes)]).input_ids
    assert max(map(len, rows)) <= TEXT_POSITIONS


# --- broken text --------------------------------------------------------------------------------

RED_CUBE = {"shape": "cube", "colour": "red"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        ".,;",
        "the quick brown fox",
        "\u2603 \x00 <|endoftext|>",
        "There is a small shiny",
        "On the left in front stands a",
        "The little cube is to the left of",
        "The cube is",
        "left, right, middle",
    ],
)
def test_text_that_says_nothing_claims_nothing(text: str) -> None:
    assert parse(text) == Claims()


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("a red cube", [RED_CUBE]),
        ("A RED  BLOCK", [RED_CUBE]),
        ("a red red red cube", [RED_CUBE]),
        ("a red cube. a red cube, a red cube", [RED_CUBE] * 3),
        ("a red cube a red cube a red cube", [RED_CUBE] * 3),
        ("a cube and a", [{"shape": "cube"}]),
        ("a red cube on the left in", [RED_CUBE | {"column": "left"}]),
        ("on the left a red cube", [RED_CUBE | {"column": "left"}]),
        ("cubes and a redcube", []),
    ],
)
def test_objects_of_broken_text(text: str, objects: list[dict[str, str]]) -> None:
    assert list(parse(text).objects) == objects


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("A photo of a meadow at", {"style": "photo", "ground": "grass"}),
        ("Light comes from the right.", {"light": "right"}),
        ("Light comes from the", {}),
        ("photo, grass, day", {"style": "photo", "ground": "grass", "time": "day"}),
        ("sketch", {"style": "sketch"}),
        ("photo photo, grass", {"style": "photo"}),
    ],
)
def test_scene_facts_of_broken_text(text: str, scene: dict[str, str]) -> None:
    assert parse(text).scene == scene


def test_a_half_caption_claims_what_it_says(scenes: list[Scene]) -> None:
    """Cutting a caption at any word never makes a claim about the scene as a whole wrong."""
    for number, scene in enumerate(scenes[:40]):
        words = write(scene, "detailed", number).split()
        for length in range(len(words)):
            claims = parse(" ".join(words[:length]))
            truth = true_claims(scene).scene
            assert all(truth[fact] == value for fact, value in claims.scene.items())
            assert not claims.contradictions


def test_the_first_of_several_values_stands() -> None:
    claims = parse("A photo of a meadow at night, a comic by day. A small large cube on the left.")
    assert claims.scene == {"style": "photo", "ground": "grass", "time": "night"}
    assert claims.objects == ({"shape": "cube", "size": "small", "column": "left"},)
    assert sorted(claims.contradictions) == ["size", "style", "time"]
    tags = parse("photo, cartoon, left light, small small red blue cube left")
    assert tags.scene == {"style": "photo", "light": "left"}
    assert sorted(tags.contradictions) == ["colour", "style"]


@pytest.mark.parametrize(
    ("text", "relation"),
    [
        ("The cube is behind the ball.", ("cube", "behind", "sphere")),
        ("the large block is in front of the other", ("large cube", "front", "cube")),
        ("the drum is to the right of the cone", ("cylinder", "right", "cone")),
        ("The red drum is left of the small cone.", ("red cylinder", "left", "small cone")),
    ],
)
def test_relations_are_read(text: str, relation: tuple[str, str, str]) -> None:
    assert parse(text) == Claims(relations=(relation,))


@pytest.mark.parametrize(
    ("text", "objects", "relation"),
    [
        (
            "A red cube left of a blue sphere.",
            [RED_CUBE, {"shape": "sphere", "colour": "blue"}],
            ("red cube", "left", "blue sphere"),
        ),
        (
            "a photo of a purple drum in front of a shiny object",
            [{"shape": "cylinder", "colour": "purple"}, {"material": "shiny"}],
            ("purple cylinder", "front", "shiny object"),
        ),
        (
            "There is a cube behind a cone, on grass.",
            [{"shape": "cube"}, {"shape": "cone"}],
            ("cube", "behind", "cone"),
        ),
    ],
)
def test_plain_sentences_name_objects_and_relate_them(
    text: str, objects: list[dict[str, str]], relation: tuple[str, str, str]
) -> None:
    claims = parse(text)
    assert list(claims.objects) == objects
    assert claims.relations == (relation,)


def test_a_third_object_is_related_to_one_of_the_first() -> None:
    claims = parse("A red cube left of a blue sphere and a green cone behind the cube.")
    assert [o["shape"] for o in claims.objects] == ["cube", "sphere", "cone"]
    assert claims.relations[1] == ("green cone", "behind", "cube")


def test_many_texts_tell_the_place_by_a_relation_alone(scenes: list[Scene]) -> None:
    pairs = [scene for scene in scenes if len(scene.solids) == 2]
    claims = [parse(write(scene, "plain", number)) for number, scene in enumerate(pairs)]
    alone = [c for c in claims if c.relations and not any("column" in o for o in c.objects)]
    assert len(alone) > 0.4 * len(pairs)
    kinds = Counter(c.relations[0][1] for c in alone)
    assert set(kinds) == {"left", "right", "front", "behind"}


def test_an_article_fits_its_word() -> None:
    scene = make_scene(make_solid("cone", "blue"))
    texts = [write(scene, form, seed) for form in FORMS for seed in range(40)]
    assert not [text for text in texts if re.search(r"\ba (?=[aeiou])|\ban (?![aeiou])", text)]


def test_the_facts_of_the_world_have_words() -> None:
    assert set(WORDS) == {*SCENE_FACTS, *OBJECT_FACTS}
    phrases = [phrase for fact in WORDS for phrase in phrases_of(fact)]
    assert len(phrases) == len(set(phrases))
