"""Experiment 7: does a mix of caption embeddings compose, and what does each span of tokens carry? (paper, section 4.4.2, Fig. 6).

The paper joins the leading tokens of two embeddings and shows images; it measures nothing. In the toy world it can be measured: a
mix should keep the objects and the layout of the first image, and take the style, or an object, of the second.

A mix is written as it is made: ``a48+b16`` are the first 48 tokens of the first embedding and then the first 16 of the second;
``b@16:32`` is the first embedding whose tokens 16 to 31 are the second's. Sample i is mixed with samples i + 1 and i + 2.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments.backends import Backends, dtype_of, with_dtype
from vlv.evaluation.experiments.instruments import inspector_instrument
from vlv.evaluation.experiments.predicting import Jobs, fill_images
from vlv.evaluation.experiments.run import Emit, Judge, Report, Run, Settings, batches, silent
from vlv.evaluation.experiments.samples import Sample
from vlv.evaluation.experiments.scoring import Scores, judgements
from vlv.evaluation.experiments.sources import Source
from vlv.evaluation.experiments.viewing import Viewer, image_rows
from vlv.evaluation.results import Table
from vlv.jobs.table import Row
from vlv.jobs.tally import Tally
from vlv.models.arguments import present
from vlv.models.mixing import mix_embeddings
from vlv.toyworld.language import Claims, compare, true_claims
from vlv.toyworld.scene import Scene
from vlv.toyworld.words import OBJECT_FACTS, SCENE_FACTS

NAME = "mixes"
TITLE = "Mixes of caption embeddings"
LAYOUT = ("column", "row")
COLUMN_FACTS = ("shape", "colour", "size", "material", "row")
NUM_SPANS = 4
_SPAN = re.compile(r"b@(\d+):(\d+)")
_JOINED = re.compile(r"([abc])(\d+)")


def settings(model: str, steps: int, guidance: float, dtype: str = "float32") -> Settings:
    """What the predictions depend on beside the data; `dtype` is that of the model, one of `DTYPES`."""
    if steps < 1 or guidance < 0:
        raise ConfigError(f"steps ({steps}) must be 1 or more and guidance ({guidance}) 0 or more")
    return with_dtype({"model": model, "steps": steps, "guidance": float(guidance)}, dtype)


def mix_names(num_tokens: int) -> list[str]:
    """All mixes of embeddings of Q tokens: alone, joined at three splits in both orders, averaged, three together, and spans.

    >>> mix_names(8)[:6], mix_names(8)[-2:]
    (['a8', 'b8', 'a2+b6', 'b2+a6', 'a4+b4', 'b4+a4'], ['b@4:6', 'b@6:8'])
    """
    q = num_tokens
    cuts = sorted({max(1, q * k // 4) for k in (1, 2, 3)})
    joined = [f"{x}{k}+{y}{q - k}" for k in cuts for x, y in ("ab", "ba") if q > k]
    third = q // 3
    threes = [f"a{q - 2 * third}+b{third}+c{third}"] if third else []
    edges = [q * k // NUM_SPANS for k in range(NUM_SPANS + 1)]
    spans = [f"b@{i}:{j}" for i, j in itertools.pairwise(edges) if j > i]
    return [f"a{q}", f"b{q}", *joined, "average", *threes, *spans]


def mix(name: str, zs: Sequence[Tensor]) -> Tensor:
    """Make one mix of up to three embeddings (Q, D)."""
    named = dict(zip("abc", zs, strict=False))
    if name == "average":
        return mix_embeddings(zs[:2], mode="average")
    if span := _SPAN.fullmatch(name):
        start, end = map(int, span.groups())
        z = named["a"].clone()
        z[start:end] = named["b"][start:end]
        return z
    parts = [(named[letter], int(count)) for letter, count in _JOINED.findall(name)]
    if len(parts) == 1:
        return parts[0][0]
    return mix_embeddings([z for z, _ in parts], keep=[count for _, count in parts])


# --- predict -----------------------------------------------------------------------------------------


def predict(run: Run, backends: Backends, report: Report = silent) -> Tally:
    """Generate the mixes that are missing, each from the noise of its first sample."""
    run.check(NAME)
    model, samples = run.settings["model"], run.data.samples()
    if len(samples) < 3:
        raise ConfigError(f"mixes of three need three samples, got {len(samples)}")
    dtype = dtype_of(run.settings)
    generator = backends.reconstructor(model, run.settings["steps"], dtype)
    place = {sample.id: row for row, sample in enumerate(samples)}

    def jobs(name: str, todo: Sequence[Sample], emit: Emit) -> Jobs:
        del emit  # a sample that cannot be opened stops the run: three mixes need it
        for batch in batches(todo, backends.batch_size):
            rows = [place[sample.id] for sample in batch]
            three = [[samples[(row + k) % len(samples)] for row in rows] for k in range(3)]
            zs = [
                generator.pipe.embed([s.load() for s in part], batch_size=len(part))
                for part in three
            ]
            z = torch.stack([mix(name, [part[i] for part in zs]) for i in range(len(batch))])
            seeds = [sample.seed for sample in batch]
            yield batch, generator.prepare_embeddings(z, seeds, run.settings["guidance"])

    total = Tally()
    for name in mix_names(present(generator.pipe.encoder, "encoder").num_queries):
        total += fill_images(
            run,
            Source(name, "z", model),
            run.settings["guidance"],
            samples,
            partial(jobs, name),
            backends.workers,
            report,
        )
    return total


def generated_mixes(run: Run) -> list[str]:
    """The mixes of which there are images, in the order in which they are made."""
    tables = (run.folder / "images").glob("*.jsonl")
    names = [path.stem.rpartition("-g")[0].replace("-", ":") for path in tables]
    return sorted(names, key=lambda name: ("@" in name, name.count("+"), name))


# --- judge -------------------------------------------------------------------------------------------


def judge(run: Run, judge: Judge, backends: Backends, report: Report = silent) -> Tally:
    """Let the inspector look at the mixes that it has not seen.

    Raises:
        ConfigError: The judge is no inspector, or the truth of the samples is not known.
        DataError: Nothing was mixed yet.
    """
    run.check(NAME)
    if judge.kind != "inspector" or not judge.value:
        raise ConfigError(f'"{judge}" judges no mixes; write inspector:FOLDER')
    guidance, samples = run.settings["guidance"], run.data.samples()
    rows = [row for name in generated_mixes(run) for row in image_rows(run, name, guidance)]
    if not rows:
        raise DataError(f"{run.folder} has no images yet; begin with vlv eval predict mixes")
    if any(sample.scene is None for sample in samples):
        raise ConfigError(
            "mixes are measured in the toy world only; look at the images of other data"
        )
    instrument = inspector_instrument(backends.inspector(judge.value), features=False)
    viewer = Viewer(run, judge.name, instrument, samples, rows[0]["side"])
    wanted = [(row["id"], row["source"], guidance) for row in rows]
    return viewer.judge(wanted, backends.batch_size, report)


# --- score -------------------------------------------------------------------------------------------


def score(run: Run, seed: int) -> Scores:
    """What every mix has of its first and of its second image, and the map of the spans."""
    del seed  # every figure is one of samples
    run.check(NAME)
    scores, samples = Scores(), run.data.samples()
    place = {sample.id: row for row, sample in enumerate(samples)}
    for _, _, rows in judgements(run, scores):
        by_mix: dict[str, list[Case]] = {}
        for row in rows:
            by_mix.setdefault(row["source"], []).append(_case(row, samples, place))
        for name, cases in by_mix.items():
            if "@" not in name:
                _measure(scores, name, cases)
        _map(scores, {name: cases for name, cases in by_mix.items() if "@" in name})
    return scores


Case = tuple[str, Claims, Scene, Scene]
"""Id, what is seen, and the two scenes that were mixed."""


def _case(row: Row, samples: Sequence[Sample], place: dict[str, int]) -> Case:
    number = place[row["id"]]
    first, second = samples[number], samples[(number + 1) % len(samples)]
    seen = Claims(row["scene"], tuple(row["objects"]))
    return row["id"], seen, first.known_scene, second.known_scene


def _measure(scores: Scores, mix_name: str, cases: Sequence[Case]) -> None:
    for letter in "ab":
        objects, layout = {}, {}
        style: dict[str, float] = {}
        for id, seen, first, second in cases:
            scene, other = (first, second) if letter == "a" else (second, first)
            by_fact = {fact: row for fact, *row in compare(Claims({}, seen.objects), scene).by_fact}
            objects[id] = _found(by_fact, OBJECT_FACTS)
            layout[id] = _found(by_fact, LAYOUT)
            if scene.style != other.style:
                style[id] = float(seen.scene.get("style") == scene.style)
        text = f"{mix_name}: facts of the objects of {letter}"
        scores.add(f"{mix_name}.{letter}.objects", text, objects, "ratio")
        text = f"{mix_name}: places of the objects of {letter}"
        scores.add(f"{mix_name}.{letter}.layout", text, layout, "ratio")
        text = f"{mix_name}: style of {letter}, where the two differ"
        scores.add(f"{mix_name}.{letter}.style", text, style)
    taken = {id: _own_objects(seen, first, second) for id, seen, first, second in cases}
    taken = {id: value for id, value in taken.items() if value[1]}
    scores.add(f"{mix_name}.b.taken", f"{mix_name}: objects that only b has", taken, "ratio")


def _found(by_fact: dict[str, list[int]], facts: Sequence[str]) -> tuple[int, int]:
    """(correct, true) over some facts."""
    return sum(by_fact[f][2] for f in facts), sum(by_fact[f][1] for f in facts)


def _own_objects(seen: Claims, first: Scene, second: Scene) -> tuple[int, int]:
    """Kinds of object of the second scene that the first lacks: how many are seen, how many there are."""
    kinds = {o["shape"] for o in true_claims(second).objects} - {
        o["shape"] for o in true_claims(first).objects
    }
    return len(kinds & {o.get("shape") for o in seen.objects}), len(kinds)


def _map(scores: Scores, by_span: dict[str, list[Case]]) -> None:
    """For every span and fact: where the two scenes differ, how often the image has the second's value."""
    rows: list[tuple[str | float, ...]] = []
    for name, cases in sorted(by_span.items(), key=lambda item: int(item[0][2:].partition(":")[0])):
        shares: list[float] = []
        for fact in (*SCENE_FACTS, *COLUMN_FACTS):
            counted = {id: _switched(fact, seen, a, b) for id, seen, a, b in cases}
            switched = {id: value for id, value in counted.items() if value[1]}
            label = f"tokens {name[2:]} from b: {fact} of b, where the two differ"
            scores.add(f"{name}.{fact}", label, switched, "ratio")
            right, total = (sum(v[k] for v in switched.values()) for k in (0, 1))
            shares.append(right / total if total else float("nan"))
        rows.append((name[2:], *shares))
    if rows:
        columns = ("tokens", *SCENE_FACTS, *COLUMN_FACTS)
        scores.tables.append(
            Table("share of facts that follow a span of tokens", columns, tuple(rows))
        )


def _switched(fact: str, seen: Claims, first: Scene, second: Scene) -> tuple[int, int]:
    """(has the second's value, the two differ): once for a fact of the scene, once for every column that both fill."""
    a, b = true_claims(first), true_claims(second)
    if fact in SCENE_FACTS:
        ours, theirs = a.scene.get(fact), b.scene.get(fact)
        if ours is None or theirs is None or ours == theirs:
            return 0, 0
        return int(seen.scene.get(fact) == theirs), 1
    found = np.zeros(2, int)
    by_column = [{o.get("column"): o.get(fact) for o in c.objects} for c in (a, b, seen)]
    for column in by_column[0].keys() & by_column[1].keys():
        ours, theirs, there = (table.get(column) for table in by_column)
        if ours and theirs and ours != theirs:
            found += (there == theirs, 1)
    return int(found[0]), int(found[1])
