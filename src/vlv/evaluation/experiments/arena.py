"""Experiment 3: judges rate captions from 0 to 6, or choose between two (paper, section 4.2.2, appendix D and Table 2).

The rubric is the paper's in our own words. Where its text contradicts itself we follow the appendix: 0 to 6, by coverage, absence
of hallucinations and layout. Judges are a vision model behind an address, people (`vlv eval rate`), and in the toy world the truth.
Others measure the same captions and rate nothing, see `vlv.evaluation.experiments.measures`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlv.endpoint import Answer, Client
from vlv.errors import ConfigError
from vlv.evaluation.experiments import measures
from vlv.evaluation.experiments.backends import Backends
from vlv.evaluation.experiments.predicting import predict_captions
from vlv.evaluation.experiments.run import (
    Emit,
    Judge,
    Key,
    Report,
    Run,
    Settings,
    batches,
    by_id,
    silent,
)
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import Scores, judgements
from vlv.evaluation.experiments.sources import ask_about, captions_only
from vlv.evaluation.experiments.viewing import sources_of, texts_of
from vlv.evaluation.metrics.ratings import Level, bradley_terry_estimates, krippendorff_alpha
from vlv.evaluation.results import Figure, Table
from vlv.evaluation.statistics import Estimate
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally
from vlv.toyworld.language import compare, parse

NAME = "arena"
TITLE = "Captions rated by judges, and measured"
RATING_KEY = ("id", "source")
PAIR_KEY = ("id", "first", "second")
Mode = Literal["rating", "pairs"]
TOP = 6
MAX_VERDICT_TOKENS = 400

CRITERIA = """Judge how well a description fits the picture, by three things:
1. Coverage: does it mention what the picture shows, objects, attributes, setting and style?
2. No hallucination: is everything that it states really there? Wrong objects, attributes, numbers or relations count as \
hallucinations, and so does stating as certain what the picture leaves open.
3. Layout: does it say correctly where things are, left and right, above and below, in front and behind, in the middle? An \
invented relation is a hallucination; leaving out an obvious one costs coverage."""

SCALE = """6: comprehensive, correct layout, nothing hallucinated
5: very informative, small omissions, nothing hallucinated
4: moderate coverage, several omissions, nothing hallucinated
3: limited coverage, hardly any layout, nothing hallucinated
2: informative, but something is hallucinated
1: limited coverage, and something is hallucinated
0: says little of the picture, or hallucinates several things"""

RATING_PROMPT = f"""{CRITERIA}

The scale:
{SCALE}

The description:
{{}}

Give your reasons in one or two sentences, then end with a line of its own: Rating: N"""

PAIR_PROMPT = f"""{CRITERIA}

Description A:
{{}}

Description B:
{{}}

Which fits the picture better? Give your reasons in one or two sentences, then end with a line of its own: Verdict: A, \
Verdict: B, or Verdict: tie"""


def settings(sources: Sequence[str]) -> Settings:
    """What the predictions depend on beside the data.

    Raises:
        ConfigError: A source makes no sense, or writes no captions.
    """
    return {"sources": captions_only(sources)}


predict = predict_captions


# --- judges ----------------------------------------------------------------------------------------------


Item = tuple[Row, Sample, Sequence[str]]
"""Key of a row, and what is judged: one caption of the sample, or two that are compared."""
Rater = Callable[[Iterator[Item], Emit], None]
"""Hands on a row with ``rating``, with ``winner`` (first, second, tie) for two captions, or with ``error`` for each item."""


def exact_judge(items: Iterator[Item], emit: Emit) -> None:
    """The rubric applied to the claims of a caption and the truth of the scene; of two, the greater F1 of the claims wins.

    Coverage is the share of true claims that are stated. Without a wrong claim 95 % of them give 6, 75 % give 5, half gives 4 and
    less 3; with one or two wrong ones half gives 2 and less gives 1; three, or no claim at all, give 0.
    """
    rows: list[Row] = []
    for key, sample, captions in items:
        counts, *other = (compare(parse(text), sample.known_scene) for text in captions)
        if other:
            a, b = counts.f1, other[0].f1
            rows.append({**key, "winner": "tie" if a == b else "first" if a > b else "second"})
        else:
            wrong = counts.stated - counts.correct
            rating = rubric(counts.recall, wrong, counts.stated)
            rows.append({**key, "rating": rating, "wrong": wrong})
    emit(rows)


def linear_judge(items: Iterator[Item], emit: Emit) -> None:
    """Six times the F1 of a caption's claims: a scale without the steps of the rubric, on which one wrong claim costs most of the points."""
    rows: list[Row] = []
    for key, sample, captions in items:
        (caption,) = captions
        rows.append({**key, "rating": TOP * compare(parse(caption), sample.known_scene).f1})
    emit(rows)


