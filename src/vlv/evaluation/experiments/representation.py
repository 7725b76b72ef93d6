"""What a caption embedding knows: linear probes, retrieval and arithmetic on rendered scenes, whose truth is known.

Four representations of an image stand side by side: the tokens of the frozen vision tower, z, the context c = T(z), and T of the
model's own caption. Each is looked at as the mean of its tokens and as all tokens in a row; a probe sees the first
`PLACES` principal components of either, so that all probes cost the same. The paper asks this of z in words only (its
section 6: "whether the embedding serves more than one caption remains to be shown").

Shapes: N scenes, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlv.errors import ConfigError
from vlv.evaluation.experiments.scene_plan import ScenePlan
from vlv.evaluation.experiments.search import in_another_style
from vlv.evaluation.results import Figure, Results, Section, Table
from vlv.evaluation.statistics import estimate, mean, ratio
from vlv.models.arguments import present, whole_number
from vlv.models.pixels import as_batch
from vlv.models.placement import at_work
from vlv.storage import check_settings, read_settings, replacing, write_json
from vlv.toyworld.language import true_claims
from vlv.toyworld.render import render
from vlv.toyworld.scene import COLOURED_STYLES, COLOURS, COLUMNS, HELD_OUT, SHAPES, Scene, Split
from vlv.toyworld.words import OBJECT_FACTS, SCENE_FACTS, WORDS

if TYPE_CHECKING:
    from vlv.models.pipeline import VLVPipeline

KINDS = {
    "vision": "vision tower",
    "z": "z",
    "c": "c = T(z)",
    "caption": "T(own caption)",
}
POOLS = {"mean": "mean of the tokens", "tokens": "all tokens"}
PLACES = 512
"""Principal components that a probe sees."""
PENALTIES = tuple(10.0**n for n in range(-6, 3))
"""Of ridge regression, relative to the mean variance of a component; the best on a fifth of the training scenes is taken."""
_AT = 10
_UNSEEN = -1


@dataclass(frozen=True, slots=True)
class RepresentationPlan(ScenePlan):
    """Which scenes are probed, and how many others teach the probes.

    Raises:
        ConfigError: A number is out of its range.
    """

    train: int = 2000
    """Scenes of the split train that the probes learn from."""
    queries: int = 200
    """Scenes that are searched for in another style, and that are changed by arithmetic."""

    def __post_init__(self) -> None:
        super(RepresentationPlan, self).__post_init__()  # slots make another class of this one
        whole_number("train", self.train, 20)
        whole_number("queries", self.queries, 1, self.num)


# --- what is compared ------------------------------------------------------------------------------

Tokens = dict[str, Tensor]
"""By kind, (N, T, D) in half precision."""


class Representer:
    """Represents images by the parts of a model; what a folder holds is kept.

    Args:
        pipe: The model; without a caption decoder its captions are left out.
        plan: Seed and size of a batch.
        folder: Where batches are kept, for as long as the caller likes.
        report: Receives how many images are done.

    Raises:
        OutputError: The folder holds representations of another model or plan.
    """

    def __init__(
        self,
        pipe: VLVPipeline,
        plan: RepresentationPlan,
        folder: Path,
        report: Callable[[int], None],
    ) -> None:
        if pipe.encoder is None:
            raise ConfigError("this model has no encoder; name another one with --model")
        self.pipe, self.plan, self.folder, self.report = pipe, plan, folder, report
        about = {"model": str(pipe.config.get("_name_or_path")), "seed": plan.seed}
        about |= {"split": plan.split, "batch_size": plan.batch_size}
        path = folder / "settings.json"
        if (old := read_settings(path)) is not None:
            check_settings(folder, old, about, mend="name another folder with --evidence")
        write_json(path, about)

    def represent(self, name: str, scenes: Sequence[Scene]) -> Tokens:
        """All representations of scenes, under a name that they are kept by."""
        found = []
        for start in range(0, len(scenes), self.plan.batch_size):
            some = scenes[start : start + self.plan.batch_size]
            path = self.folder / f"{name}-{start}-{len(some)}.safetensors"
            if not path.exists():
                size = self.pipe.image_size
                with replacing(path) as temporary:
                    save_file(self._tokens([render(x, size).image for x in some]), temporary)
            found.append(load_file(path))
            self.report(len(some))
        return {kind: torch.cat([batch[kind] for batch in found]) for kind in found[0]}

    @torch.no_grad()
    def _tokens(self, images: Sequence[np.ndarray]) -> Tokens:
        pipe, decoder = self.pipe, self.pipe.decoder
        encoder = present(pipe.encoder, "encoder")
        pixels = as_batch(images, pipe.image_size)
        with at_work(pipe, "encoder"):
            vision = encoder.image_features(pixels.to(encoder.device))
            z = encoder.encode_features(vision)
        found = {"vision": vision, "z": z, "c": pipe.context(z).sequence}
        if pipe.caption_decoder is not None:
            captions = list(pipe.caption(z=z, batch_size=len(z)))
            with at_work(pipe, *decoder.towers):
                found["caption"] = decoder.encode_text(captions).c.sequence
        return {kind: tokens.half().cpu().contiguous() for kind, tokens in found.items()}


def _rows(tokens: Tensor, pool: str) -> Tensor:
    """One vector for each image, (N, d) in float32."""
    return tokens.float().mean(1) if pool == "mean" else tokens.float().flatten(1)


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of training images."""

    centre: Tensor
    """(d,)."""
    axes: Tensor
    """(d, P), scaled so that the mean variance of a component is 1."""

    @classmethod
    def of(cls, rows: Tensor) -> Components:
        """The first `PLACES` of (N, d)."""
        centre = rows.mean(0)
        centred = rows - centre
        is_wide = rows.shape[1] > len(rows)
        gram = centred @ centred.T if is_wide else centred.T @ centred
        values, axes = torch.linalg.eigh(gram.double())  # from the smallest
        count = min(PLACES, max(1, int((values > 1e-9 * values[-1]).sum())))
        axes = axes[:, -count:].flip(1).float()
        if is_wide:
            axes = torch.nn.functional.normalize(centred.T @ axes, dim=0)
        scale = (centred @ axes).square().mean().sqrt().clamp(min=1e-12)
        return cls(centre, axes / scale)

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, d) to (N, P)."""
        return (rows - self.centre) @ self.axes


# --- what is asked -----------------------------------------------------------------------------------


class Labels(NamedTuple):
    """A question with a fixed choice of answers."""

    name: str
    group: str
    """Questions of a group are reported together."""
    values: np.ndarray
    """(N,): numbers of the answers; `_UNSEEN` where the image does not show it."""


def labels_of(scenes: Sequence[Scene]) -> list[Labels]:
    """What can be seen in scenes: facts of each, of the object in each column, and which object is in front."""
    table = [_answers(scene) for scene in scenes]
    names = sorted({(group, name) for answers in table for group, name in answers})
    return [
        Labels(name, group, np.array([answers.get((group, name), _UNSEEN) for answers in table]))
        for group, name in names
    ]


def _answers(scene: Scene) -> dict[tuple[str, str], int]:
    claims = true_claims(scene)
    found = {
        ("scene", fact): list(WORDS[fact]).index(claims.scene[fact])
        for fact in SCENE_FACTS
        if fact in claims.scene
    }
    found["count", "number of objects"] = len(scene.solids)
    by_column = {solid.column: solid for solid in scene.solids}
    coloured = scene.style in COLOURED_STYLES
    for column in COLUMNS:
        solid = by_column.get(column)
        for fact in OBJECT_FACTS:
            if fact != "column" and (coloured or fact != "colour"):
                value = 0 if solid is None else 1 + list(WORDS[fact]).index(getattr(solid, fact))
                found[fact, f"{fact}, {column}"] = value
    for one, other in (("left", "middle"), ("middle", "right"), ("left", "right")):
        if one in by_column and other in by_column:
            rows = [by_column[column].row for column in (one, other)]
            order = 1 if rows[0] == rows[1] else 2 * (rows[0] == "front")
            found["relation", f"{one} in front of {other}"] = order
    return found


def places_of(scenes: Sequence[Scene]) -> np.ndarray:
    """Centre and edge lengths of the 3-D box in each column, (N, 3, 6) in world units; NaN where nothing stands."""
    boxes = np.full((len(scenes), len(COLUMNS), 6), np.nan)
    for row, scene in enumerate(scenes):
        for solid in scene.solids:
            boxes[row, COLUMNS.index(solid.column)] = (*solid.centre, *solid.extent)
    return boxes


# --- probes --------------------------------------------------------------------------------------


def ridge(x: Tensor, y: Tensor, other: Tensor) -> Tensor:
    """Linear regression with an offset, (N, P) to (N, K), its penalty chosen on the last fifth; its answers to `other`, (M, K)."""
    edge = len(x) - max(1, len(x) // 5)
    errors = [
        float((_fitted(x[:edge], y[:edge], p)(x[edge:]) - y[edge:]).square().mean())
        for p in PENALTIES
    ]
    return _fitted(x, y, PENALTIES[int(np.argmin(errors))])(other)


def _fitted(x: Tensor, y: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    x, y = x.double(), y.double()
    centre, offset = x.mean(0), y.mean(0)
    gram = (x - centre).T @ (x - centre) / len(x)
    gram.diagonal().add_(penalty)
    weights = torch.linalg.solve(gram, (x - centre).T @ (y - offset) / len(x))
    return lambda other: (other.double() - centre) @ weights + offset


def classify(x: Tensor, values: np.ndarray, other: Tensor) -> np.ndarray:
    """The answer to each of `other`, from a linear probe of those whose answer is known."""
    seen = values != _UNSEEN
    classes, numbers = np.unique(values[seen], return_inverse=True)
    wanted = torch.eye(len(classes))[torch.from_numpy(numbers)]
    found: np.ndarray = classes[ridge(x[torch.from_numpy(seen)], wanted, other).argmax(1).numpy()]
    return found


class Probed(NamedTuple):
    """Scenes that taught, scenes that were asked, and both as one representation."""

    train: Tensor
    test: Tensor


def right_answers(
    given: Probed, train: Sequence[Labels], test: Sequence[Labels]
) -> dict[str, np.ndarray]:
    """By group, (N, 2): how many questions about each scene were answered rightly, and how many there were."""
    wanted = {labels.name: labels for labels in test}
    counts: dict[str, np.ndarray] = {}
    for labels in train:
        truth = wanted[labels.name].values
        answers = classify(given.train, labels.values, given.test)
        asked = truth != _UNSEEN
        rows = np.stack([asked & (answers == truth), asked], 1).astype(float)
        counts[labels.group] = counts.get(labels.group, 0) + rows
    return counts


def most_frequent(train: Sequence[Labels], test: Sequence[Labels]) -> dict[str, np.ndarray]:
    """The same of somebody who has seen no image and gives the most frequent answer."""
    nothing = [torch.zeros(len(labels[0].values), 1) for labels in (train, test)]
    return right_answers(Probed(*nothing), train, test)


def box_errors(given: Probed, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """(N, 2): distance of predicted from true centres, in world units, summed over the objects of a scene; objects."""
    errors = np.zeros((len(test), 2))
    for column in range(len(COLUMNS)):
        known, asked = (~np.isnan(boxes[:, column, 0]) for boxes in (train, test))
        boxes = torch.from_numpy(train[known, column])
        found = ridge(given.train[torch.from_numpy(known)], boxes, given.test).numpy()
        distance = np.linalg.norm(found[:, :3] - test[:, column, :3], axis=1)
        errors += np.stack([np.where(asked, distance, 0.0), asked], 1)
    return errors


# --- retrieval and arithmetic ----------------------------------------------------------------------


def recall(rows: Tensor, queries: Tensor, centre: Tensor) -> list[float]:
    """Whether image i is among the nearest ten of query i, by the cosine of centred vectors."""
    images, wanted = (torch.nn.functional.normalize(x - centre, dim=1) for x in (rows, queries))
    nearest = (wanted @ images.T).topk(min(_AT, len(images))).indices
    return [float(number in found) for number, found in enumerate(nearest.tolist())]


class Change(NamedTuple):
    """One object of a scene becomes another one: from `scene - before + after` the image of `variants[right]` is asked for."""

    scene: Scene
    before: Scene
    after: Scene
    variants: tuple[Scene, ...]
    right: int


def changes(plan: RepresentationPlan) -> Iterator[Change]:
    """Scenes of one object that takes another colour or shape, as an object of another scene did."""
    rng = np.random.default_rng([plan.seed, 7])
    alone = [_alone(plan.scene(index)) for index in range(plan.num)]
    alone = [scene for scene in alone if scene.style in COLOURED_STYLES]
    pairs = [(s, c) for s in SHAPES for c in COLOURS if (s, c) not in HELD_OUT]
    if len(alone) < 2:
        raise ConfigError("too few scenes show colours; take a larger num")
    for number in range(plan.queries):
        scene, other = (alone[i] for i in rng.choice(len(alone), 2, replace=False))
        shape, colour = scene.solids[0].shape, scene.solids[0].colour
        fact = ("colour", "shape")[number % 2]
        place = 1 if fact == "colour" else 0
        near = [
            p for p in pairs if p != (shape, colour) and p[1 - place] == (shape, colour)[1 - place]
        ]
        new = near[int(rng.integers(len(near)))]
        variants = tuple(_painted(scene, *pair) for pair in pairs)
        yield Change(
            scene, _painted(other, shape, colour), _painted(other, *new), variants, pairs.index(new)
        )


def _alone(scene: Scene) -> Scene:
    return replace(scene, solids=scene.solids[:1])


def _painted(scene: Scene, shape: str, colour: str) -> Scene:
    (solid,) = scene.solids
    return replace(scene, solids=(replace(solid, shape=shape, colour=colour),))


def hits(tokens: Tensor, pool: str, queries: Sequence[Change]) -> list[float]:
    """Whether the variant nearest to `scene - before + after` is the right one; the scene as it was is none of the choices.

    Args:
        tokens: Of scene, before, after and all variants of each change, one behind the other, (N, T, D).
        pool: How tokens become one vector.
        queries: The changes.
    """
    found, start = [], 0
    for change in queries:
        count = 3 + len(change.variants)
        rows = _rows(tokens[start : start + count], pool)
        start += count
        target = rows[0] - rows[1] + rows[2]
        distances = (rows[3:] - target).square().sum(1)
        distances[change.variants.index(change.scene)] = torch.inf
        found.append(float(int(distances.argmin()) == change.right))
    return found


# --- the study ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Questions:
    """What is asked of every representation: the same scenes, and the same truth."""

    plan: RepresentationPlan
    train: tuple[list[Labels], np.ndarray]
    """Labels and boxes of the scenes that teach."""
    test: tuple[list[Labels], np.ndarray]
    changed: list[Change]

    def chance(self) -> list[float]:
        """The cells of somebody who sees no image."""
        counts = most_frequent(self.train[0], self.test[0])
        nothing = Probed(torch.zeros(self.plan.train, 1), torch.zeros(self.plan.num, 1))
        blind = box_errors(nothing, self.train[1], self.test[1])
        found = [estimate(counts[group], ratio, self.plan.seed).value for group in _GROUPS]
        found.append(estimate(blind, ratio, self.plan.seed).value)
        return [*found, min(1.0, _AT / self.plan.num), 1 / (len(self.changed[0].variants) - 1)]

    def figures(self, kind: str, pool: str, tokens: Mapping[str, Tokens]) -> list[Figure]:
        """What one representation knows, in the order of the columns of the table."""
        name, label, seed = (
            f"representation.{kind}.{pool}",
            f"{KINDS[kind]}, {POOLS[pool]}",
            self.plan.seed,
        )
        train, test, others = (
            _rows(tokens[part][kind], pool) for part in ("train", "test", "others")
        )
        components = Components.of(train)
        given = Probed(components(train), components(test))
        counts = right_answers(given, self.train[0], self.test[0])
        found = [
            Figure(f"{name}.{group}", f"{label}: {words}", estimate(counts[group], ratio, seed))
            for group, words in _GROUPS.items()
        ]
        error = estimate(box_errors(given, self.train[1], self.test[1]), ratio, seed)
        again = estimate(recall(test, others, components.centre), mean, seed)
        sums = estimate(hits(tokens["changed"][kind], pool, self.changed), mean, seed)
        return [
            *found,
            Figure(f"{name}.box", f"{label}: distance to the centre of a 3-D box", error, "length"),
            Figure(
                f"{name}.style",
                f"{label}: the same content in another style, recall at {_AT}",
                again,
            ),
            Figure(f"{name}.arithmetic", f"{label}: the right variant is nearest to the sum", sums),
        ]


def study(representer: Representer) -> Results:
    """All figures of one model."""
    plan = representer.plan
    taught: Split = "train"
    train = [replace(plan, split=taught).scene(index) for index in range(plan.train)]
    test = [plan.scene(index) for index in range(plan.num)]
    others = [in_another_style(test[n], plan.seed, n) for n in range(plan.queries)]
    asked = Questions(
        plan,
        (labels_of(train), places_of(train)),
        (labels_of(test), places_of(test)),
        list(changes(plan)),
    )
    changed = [scene for change in asked.changed for scene in _images(change)]
    parts = {"train": train, "test": test, "others": others, "changed": changed}
    tokens = {part: representer.represent(part, scenes) for part, scenes in parts.items()}
    figures: list[Figure] = []
    rows: list[tuple[str | float, ...]] = []
    for kind in KINDS:
        for pool in POOLS if kind in tokens["test"] else ():
            found = asked.figures(kind, pool, tokens)
            figures += found
            rows.append((f"{KINDS[kind]}, {POOLS[pool]}", *(x.estimate.value for x in found)))
    rows.append(("no image", *asked.chance()))
    columns = ("representation", *_GROUPS, "3-D box", f"style at {_AT}", "arithmetic")
    table = Table("Probes, retrieval and arithmetic", columns, tuple(rows))
    title = "What the caption embedding knows"
    return Results(asdict(plan), (Section("representation", title, tuple(figures), (table,)),))


_GROUPS = {
    "count": "number of objects",
    "shape": "shape in each column",
    "colour": "colour in each column",
    "size": "size in each column",
    "material": "surface in each column",
    "row": "front or back in each column",
    "relation": "which of two objects is in front",
    "scene": "style, ground, time, light and view",
}


def _images(change: Change) -> Iterator[Scene]:
    yield from (change.scene, change.before, change.after)
    yield from change.variants


def num_images(plan: RepresentationPlan) -> int:
    """Images that `study` reads."""
    pairs = len(SHAPES) * len(COLOURS) - len(HELD_OUT)
    return plan.train + plan.num + plan.queries * (4 + pairs)
