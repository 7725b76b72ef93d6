"""Search, measured where the truth is known: rendered scenes in an index, found by text and by image.

A text finds its scene when the first hit satisfies everything that the text says, whichever scene that is. An image finds its
scene when the same content in another style is among the first ten. Rivals: the first stage alone, and search among the model's own
captions of the scenes by the same text tower. Shapes: N scenes, T tokens, d width of the search space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image

from vlv.data.records import Record
from vlv.errors import ConfigError
from vlv.evaluation.experiments.scene_plan import ScenePlan
from vlv.evaluation.results import Figure, Results, Section, Target
from vlv.evaluation.statistics import estimate, mean
from vlv.models.arguments import whole_number
from vlv.models.draws import mixed_seed
from vlv.search.build import IndexJob, ModelName
from vlv.search.fit import Captioned, fit_space
from vlv.search.index import CANDIDATES, Hit, Index, Query
from vlv.search.space import max_sim, read_texts
from vlv.toyworld.language import compare, parse
from vlv.toyworld.render import render
from vlv.toyworld.scene import COLOURED_STYLES, STYLES
from vlv.toyworld.writing import FORMS, Form, describe

if TYPE_CHECKING:
    from torch import Tensor

    from vlv.jobs.table import Row
    from vlv.models.pipeline import VLVPipeline
    from vlv.models.search_space import FittedSpace, Space
    from vlv.toyworld.scene import Scene
    from vlv.training.search_space import FitPlan

TEXT_TO_IMAGE = Target(0.8, 0.95)
"""Recall at 1, mean over the forms of texts."""
IMAGE_TO_IMAGE = Target(0.6, 0.85)
"""Recall at 10 of the same content in another style."""
_AT = 10
_TAUGHT: tuple[tuple[Form, int], ...] = (("short", 2), ("tags", 1), ("detailed", 1), ("plain", 3))
"""How many texts of each form a space is fitted to: those that say least are the hardest to find by."""


@dataclass(frozen=True, slots=True)
class SearchPlan(ScenePlan):
    """Which scenes are in the index, and how many of them are searched for.

    Raises:
        ConfigError: A number is out of its range.
    """

    queries: int = 500
    """Scenes that are searched for, by a text of each form and by an image."""
    candidates: int = CANDIDATES
    captions: bool = True
    """Whether the model's own captions are searched for comparison; they take the longest."""

    def __post_init__(self) -> None:
        super(SearchPlan, self).__post_init__()  # slots make another class of this one
        whole_number("queries", self.queries, 1)
        whole_number("candidates", self.candidates, 1)
        if self.queries > self.num:
            raise ConfigError(f"{self.queries} scenes cannot be searched for among {self.num}")


@dataclass(frozen=True)
class _RenderedFile:
    """The image file of a scene, rendered when it is read."""

    raw_pixels: ClassVar[bool] = False
    scene: Scene
    size: int

    @property
    def path(self) -> str:
        return "scenes"

    def read(self) -> bytes:
        buffer = BytesIO()
        Image.fromarray(render(self.scene, self.size).image).save(buffer, "PNG")
        return buffer.getvalue()


def build(
    pipe: VLVPipeline,
    plan: SearchPlan,
    folder: Path,
    report: Callable[[int], None],
    space: Space | None = None,
) -> Index:
    """Index the scenes; what the folder holds is kept."""
    files = (_RenderedFile(plan.scene(index), pipe.image_size) for index in range(plan.num))
    records = [Record(str(index), file) for index, file in enumerate(files)]
    where = folder / f"index-{plan.split}-{plan.seed}"
    name = ModelName(str(pipe.config.get("_name_or_path")))
    job = IndexJob(records, name, where, space)
    report(job.skipped)
    job.run(lambda: pipe, batch_size=plan.batch_size, report=lambda batch: report(len(batch)))
    index = Index(where, pipe)
    if len(index) != plan.num:
        raise ConfigError(
            f"{where} holds {len(index)} scenes and not {plan.num}; name another folder"
        )
    return index