def rubric(coverage: float, wrong: int, stated: int) -> int:
    """The rating of a caption whose claims are known.

    >>> [rubric(c, w, 20) for c, w in [(1, 0), (0.8, 0), (0.5, 0), (0.2, 0), (0.9, 1), (0.2, 2), (0.9, 3)]]
    [6, 5, 4, 3, 2, 1, 0]
    """
    if not stated or wrong > 2:
        return 0
    if wrong:
        return 2 if coverage >= 0.5 else 1
    return 3 + sum(coverage >= threshold for threshold in (0.5, 0.75, 0.95))


def endpoint_judge(client: Client, *, pairs: bool) -> Rater:
    """A vision model behind an address, asked about many items at a time."""
    prompt, read = (PAIR_PROMPT, read_verdict) if pairs else (RATING_PROMPT, read_rating)

    def answer(found: Answer) -> Row:
        return {**read(found.text), "reason": " ".join(found.text.split())}

    def ask(items: Iterator[Item], emit: Emit) -> None:
        asked = ((key, sample, prompt.format(*captions)) for key, sample, captions in items)
        ask_about(client, asked, MAX_VERDICT_TOKENS, answer, emit)

    return ask


def measuring(load: Callable[[], measures.Meter], batch_size: int) -> Rater:
    """A judge that measures captions instead of rating them, batch by batch."""

    def measure(items: Iterator[Item], emit: Emit) -> None:
        meter = load()
        for batch in batches(list(items), batch_size):
            rows = meter([sample for _, sample, _ in batch], [texts[0] for *_, texts in batch])
            emit([{**key, **row} for (key, *_), row in zip(batch, rows, strict=True)])

    return measure


def read_rating(text: str) -> Row:
    """The rating at the end of an answer.

    Raises:
        ValueError: There is none from 0 to 6.

    >>> read_rating("It misses the cone. **Rating: 4/6**")
    {'rating': 4}
    """
    found = re.findall(r"rating\W*(\d+)", text, re.IGNORECASE) or re.findall(r"^\W*(\d)\W*$", text)
    if not found or int(found[-1]) > TOP:
        raise ValueError(f"the answer has no rating from 0 to {TOP}")
    return {"rating": int(found[-1])}


def read_verdict(text: str) -> Row:
    """The verdict at the end of an answer.

    Raises:
        ValueError: There is none.

    >>> read_verdict("A is longer, but B is right. Verdict: B")
    {'winner': 'second'}
    """
    found = re.findall(r"verdict\W*(a|b|tie)\b", text, re.IGNORECASE) or re.findall(
        r"^\W*(a|b|tie)\W*$", text, re.IGNORECASE
    )
    if not found:
        raise ValueError("the answer has no verdict of A, B or tie")
    return {"winner": {"a": "first", "b": "second", "tie": "tie"}[found[-1].lower()]}


# --- judge -----------------------------------------------------------------------------------------------


def wanted_ratings(run: Run) -> list[Key]:
    """Every caption of every source."""
    texts, samples = texts_of(run), run.data.samples()
    return [(s.id, name) for s in samples for name, captions in texts.items() if s.id in captions]


def wanted_pairs(run: Run) -> list[Key]:
    """Every two sources of every sample, in both orders."""
    having: dict[str, list[str]] = {}
    for id, source in wanted_ratings(run):
        having.setdefault(id, []).append(source)
    return [
        (id, *pair) for id, names in having.items() for pair in itertools.permutations(names, 2)
    ]


def judge(run: Run, judge: Judge, backends: Backends, report: Report = silent) -> Tally:
    """Let a judge look at the captions that it has not seen: rate them, choose between every two in both orders, or measure.

    Raises:
        ConfigError: It is no judge of captions.
    """
    run.check(NAME)
    samples = run.data.samples()
    if judge.kind in measures.KINDS:
        if judge.pairs:
            raise ConfigError(
                f"pairs has no effect on the judge {judge}, which measures; leave it out"
            )
        rater = measuring(measures.loader(str(judge), backends.device), backends.batch_size)
        about = measures.about(str(judge), samples)
    else:
        rater = _rater(judge, backends)
        about = {"judge": str(judge), "mode": "pairs" if judge.pairs else "rating"}
    columns = PAIR_KEY if judge.pairs else RATING_KEY
    wanted = wanted_pairs(run) if judge.pairs else wanted_ratings(run)
    known, texts = by_id(samples), texts_of(run)

    def make(missing: list[Key], emit: Emit) -> None:
        items: Iterator[Item] = (
            (dict(zip(columns, key, strict=True)), known[key[0]], [texts[s][key[0]] for s in key[1:]])
            for key in missing
        )  # fmt: skip
        rater(items, emit)

    return run.fill(f"judgements/{judge.name}", columns, about, wanted, make, report)


def _rater(judge: Judge, backends: Backends) -> Rater:
    if judge.kind == "exact" and not judge.value:
        return exact_judge
    if judge.kind == "linear" and not judge.value:
        if judge.pairs:
            raise ConfigError("linear rates single captions; compare two with exact")
        return linear_judge
    if judge.kind == "endpoint":
        return endpoint_judge(backends.client(judge.value), pairs=judge.pairs)
    raise ConfigError(
        f'"{judge.kind}" is no judge of captions; write exact, linear or claims for the toy world, references, clip:MODEL, or '
        "endpoint:MODEL@URL; people rate with vlv eval rate"
    )


