"""Best of N: what choosing among several captions gains, measured where the truth is known.

N captions of each rendered scene are written once and scored once, at every timestep of the schedule that is asked for; then
choosers (the frozen decoder, the captioner's own log-probability, an oracle that knows the truth) choose among the first
1, 2, 4 ... N of them. Shapes: S scenes, K timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlv.config import Stage3Config
from vlv.errors import ConfigError, DataError
from vlv.evaluation.experiments.scene_plan import ScenePlan
from vlv.evaluation.results import Figure, Results, Section, Target, Unit
from vlv.evaluation.statistics import Array, Statistic, complement, estimate, f1, mean, ratio
from vlv.jobs.table import Row
from vlv.models.arguments import present, whole_number
from vlv.models.decoding import Generation
from vlv.models.draws import mixed_seed
from vlv.models.pixels import as_batch
from vlv.models.scoring import Scoring, score_captions
from vlv.models.verification import Verification, first_of_equals, write_candidates
from vlv.toyworld.language import compare, parse
from vlv.toyworld.render import render
from vlv.toyworld.scene import Scene
from vlv.training.rewards import REWARDS, Judges, Rollout, Seen

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline

HALLUCINATED = {8: Target(0.45, 0.3), 16: Target(0.35, 0.2)}
"""Of the wrong claims of greedy captions, by N."""
OF_THE_ORACLE = Target(0.8, 0.95)
"""Of the gain in F1 that the oracle has."""


@dataclass(frozen=True, slots=True)
class BestOfPlan(ScenePlan):
    """Which scenes, how many captions, and how they are scored.

    Raises:
        ConfigError: A number is out of its range, or there is no such reward.
    """

    candidates: int = 16
    timesteps: int = 3
    temperature: float = Verification.temperature
    """Of the samples."""
    rewards: tuple[str, ...] = ()
    """Of stage 3, that choose too; log-probability does in any case."""

    def __post_init__(self) -> None:
        super(BestOfPlan, self).__post_init__()  # slots make another class of this one
        whole_number("candidates", self.candidates, 1)
        Verification(max(2, self.candidates), self.temperature)
        Scoring(timesteps=self.timesteps)
        for name in self.rewards:
            if name not in REWARDS:
                raise ConfigError(f"there is no reward {name!r}; choose from {', '.join(REWARDS)}")

    def choosers(self) -> list[str]:
        """Rewards that choose, beside the denoising loss."""
        return sorted({"log_prob", *self.rewards} - {"denoising"})

    def sizes(self) -> list[int]:
        """The numbers of candidates that are compared.

        >>> BestOfPlan(candidates=12).sizes()
        [1, 2, 4, 8, 12]
        """
        powers = [2**power for power in range(self.candidates.bit_length())]
        return sorted({*powers, self.candidates})


def collect(
    pipe: VLVPipeline, plan: BestOfPlan, folder: Path, report: Callable[[int], None]
) -> list[Row]:
    """Write and score the captions of the scenes; what the folder holds is kept.

    Args:
        pipe: The model, with all parts.
        plan: Which scenes.
        folder: Where they are kept, for as long as the caller likes.
        report: Receives how many scenes are done.

    Returns:
        S rows: `candidates`, each with its `text`, `number`, claims `stated`, `true` and `correct`, `losses` (K), the rewards by
        name and `tokens`; and the losses `null` and `z` (K). A caption that was written before is not there again.
    """
    about = {**asdict(plan), "model": str(pipe.config.get("_name_or_path"))}
    del about["num"], about["batch_size"]  # more scenes go on from fewer
    rows = plan.collect(
        folder / "candidates.jsonl", about, lambda indices: _rows(pipe, plan, indices), report
    )
    return [row for row in rows if row["candidates"]]


@torch.no_grad()
def _rows(pipe: VLVPipeline, plan: BestOfPlan, indices: Sequence[int]) -> Iterator[Row]:
    captioner = present(pipe.caption_decoder, "caption_decoder")
    encoder = present(pipe.encoder, "encoder")
    images = [render(plan.scene(index), pipe.image_size).image for index in indices]
    pixels = as_batch(images, pipe.image_size, pipe.framing)
    z = pipe.embed(images)
    seen = Seen(pipe.decoder.encode(pixels), encoder.image_features(pixels), z, pipe.context(z))
    seeds = [mixed_seed(plan.seed, "best of", index) for index in indices]
    how = Verification(max(2, plan.candidates), plan.temperature)
    numbers = range(plan.candidates)
    written = write_candidates(captioner, seen.c.sequence, seeds, numbers, Generation(), how)
    distinct = [first_of_equals(captions) for captions in written]
    texts = [list(captions) for captions in distinct]
    scoring = Scoring(timesteps=plan.timesteps)
    scores = score_captions(pipe.decoder, seen.latents, texts, scoring, c=seen.c)
    judges = Judges(encoder, pipe.decoder, captioner, Stage3Config.model_validate({}))
    rollout = Rollout(seen, texts, plan.seed)
    rewards = {name: REWARDS[name](judges, rollout).tolist() for name in plan.choosers()}
    first = 0
    for row, index in enumerate(indices):
        kept = list(distinct[row].values())
        yield {
            "index": index,
            "candidates": [
                {
                    **_claims(caption.text, plan.scene(index)),
                    "text": caption.text,
                    "number": next(i for i, x in enumerate(written[row]) if x is caption),
                    "tokens": caption.num_tokens,
                    "losses": scores[row].losses[place].tolist(),
                    **{name: values[first + place] for name, values in rewards.items()},
                }
                for place, caption in enumerate(kept)
            ],
            "null": scores[row].null.tolist(),
            "z": present(scores[row].z, "z").tolist(),
        }
        first += len(kept)


def _claims(text: str, scene: Scene) -> dict[str, int]:
    counts = compare(parse(text), scene)
    return {"stated": counts.stated, "true": counts.true, "correct": counts.correct}


# --- choosing --------------------------------------------------------------------------------------

Chooser = Callable[[Row, list[Row]], Row]
"""From a scene's row and some of its candidates to one of them."""