def fit(
    pipe: VLVPipeline, plan: ScenePlan, how: FitPlan, report: Callable[[int], None]
) -> FittedSpace:
    """Fit a search space to scenes, texts of every form, and the same content in another style."""
    scenes = [plan.scene(index) for index in range(plan.num)]
    others = [in_another_style(scene, plan.seed, index) for index, scene in enumerate(scenes)]
    c, variants = (_contexts(pipe, some, plan.batch_size, report) for some in (scenes, others))
    texts = [
        [_text(plan, form, index, draw) for form, count in _TAUGHT for draw in range(count)]
        for index in range(plan.num)
    ]
    return fit_space(pipe, Captioned(c, texts, variants), how, lambda loss: report(1))


def _contexts(
    pipe: VLVPipeline, scenes: Sequence[Scene], batch_size: int, report: Callable[[int], None]
) -> Tensor:
    """Contexts of rendered scenes, (N, L, D) in half precision."""
    found: list[Tensor] = []
    for start in range(0, len(scenes), batch_size):
        images = [render(x, pipe.image_size).image for x in scenes[start : start + batch_size]]
        z = pipe.embed(images, batch_size=len(images))
        found.append(pipe.context(z).sequence.cpu().half())
        report(len(images))
    return torch.cat(found)


def _text(plan: ScenePlan, form: Form, index: int, draw: int = 0) -> str:
    """A text of a scene; those of different draws say it in other words, and plain ones say other things."""
    stream = f"search {form}" if draw == 0 else f"search {form} {draw}"
    rng = np.random.default_rng(mixed_seed(plan.seed, stream, index))
    return describe(plan.scene(index), form, rng)


def write_captions(
    pipe: VLVPipeline, plan: SearchPlan, folder: Path, report: Callable[[int], None]
) -> list[str]:
    """The model's own captions of the scenes; what the folder holds is kept."""
    about = {"model": str(pipe.config.get("_name_or_path")), "split": plan.split, "seed": plan.seed}

    def make(indices: Sequence[int]) -> list[Row]:
        images = [render(plan.scene(index), pipe.image_size).image for index in indices]
        captions = pipe.caption(images, batch_size=len(images))
        return [{"index": i, "caption": text} for i, text in zip(indices, captions, strict=True)]

    rows = plan.collect(folder / "captions.jsonl", about, make, report)
    return [str(row["caption"]) for row in rows]


class CaptionSearch:
    """Search among captions as texts, in two stages as `Index` does it among images.

    Args:
        index: Its model and space.
        captions: Of the scenes, N.
    """

    def __init__(self, index: Index, captions: Sequence[str]) -> None:
        self._found = []
        for start in range(0, len(captions), 64):
            some = [text or "nothing" for text in captions[start : start + 64]]
            self._found += [index.space.text(c) for c in read_texts(index.pipe, some)]
        self._pooled = torch.stack([found.pooled for found in self._found])  # (N, d)

    def first(self, query: Query, candidates: int) -> int:
        """The number of the caption that is nearest to a text."""
        cosines = self._pooled @ query.pooled
        best = cosines.topk(min(candidates, len(cosines))).indices.tolist()
        scores = [float(max_sim(query, self._found[i].tokens[None])) for i in best]
        return int(best[int(np.argmax(scores))])


