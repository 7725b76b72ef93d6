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
from vlv.evaluation.statistics import Array, estimate, f1, mean, ratio
from vlv.jobs.table import Row
from vlv.models.arguments import present
from vlv.toyworld.language import compare, parse
from vlv.toyworld.questions import Question, ask_at_length, in_usual_words
from vlv.toyworld.render import render
from vlv.toyworld.styles import STYLES, is_written_as

if TYPE_CHECKING:
    from vlv.evaluation.experiments.scene_plan import ScenePlan
    from vlv.models.pipeline import VLVPipeline

STYLE, ANSWERS, LOSS = Target(0.99, 1.0), Target(0.93, 0.98), Target(-0.003, 0.0)
_PLAIN = "plain"


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
    if present(pipe.caption_decoder, "caption_decoder").config.answers_questions:
        asked = [(row, x.question) for row, i in enumerate(indices) for x in questions(plan, i)]
        found = pipe.ask(
            z=z[[row for row, _ in asked]], questions=[text for _, text in asked], batch_size=size
        )
        for (row, _), one in zip(asked, found, strict=True):  # type: ignore[arg-type]
            answers[row].append(one.text)
    for row, index in enumerate(indices):
        captions = {name: written[row] for name, written in texts.items()}
        yield {"index": index, "captions": captions, "answers": answers[row]}


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
    if rows[0]["answers"]:
        answered, table = _answered(rows, plan)
        figures += answered
        tables.append(table)
    figures += _plain(claims, plan)
    section = Section("instruct", "Instructions", tuple(figures), tuple(tables))
    return Results(asdict(plan), (section,))


def _claims(captions: Sequence[dict[str, str]], name: str, plan: ScenePlan) -> Array:
    """Claims stated, true and correct, (N, 3)."""
    found = [compare(parse(texts[name]), plan.scene(index)) for index, texts in enumerate(captions)]
    return np.array([(x.stated, x.true, x.correct) for x in found], np.float64)


def _plain(claims: dict[str, Array], plan: ScenePlan) -> list[Figure]:
    now = claims[_PLAIN]
    figures = [
        Figure("instruct.plain.f1", "plain captions: F1 of claims", estimate(now, f1, plan.seed))
    ]
    if "before" in claims:
        then = claims["before"]
        pairs = np.concatenate([now, then], 1)
        gained = estimate(pairs, lambda x: f1(x[..., :3]) - f1(x[..., 3:]), plan.seed)
        figures += [
            Figure(
                "instruct.before.f1", "plain captions before: F1", estimate(then, f1, plan.seed)
            ),
            Figure("instruct.plain.gain", "F1 of plain captions, gained", gained, "share", LOSS),
        ]
    return figures


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