def _by_loss(timesteps: Sequence[int]) -> Chooser:
    """The lowest mean loss at some of the timesteps."""

    def choose(_: Row, candidates: list[Row]) -> Row:
        return min(candidates, key=lambda x: sum(x["losses"][step] for step in timesteps))

    return choose


def _by_reward(name: str) -> Chooser:
    return lambda _, candidates: max(candidates, key=lambda x: x[name])


def _by_truth(_: Row, candidates: list[Row]) -> Row:
    return max(candidates, key=lambda x: 2 * x["correct"] / max(1, x["stated"] + x["true"]))


def choose(rows: Sequence[Row], size: int, chooser: Chooser) -> Array:
    """What is chosen among the first candidates of each scene: claims (stated, true, correct) and tokens, (S, 4)."""
    chosen = []
    for row in rows:
        first = [x for x in row["candidates"] if x["number"] < size] or row["candidates"][:1]
        best = chooser(row, first)
        chosen.append([best["stated"], best["true"], best["correct"], best["tokens"]])
    return np.array(chosen, np.float64)


def measure(rows: Sequence[Row], plan: BestOfPlan) -> Results:
    """Every chooser at every number of candidates, and what it gains on the greedy caption.

    The losses at all timesteps are one chooser; the middle one alone is another, at a share of the passes.

    Raises:
        DataError: No caption has a word.
    """
    if not rows:
        raise DataError(f"the captions of all {plan.num} scenes are empty; take another model")
    steps = range(len(rows[0]["null"]))
    choosers: dict[str, tuple[str, Chooser]] = {
        "denoising": (f"the decoder (K = {len(steps)})", _by_loss(steps)),
        "one_timestep": ("the decoder (K = 1)", _by_loss([len(steps) // 2])),
        **{name: (f"the reward {name}", _by_reward(name)) for name in plan.choosers()},
        "oracle": ("the truth", _by_truth),
    }
    if len(steps) == 1:
        del choosers["one_timestep"]
    greedy = choose(rows, 1, _by_truth)
    figures = list(_figures("greedy", "greedy", greedy, plan.seed))
    for size in plan.sizes()[1:]:
        best = choose(rows, size, _by_truth)
        for name, (label, chooser) in choosers.items():
            found = choose(rows, size, chooser)
            key, title = f"{name}.{size}", f"best of {size} by {label}"
            figures += _figures(key, title, found, plan.seed)
            figures += _gains(key, title, (greedy, found, best), size, plan.seed)
    distinct = np.array([[len(row["candidates"]) / plan.candidates] for row in rows])
    label = f"different captions among {plan.candidates}"
    figures.append(Figure("distinct", label, estimate(distinct, mean, plan.seed)))
    named = tuple(replace(figure, key=f"best_of.{figure.key}") for figure in figures)
    return Results(asdict(plan), (Section("best_of", "Best of N captions", named),))


def _figures(key: str, label: str, chosen: Array, seed: int) -> Iterator[Figure]:
    parts: tuple[tuple[str, str, Array, Statistic, Unit], ...] = (
        ("f1", "F1 of claims", chosen[:, :3], f1, "share"),
        ("hallucinated", "wrong claims", chosen[:, [2, 0]], complement, "share"),
        ("recall", "recall of claims", chosen[:, [2, 1]], ratio, "share"),
        ("tokens", "tokens", chosen[:, 3:], mean, "tokens"),
    )
    for name, text, columns, statistic, unit in parts:
        yield Figure(f"{key}.{name}", f"{label}: {text}", estimate(columns, statistic, seed), unit)


def _gains(
    key: str, label: str, tables: tuple[Array, Array, Array], size: int, seed: int
) -> Iterator[Figure]:
    """Against greedy, and as a share of what the oracle gains."""
    columns = np.concatenate([table[:, :3] for table in tables], 1)
    is_goal = key.startswith(("denoising", "one_timestep"))
    yield Figure(
        f"{key}.hallucinated_ratio",
        f"{label}: wrong claims, of greedy's",
        estimate(columns, _hallucinated_ratio, seed),
        "ratio",
        HALLUCINATED.get(size) if is_goal else None,
    )
    yield Figure(
        f"{key}.of_oracle",
        f"{label}: share of the gain in F1 that the truth has",
        estimate(columns, _share_of_gain, seed),
        "ratio",
        OF_THE_ORACLE if is_goal and size in HALLUCINATED else None,
    )


def _hallucinated_ratio(columns: Array) -> Array:
    """Share of wrong claims of columns 3 to 5 over that of 0 to 2, (stated, true, correct) each."""
    wrong = [1 - columns[..., at + 2] / columns[..., at] for at in (0, 3)]
    return wrong[1] / np.where(wrong[0] > 0, wrong[0], np.nan)


def _share_of_gain(columns: Array) -> Array:
    """Gain in F1 of columns 3 to 5 over columns 0 to 2, as a share of that of columns 6 to 8."""
    before, ours, best = f1(columns), f1(columns[..., 3:]), f1(columns[..., 6:])
    gain = best - before
    return (ours - before) / np.where(gain > 0, gain, np.nan)