# --- measuring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """An index, the plan, and captions where they are compared."""

    index: Index
    plan: SearchPlan
    captions: Sequence[str] | None = None

    @cached_property
    def _rival(self) -> CaptionSearch | None:
        return None if self.captions is None else CaptionSearch(self.index, self.captions)

    def texts(self, form: Form) -> list[str]:
        """A text of each scene that is searched for."""
        return [_text(self.plan, form, index) for index in range(self.plan.queries)]

    def satisfied(self, text: str, number: int) -> bool:
        """Whether a scene is all that a text says."""
        found = compare(parse(text), self.plan.scene(number))
        return found.stated > 0 and found.correct == found.stated

    def by_text(self, form: Form, report: Callable[[int], None]) -> dict[str, list[bool]]:
        """For each way to search: whether the first hit of each text is right."""
        found: dict[str, list[bool]] = {"late": [], "pooled": [], "captions": []}
        for text in self.texts(form):
            (query,) = self.index.text_queries([text])
            late = self.index.rank(query, 1, self.plan.candidates)
            found["late"].append(self.satisfied(text, _number(late[0])))
            pooled = self.index.first_stage(query, 1)
            found["pooled"].append(self.satisfied(text, _number(pooled[0])))
            if self._rival is not None:
                number = self._rival.first(query, self.plan.candidates)
                found["captions"].append(self.satisfied(text, number))
            report(1)
        return {name: right for name, right in found.items() if right}

    def by_image(self, report: Callable[[int], None]) -> dict[str, list[bool]]:
        """For both stages: whether the scene is among the first ten for its content in another style."""
        found: dict[str, list[bool]] = {"late": [], "pooled": []}
        pipe = self.index.pipe
        for number in range(self.plan.queries):
            other = in_another_style(self.plan.scene(number), self.plan.seed, number)
            z = pipe.embed([render(other, pipe.image_size).image])
            (query,) = self.index.image_queries(z)
            late = self.index.rank(query, _AT, self.plan.candidates)
            found["late"].append(number in map(_number, late))
            pooled = self.index.first_stage(query, _AT)
            found["pooled"].append(number in map(_number, pooled))
            report(1)
        return found


def in_another_style(scene: Scene, seed: int, number: int) -> Scene:
    """The same scene in one of the other styles; where that knows no colours, by day, as all of its scenes are."""
    rng = np.random.default_rng(mixed_seed(seed, "style", number))
    others = [style for style in STYLES if style != scene.style]
    style = others[int(rng.integers(len(others)))]
    return replace(scene, style=style, time=scene.time if style in COLOURED_STYLES else "day")


def _number(hit: Hit) -> int:
    return int(hit.id)


_WAYS = {
    "late": "late interaction",
    "pooled": "pooled vectors alone",
    "captions": "own captions as texts",
}


def measure(measured: Measured, report: Callable[[int], None]) -> Results:
    """Recall of every way to search, by form of text and together, and by image."""
    plan = measured.plan
    by_form = {form: measured.by_text(form, report) for form in FORMS}
    by_image = measured.by_image(report)
    figures = [*_text_figures(by_form, plan.seed), *_image_figures(by_image, plan.seed)]
    return Results(asdict(plan), (Section("search", "Search", tuple(figures)),))


def _text_figures(by_form: dict[Form, dict[str, list[bool]]], seed: int) -> Iterator[Figure]:
    ways = next(iter(by_form.values()))
    for way in ways:
        together = np.array([by_form[form][way] for form in by_form], float).mean(0)
        target = TEXT_TO_IMAGE if way == "late" else None
        label = f"text to image, {_WAYS[way]}: recall at 1"
        yield Figure(f"search.text.{way}", label, estimate(together, mean, seed), "share", target)
    for form, found in by_form.items():
        for way, right in found.items():
            label = f"{form} text to image, {_WAYS[way]}: recall at 1"
            yield Figure(f"search.{form}.{way}", label, estimate(right, mean, seed))


def _image_figures(found: dict[str, list[bool]], seed: int) -> Iterator[Figure]:
    for way, right in found.items():
        label = f"image to the same content in another style, {_WAYS[way]}: recall at {_AT}"
        target = IMAGE_TO_IMAGE if way == "late" else None
        yield Figure(f"search.image.{way}", label, estimate(right, mean, seed), "share", target)
