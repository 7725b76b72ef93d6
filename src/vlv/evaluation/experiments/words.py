"""Excluded and included words, measured where the truth is known.

Of each scene the model leaves out a fact that its own caption states, in all the words that the world has for it, and includes two
words that its caption lacks: one that is true of the scene, one that is false.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from vlv.evaluation.results import Figure, Results, Section, Table, Target
from vlv.evaluation.statistics import Array, estimate, mean, ratio
from vlv.jobs.table import Row
from vlv.models.draws import mixed_seed
from vlv.models.word_writing import BIASES
from vlv.models.words import missing_words
from vlv.toyworld.language import Claims, compare, parse, true_claims
from vlv.toyworld.render import render
from vlv.toyworld.words import NAME_FACTS, OBJECT_FACTS, WORDS

if TYPE_CHECKING:
    from torch import Tensor

    from vlv.evaluation.experiments.scene_plan import ScenePlan
    from vlv.models.decoding import Caption
    from vlv.models.pipeline import VLVPipeline

Wanted = TypeVar("Wanted", bound=Hashable)

EXCLUDED, INCLUDED = Target(0.99, 1.0), Target(0.95, 0.99)


def collect(
    pipe: VLVPipeline, plan: ScenePlan, folder: Path, report: Callable[[int], None]
) -> list[Row]:
    """Let the model write about the scenes; what the folder holds is kept.

    Args:
        pipe: The model.
        plan: Which scenes.
        folder: Where the captions are kept, for as long as the caller likes.
        report: Receives how many scenes are done.
    """
    name = str(pipe.config.get("_name_or_path"))
    about = {"split": plan.split, "seed": plan.seed, "model": name, "biases": list(BIASES)}
    return plan.collect(folder / "words.jsonl", about, partial(_written, pipe, plan), report)


def _written(pipe: VLVPipeline, plan: ScenePlan, indices: Sequence[int]) -> Iterator[Row]:
    images = [render(plan.scene(index), pipe.image_size).image for index in indices]
    z = pipe.embed(images, batch_size=len(images))
    plain = [x.text for x in pipe.describe(z=z, batch_size=len(images))]
    facts = [fact_to_exclude(plan, *pair) for pair in zip(indices, plain, strict=True)]
    without = _describe(pipe, z, facts, lambda fact: {"exclude": words_for(*fact)})
    rows: list[Row] = [
        {"index": index, "plain": text, "excluded": {"fact": fact, "text": caption.text}}
        for index, text, fact, caption in zip(indices, plain, facts, without, strict=True)
    ]
    for kind in ("true", "false"):
        words = [
            word_to_include(plan, *pair, is_true=kind == "true")
            for pair in zip(indices, plain, strict=True)
        ]
        found = _describe(pipe, z, words, lambda word: {"include": word})
        for row, word, caption in zip(rows, words, found, strict=True):
            row[kind] = {"word": word, "text": caption.text, "bias": caption.include_bias}
    yield from rows


def _describe(
    pipe: VLVPipeline, z: Tensor, wanted: Sequence[Wanted], how: Callable[[Wanted], Row]
) -> list[Caption]:
    """A caption of each image; those of which the same is wanted are written together, each as it would be alone."""
    found: dict[int, Caption] = {}
    for one in dict.fromkeys(wanted):
        rows = [row for row, other in enumerate(wanted) if other == one]
        captions = pipe.describe(z=z[rows], batch_size=len(rows), **how(one))
        found |= zip(rows, captions, strict=True)
    return [found[row] for row in range(len(wanted))]


def words_for(fact: str, value: str) -> tuple[str, ...]:
    """All words of captions that state a fact about an object."""
    return WORDS[fact][value]


def fact_to_exclude(plan: ScenePlan, index: int, caption: str) -> tuple[str, str]:
    """A fact that a caption states of an object, or where it states none, a true one."""
    rng = np.random.default_rng(mixed_seed(plan.seed, index, "exclude"))
    stated = parse(caption).objects or true_claims(plan.scene(index)).objects
    facts = [pair for x in stated for pair in sorted(x.items()) if pair[0] in NAME_FACTS]
    return facts[int(rng.integers(len(facts)))]


def word_to_include(plan: ScenePlan, index: int, caption: str, *, is_true: bool) -> str:
    """A word for what an object is or where it stands, that a caption lacks and that is true of an object, or of none."""
    rng = np.random.default_rng(mixed_seed(plan.seed, index, "include", is_true))
    objects = true_claims(plan.scene(index)).objects
    there = {pair for facts in objects for pair in facts.items()}
    words = [
        word
        for fact in OBJECT_FACTS
        for value in WORDS[fact]
        if ((fact, value) in there) == is_true
        for word in WORDS[fact][value]
    ]
    words = list(missing_words(words, caption)) or words
    return words[int(rng.integers(len(words)))]


def measure(rows: Sequence[Row], plan: ScenePlan) -> Results:
    """Whether excluded facts stayed out, whether included words were written, and what became of the truth."""
    texts = {
        "plain": [row["plain"] for row in rows],
        "excluded": [row["excluded"]["text"] for row in rows],
        **{kind: [row[kind]["text"] for row in rows] for kind in ("true", "false")},
    }
    kept_out = [float(_stays_out(row["excluded"])) for row in rows]
    written = {
        kind: [float(not missing_words([row[kind]["word"]], row[kind]["text"])) for row in rows]
        for kind in ("true", "false")
    }
    figures = [
        Figure("words.excluded", "excluded facts that stay out", estimate(kept_out, mean, plan.seed), "share", EXCLUDED),
        Figure("words.included", "included words that are written, true ones", estimate(written["true"], mean, plan.seed), "share", INCLUDED),
        Figure("words.included_false", "false ones", estimate(written["false"], mean, plan.seed), "share"),
    ]  # fmt: skip
    labels = {
        "plain": "claims of plain captions that are right",
        "excluded": "without the excluded fact",
        "true": "with a true word",
        "false": "with a false word",
    }
    for kind, label in labels.items():
        claims = _claims(texts[kind], rows, plan)
        right = estimate(claims[:, [1, 0]], ratio, plan.seed)
        figures.append(Figure(f"words.precision.{kind}", label, right, "share"))
    section = Section("words", "Words", tuple(figures), (_biases(rows, written),))
    return Results(asdict(plan), (section,))


def _stays_out(row: Row) -> bool:
    fact, value = row["fact"]
    said: Claims = parse(row["text"])
    is_stated = any(facts.get(fact) == value for facts in said.objects)
    return not is_stated and not missing_words(words_for(fact, value), row["text"], there=True)


def _claims(texts: Sequence[str], rows: Sequence[Row], plan: ScenePlan) -> Array:
    """Claims stated and correct, (N, 2)."""
    pairs = zip(texts, rows, strict=True)
    found = [compare(parse(text), plan.scene(row["index"])) for text, row in pairs]
    return np.array([(x.stated, x.correct) for x in found], np.float64)


def _biases(rows: Sequence[Row], written: dict[str, list[float]]) -> Table:
    """What it took to have the words written."""

    def share(kind: str, bias: float | None) -> float:
        pairs = zip(rows, written[kind], strict=True)
        found = [(row[kind]["bias"] if is_there else None) == bias for row, is_there in pairs]
        return float(np.mean(found))

    steps: list[float | None] = [0.0, *BIASES, None]
    lines = tuple(
        ("not written" if bias is None else f"{bias:g}", share("true", bias), share("false", bias))
        for bias in steps
    )
    return Table("Bias with which included words are written", ("bias", "true", "false"), lines)