# --- score -----------------------------------------------------------------------------------------------


def score(run: Run, seed: int) -> Scores:
    """Mean ratings, strengths, the agreement of the judges, and what was measured."""
    run.check(NAME)
    scores = Scores()
    names = [source.name for source in sources_of(run)]
    tables: dict[str, dict[tuple[str, str], float]] = {}
    for judge_name, about, rows in judgements(run, scores):
        if about["mode"] in measures.KINDS:
            measures.score(scores, judge_name, about["mode"], names, rows)
            continue
        if about["mode"] == "rating":
            tables[judge_name] = {(r["id"], r["source"]): float(r["rating"]) for r in rows}
            _ratings(scores, judge_name, names, tables[judge_name])
            outcomes = outcomes_of_ratings(names, tables[judge_name])
        else:
            outcomes = _pairs(scores, judge_name, names, rows)
        _strengths(scores, judge_name, names, outcomes, seed)
    _agreement(scores, tables)
    return scores


def _ratings(
    scores: Scores, judge_name: str, names: Sequence[str], ratings: dict[tuple[str, str], float]
) -> None:
    for name in names:
        given = {id: value for (id, source), value in ratings.items() if source == name}
        label = f"{name}: mean rating by {judge_name} (0 to {TOP})"
        scores.add(f"{name}.{judge_name}.rating", label, given, unit="points")


def outcomes_of_ratings(
    names: Sequence[str], ratings: dict[tuple[str, str], float]
) -> NDArray[np.float64]:
    """(N, P, P): the higher rating of two wins, equal ones tie."""
    ids = list(dict.fromkeys(id for id, _ in ratings))
    found = np.zeros((len(ids), len(names), len(names)))
    for row, id in enumerate(ids):
        for (i, a), (j, b) in itertools.permutations(enumerate(names), 2):
            if (id, a) in ratings and (id, b) in ratings:
                difference = ratings[id, a] - ratings[id, b]
                found[row, i, j] = 0.5 if difference == 0 else float(difference > 0)
    return found


def _pairs(
    scores: Scores, judge_name: str, names: Sequence[str], rows: Sequence[Row]
) -> NDArray[np.float64]:
    """Verdicts of both orders as one: the winner of both, or a tie where they disagree; a single order does not count."""
    place = {name: number for number, name in enumerate(names)}
    verdicts = {(r["id"], r["first"], r["second"]): r["winner"] for r in rows}
    ids = list(dict.fromkeys(row["id"] for row in rows))
    at = {id: row for row, id in enumerate(ids)}
    found = np.zeros((len(ids), len(names), len(names)))
    agree: dict[str, list[float]] = {}
    for (id, a, b), winner in verdicts.items():
        back = verdicts.get((id, b, a))
        if back is None or place[a] > place[b]:
            continue
        mirrored = {"first": "second", "second": "first", "tie": "tie"}[back]
        consistent = winner == mirrored
        agree.setdefault(id, [0.0, 0.0])
        agree[id][0] += consistent
        agree[id][1] += 1
        first = {"first": 1.0, "second": 0.0, "tie": 0.5}[winner] if consistent else 0.5
        found[at[id], place[a], place[b]] = first
        found[at[id], place[b], place[a]] = 1 - first
    label = f"{judge_name}: pairs judged alike in both orders"
    scores.add(f"{judge_name}.consistent", label, agree, "ratio")
    return found


def _strengths(
    scores: Scores,
    judge_name: str,
    names: Sequence[str],
    outcomes_NPP: NDArray[np.float64],
    seed: int,
) -> None:
    if len(names) < 2 or not outcomes_NPP.any():
        return
    for name, strength in zip(names, bradley_terry_estimates(outcomes_NPP, seed), strict=True):
        label = f"{name}: Bradley-Terry strength by {judge_name}"
        scores.figures.append(Figure(f"{name}.{judge_name}.strength", label, strength, "ratio"))
    wins = outcomes_NPP.sum(0)
    rows = [(name, *row) for name, row in zip(names, wins.tolist(), strict=True)]
    scores.tables.append(Table(f"{judge_name}: wins of row over column", ("", *names), tuple(rows)))


def _agreement(scores: Scores, tables: dict[str, dict[tuple[str, str], float]]) -> None:
    if len(tables) < 2:
        return
    units = list(dict.fromkeys(unit for ratings in tables.values() for unit in ratings))
    matrix = [[ratings.get(unit, float("nan")) for unit in units] for ratings in tables.values()]
    nan = float("nan")
    levels: tuple[Level, ...] = ("ordinal", "interval")
    for level in levels:
        alpha = krippendorff_alpha(matrix, level)
        label = f"agreement of {', '.join(tables)}: Krippendorff's alpha, {level}"
        figure = Figure(f"alpha.{level}", label, Estimate(alpha, nan, nan, len(units)), "ratio")
        scores.figures.append(figure)
