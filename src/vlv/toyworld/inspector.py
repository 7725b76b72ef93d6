"""The measuring instrument: a small network that reports what is in an image.

It is trained on renders alone and knows nothing of the models it judges. It reads claims (objects
with their attributes, place, light, style), 3-D boxes, and a feature vector for the Frechet distance.
Shapes: B batch, K = 3 columns, F feature width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from vlv.toyworld.language import Claims
from vlv.toyworld.scene import (
    COLOURED_STYLES,
    COLOURS,
    COLUMNS,
    GROUNDS,
    LIGHTS,
    MATERIALS,
    ROWS,
    SHAPES,
    SIZES,
    STYLES,
    TIMES,
    VIEWS,
    Scene,
    Solid,
)

SCENE_VALUES = {"style": STYLES, "ground": GROUNDS, "time": TIMES, "light": LIGHTS, "view": VIEWS}
OBJECT_VALUES = {
    "present": ("no", "yes"),
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "material": MATERIALS,
    "row": ROWS,
}
BOX = ("x", "y", "sin 4 yaw", "cos 4 yaw")
"""What is regressed of a 3-D box; size and shape fix the rest. Yaw repeats every quarter turn."""


class InspectorConfig(PreTrainedConfig):
    """Widths of the inspector."""

    model_type = "vlv_inspector"
    channels: tuple[int, ...] | list[int] = (32, 64, 128)
    heads: int = 4


@dataclass(frozen=True, slots=True)
class Report:
    """What the inspector sees in one image."""

    claims: Claims
    boxes: tuple[tuple[float, float, float], ...]
    """x, y, yaw of every object, in the order of `claims.objects`."""


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, inputs) if inputs >= 8 else nn.Identity(),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1),
        )
        self.skip = nn.Conv2d(inputs, outputs, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.skip(x) + self.body(x))


class Inspector(PreTrainedModel):
    """Convolutions, then one learned query for the scene and one for each column."""

    config: InspectorConfig
    config_class = InspectorConfig
    base_model_prefix = ""
    main_input_name = "pixels"

    def __init__(self, config: InspectorConfig) -> None:
        super().__init__(config)
        first, second, width = config.channels
        self.body = nn.Sequential(
            nn.Conv2d(3, first, 3, 2, 1),  # (B, 32, 32, 32)
            _Residual(first, second, 2),  # (B, 64, 16, 16)
            _Residual(second, second, 1),
            _Residual(second, width, 2),  # (B, 128, 8, 8)
            _Residual(width, width, 1),
            nn.GroupNorm(8, width),
        )
        self.position = nn.Parameter(torch.zeros(1, 64, width))
        self.queries = nn.Parameter(torch.zeros(1, 1 + len(COLUMNS), width))
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())
        self.scene_head = nn.Linear(width, sum(map(len, SCENE_VALUES.values())))
        self.object_head = nn.Linear(width, sum(map(len, OBJECT_VALUES.values())) + len(BOX))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Inspector):
            nn.init.normal_(module.position, std=0.1)
            nn.init.normal_(module.queries, std=0.5)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 64, 64) in [0, 1] to features (B, 1 + K, F): the scene, then each column."""
        if pixels.shape[-2:] != (64, 64):
            pixels = F.interpolate(pixels, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
        return self.read(self.body(pixels * 2 - 1).flatten(2).mT)

    def read(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, 64, F) to features (B, 1 + K, F)."""
        x = tokens + self.position
        queries = self.queries.expand(len(x), -1, -1)
        found, _ = self.attention(queries, x, x, need_weights=False)
        return torch.as_tensor(self.mix(queries + found))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits by name: scene facts (B, values), object facts (B, K, values), box (B, K, 4)."""
        return self.answer(self.features(pixels))

    def answer(self, features: Tensor) -> dict[str, Tensor]:
        """Features (B, 1 + K, F) to logits, as `forward`."""
        scene = self.scene_head(features[:, 0]).split(
            [len(v) for v in SCENE_VALUES.values()], dim=-1
        )
        sizes = [len(v) for v in OBJECT_VALUES.values()] + [len(BOX)]
        objects = self.object_head(features[:, 1:]).split(sizes, dim=-1)
        return dict(zip(SCENE_VALUES, scene, strict=True)) | dict(
            zip((*OBJECT_VALUES, "box"), objects, strict=True)
        )

    @torch.no_grad()
    def inspect(self, pixels: Tensor, batch_size: int = 256) -> list[Report]:
        """Report on images (B, 3, H, W) in [0, 1]."""
        reports = []
        for chunk in torch.split(pixels, batch_size):
            logits = self(chunk)
            best = {k: v.argmax(-1).tolist() for k, v in logits.items() if k != "box"}
            boxes = logits["box"].tolist()
            reports += [_report(best, boxes, row) for row in range(len(chunk))]
        return reports


def _report(best: dict[str, list[Any]], boxes: list[list[list[float]]], row: int) -> Report:
    scene = {fact: values[best[fact][row]] for fact, values in SCENE_VALUES.items()}
    coloured = scene["style"] in COLOURED_STYLES
    if not coloured:
        scene = {f: v for f, v in scene.items() if f not in ("ground", "time")}
    objects, places = [], []
    for k, column in enumerate(COLUMNS):
        if not best["present"][row][k]:
            continue
        facts = {
            fact: values[best[fact][row][k]]
            for fact, values in OBJECT_VALUES.items()
            if fact != "present" and (coloured or fact != "colour")
        }
        objects.append(facts | {"column": column})
        x, y, sine, cosine = boxes[row][k]
        places.append((x, y, (math.atan2(sine, cosine) / 4) % (math.pi / 2)))
    return Report(Claims(scene, tuple(objects)), tuple(places))


def encode_scenes(scenes: list[Scene]) -> dict[str, Tensor]:
    """Training targets: class numbers, -100 where a fact cannot be seen; boxes with NaN for none."""
    rows: dict[str, list[Any]] = {k: [] for k in (*SCENE_VALUES, *OBJECT_VALUES, "box")}
    for scene in scenes:
        coloured = scene.style in COLOURED_STYLES
        for fact, values in SCENE_VALUES.items():
            hidden = fact in ("ground", "time") and not coloured
            rows[fact].append(-100 if hidden else values.index(getattr(scene, fact)))
        solids = {solid.column: solid for solid in scene.solids}
        for fact, values in OBJECT_VALUES.items():
            rows[fact].append([_target(solids, c, fact, values, coloured) for c in COLUMNS])
        rows["box"].append([_box(solids, c) for c in COLUMNS])
    return {fact: torch.tensor(values) for fact, values in rows.items()}


def _target(
    solids: dict[str, Solid], column: str, fact: str, values: tuple[str, ...], coloured: bool
) -> int:
    if fact == "present":
        return int(column in solids)
    if column not in solids or (fact == "colour" and not coloured):
        return -100
    return values.index(getattr(solids[column], fact))


def _box(solids: dict[str, Solid], column: str) -> tuple[float, float, float, float]:
    if column not in solids:
        return (math.nan,) * 4
    solid = solids[column]
    turn = (math.sin(4 * solid.yaw), math.cos(4 * solid.yaw))
    return (solid.x, solid.y, *(turn if solid.shape == "cube" else (math.nan, math.nan)))


def inspection_loss(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Sum of the cross-entropies of all facts and the squared error of the boxes; no value is asked of the device."""
    total = torch.zeros((), device=logits["style"].device)
    for fact, target in targets.items():
        if fact == "box":
            known = ~target.isnan()
            error = (logits["box"].float() - target.nan_to_num()).square() * known
            total = total + error.sum() / known.sum().clamp_min(1)
        else:
            known = target >= 0
            cost = F.cross_entropy(
                logits[fact].flatten(0, -2).float(), target.flatten(), reduction="sum"
            )
            total = total + cost / known.sum().clamp_min(1)
    return total
