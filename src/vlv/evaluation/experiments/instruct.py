"""Instructions, measured where the truth is known: captions in the style that was asked for, and answers to questions.

`collect` lets the model write everything about rendered scenes, `measure` reads it with the parser. Another model, such as the
one before it was taught, may write plain captions of the same scenes to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlv.errors import ConfigError
from vlv.evaluation.experiments.vqa import answer_from_claims
from vlv.evaluation.metrics.answers import normalise_answer
from vlv.evaluation.results import Figure, Results, Section, Table, Target
from vlv.evaluation.statistics import Array, Estimate, estimate, f1, mean, ratio
from vlv.jobs.table import Row
from vlv.models.arguments import present
from vlv.models.draws import mixed_seed
from vlv.models.instructions import count_words, with_length
from vlv.toyworld.language import compare, parse
from vlv.toyworld.questions import Question, ask_at_length, in_usual_words
from vlv.toyworld.render import render
from vlv.toyworld.styles import STYLES, is_written_as, known_facts, write

if TYPE_CHECKING:
    from vlv.evaluation.experiments.scene_plan import ScenePlan
    from vlv.models.pipeline import VLVPipeline

STYLE, ANSWERS, LOSS = Target(0.99, 1.0), Target(0.93, 0.98), Target(-0.003, 0.0)
LENGTH = Target(0.9, 0.99)
_PLAIN, _KNOWN = "plain", "known"
_TOLERANCE = 0.15
"""Share of the words that were asked for, by which a caption may be longer or shorter."""


def styles_of(pipe: VLVPipeline) -> list[str]:
    """The styles of the toy world that a model was taught.

    Raises:
        ConfigError: It was taught neither a style nor questions.
    """
    decoder = present(pipe.caption_decoder, "caption_decoder")
    known = [style for style in STYLES if style in decoder.styles]
    if not known and not decoder.config.answers_questions:
        raise ConfigError(
            "this model takes no instructions; train one (vlv train tiny-instruct-stage2) and name it with --model"
        )
    return known


def collect(
    pipe: VLVPipeline,
    before: VLVPipeline | None,
    plan: ScenePlan,
    folder: Path,
    report: Callable[[int], None],
) -> list[Row]:
    """Let the model write about the scenes; what the folder holds is kept.

    Args:
        pipe: The model.
        before: Another one, for plain captions to compare with.
        plan: Which scenes.
        folder: Where the texts are kept, for as long as the caller likes.
        report: Receives how many scenes are done.
    """
    styles = styles_of(pipe)
    names = [x and str(x.config.get("_name_or_path")) for x in (pipe, before)]
    about = {"split": plan.split, "seed": plan.seed, "models": names, "styles": styles}
    taught = present(pipe.caption_decoder, "caption_decoder").config
    about |= {"lengths": taught.obeys_lengths, "known": taught.uses_known}
    make = partial(_written, pipe, before, plan, styles)
    return plan.collect(folder / "texts.jsonl", about, make, report)


def _written(
    pipe: VLVPipeline,
    before: VLVPipeline | None,
    plan: ScenePlan,
    styles: Sequence[str],
    indices: Sequence[int],
) -> Iterator[Row]:
    images = [render(plan.scene(index), pipe.image_size).image for index in indices]
    z, size = pipe.embed(images, batch_size=len(images)), len(images)
    texts = {_PLAIN: [x.text for x in pipe.describe(z=z, batch_size=size)]}
    for style in styles:
        texts[style] = [x.text for x in pipe.describe(z=z, style=style, batch_size=size)]
    if before is not None:
        texts["before"] = [x.text for x in before.describe(images, batch_size=size)]
    answers: list[list[str]] = [[] for _ in indices]
    taught = present(pipe.caption_decoder, "caption_decoder").config
    if taught.uses_known:
        known = [facts_told(plan, index) for index in indices]
        texts[_KNOWN] = [x.text for x in pipe.describe(z=z, known=known, batch_size=size)]
    lengths = {}
    for style in (_PLAIN, *styles) if taught.obeys_lengths else ():
        counts = [length_asked(plan, index, style) for index in indices]
        prompts = [with_length((taught.styles or {}).get(style), count) for count in counts]
        found = pipe.describe(z=z, prompt=prompts, batch_size=size)
        lengths[style] = [(count, x.text) for count, x in zip(counts, found, strict=True)]
    if taught.answers_questions:
        asked = [(row, x.question) for row, i in enumerate(indices) for x in questions(plan, i)]
        replies = pipe.ask(
            z=z[[row for row, _ in asked]], questions=[text for _, text in asked], batch_size=size
        )
        for (row, _), one in zip(asked, replies, strict=True):  # type: ignore[arg-type]
            answers[row].append(one.text)
    for row, index in enumerate(indices):
        captions = {name: written[row] for name, written in texts.items()}
        long = {style: several[row] for style, several in lengths.items()}
        yield {"index": index, "captions": captions, "answers": answers[row], "lengths": long}


def length_asked(plan: ScenePlan, index: int, style: str) -> int:
    """Words that a true caption of a scene has; the same at every call."""
    rng = np.random.default_rng(mixed_seed(plan.seed, index, "length", style))
    return count_words(write("detailed" if style == _PLAIN else style, plan.scene(index), rng))


def facts_told(plan: ScenePlan, index: int) -> str:
    """What is told of a scene before its caption is written; the same at every call."""
    rng = np.random.default_rng(mixed_seed(plan.seed, index, "known"))
    return known_facts(plan.scene(index), rng)


def questions(plan: ScenePlan, index: int) -> list[Question]:
    """What is asked about a scene; the same at every call."""
    return ask_at_length(plan.scene(index), np.random.default_rng([plan.seed, index, 9]))


def measure(rows: Sequence[Row], plan: ScenePlan) -> Results:
    """Whether styles and questions were understood, and what became of plain captions."""
    captions = [row["captions"] for row in rows]
    figures, tables = [], []
    styles = [style for style in STYLES if style in captions[0]]
    for style in styles:
        kept = [float(is_written_as(style, texts[style])) for texts in captions]
        figures.append(
            Figure(f"instruct.style.{style}", f"asked for {style}, written so", estimate(kept, mean, plan.seed), "share", STYLE)
        )  # fmt: skip
    claims = {name: _claims(captions, name, plan) for name in captions[0]}
    for style in styles:
        right = estimate(claims[style][:, [2, 0]], ratio, plan.seed)
        label = f"claims of {style} captions that are right"
        figures.append(Figure(f"instruct.precision.{style}", label, right, "share"))
    if rows[0]["lengths"]:
        found, table = _lengths(rows, plan)
        figures += found
        tables.append(table)
    if rows[0]["answers"]:
        answered, table = _answered(rows, plan)
        figures += answered
        tables.append(table)
    figures += _plain(claims, plan)
    section = Section("instruct", "Instructions", tuple(figures), tuple(tables))
    return Results(asdict(plan), (section,))


def _lengths(rows: Sequence[Row], plan: ScenePlan) -> tuple[list[Figure], Table]:
    """Captions that are as long as they were asked to be, within the tolerance, and whether they are true."""
    kept: dict[str, list[float]] = {}
    claims = np.zeros((len(rows), 3))
    for place, row in enumerate(rows):
        for style, (asked, text) in row["lengths"].items():
            is_kept = abs(count_words(text) - asked) <= _TOLERANCE * asked
            kept.setdefault(style, []).append(float(is_kept))
            found = compare(parse(text), plan.scene(row["index"]))
            claims[place] += (found.stated, found.true, found.correct)
    within = estimate(np.mean(list(kept.values()), 0), mean, plan.seed)
    right = estimate(claims[:, [2, 0]], ratio, plan.seed)
    counts = {style: [row["lengths"][style][0] for row in rows] for style in kept}
    each = tuple(
        (style, min(counts[style]), max(counts[style]), float(np.mean(kept[style])))
        for style in kept
    )
    return [
        Figure("instruct.lengths", "asked for N words, within 15 %", within, "share", LENGTH),
        Figure("instruct.lengths.precision", "claims of these that are right", right, "share"),
    ], Table("Lengths kept by style", ("style", "fewest words", "most words", "share"), each)


def _claims(captions: Sequence[dict[str, str]], name: str, plan: ScenePlan) -> Array:
    """Claims stated, true and correct, (N, 3)."""
    found = [compare(parse(texts[name]), plan.scene(index)) for index, texts in enumerate(captions)]
    return np.array([(x.stated, x.true, x.correct) for x in found], np.float64)


def _plain(claims: dict[str, Array], plan: ScenePlan) -> list[Figure]:
    now = claims[_PLAIN]
    figures = [
        Figure("instruct.plain.f1", "plain captions: F1 of claims", estimate(now, f1, plan.seed))
    ]
    if _KNOWN in claims:
        gained = _gained(claims[_KNOWN], now, plan)
        label = "F1 of plain captions, gained by what is known"
        figures.append(Figure("instruct.known.gain", label, gained))
    if "before" in claims:
        then = claims["before"]
        gained = _gained(now, then, plan)
        figures += [
            Figure(
                "instruct.before.f1", "plain captions before: F1", estimate(then, f1, plan.seed)
            ),
            Figure("instruct.plain.gain", "F1 of plain captions, gained", gained, "share", LOSS),
        ]
    return figures


def _gained(now: Array, then: Array, plan: ScenePlan) -> Estimate:
    pairs = np.concatenate([now, then], 1)
    return estimate(pairs, lambda x: f1(x[..., :3]) - f1(x[..., 3:]), plan.seed)


def _answered(rows: Sequence[Row], plan: ScenePlan) -> tuple[list[Figure], Table]:
    """Accuracy by kind of question, and what the most frequent answer would get."""
    kinds: dict[str, list[tuple[float, str, int]]] = {}
    for index, row in enumerate(rows):
        for asked, text in zip(questions(plan, index), row["answers"], strict=True):
            truth, said = normalise_answer(asked.answer), normalise_answer(text)
            kind = "yes or no" if asked.answer in ("yes", "no") else asked.kind
            kinds.setdefault(kind, []).append((float(truth == said), truth, index))
    everything = [one for found in kinds.values() for one in found]
    read = [
        (float(_read(row["captions"][_PLAIN], asked.question) == asked.answer), "", index)
        for index, row in enumerate(rows)
        for asked in questions(plan, index)
    ]
    figures = [
        _accuracy("answers", "answers that are right", everything, plan, ANSWERS),
        _accuracy("answers_of_caption", "of the plain caption, by the parser", read, plan),
        *(
            _accuracy(f"answers.{kind.replace(' ', '_')}", f"answers about {kind}", found, plan)
            for kind, found in sorted(kinds.items())
        ),
    ]
    usual = tuple((kind, len(found), _guessed(found)) for kind, found in sorted(kinds.items()))
    return figures, Table(
        "Share of the most frequent answer", ("kind", "questions", "share"), usual
    )


def _read(caption: str, question: str) -> str:
    """What the parser answers from the plain caption alone, the competitor of answers from z."""
    return answer_from_claims(in_usual_words(question), parse(caption))


def _accuracy(
    key: str,
    label: str,
    found: Sequence[tuple[float, str, int]],
    plan: ScenePlan,
    target: Target | None = None,
) -> Figure:
    """Right answers over all, by scene."""
    _, scenes = np.unique([index for *_, index in found], return_inverse=True)
    right = np.bincount(scenes, [right for right, *_ in found])
    pair = np.stack([right, np.bincount(scenes).astype(np.float64)], 1)
    return Figure(f"instruct.{key}", label, estimate(pair, ratio, plan.seed), "share", target)


def _guessed(found: Sequence[tuple[float, str, int]]) -> float:
    truths = [truth for _, truth, _ in found]
    return max(truths.count(truth) for truth in set(truths)) / len(truths)
