"""What the ablations compare: variants of the training, and what is measured of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlv.evaluation import statistics
from vlv.evaluation.results import Unit
from vlv.evaluation.statistics import Statistic

MEASURES: dict[str, tuple[str, Statistic, Unit]] = {
    "claims": ("true claims found in reconstructions", statistics.ratio, "share"),
    "way": (
        "denoising loss: recovered share of the true caption's gain",
        statistics.recovered,
        "ratio",
    ),
    "f1": ("claims of captions: F1", statistics.f1, "share"),
    "hallucinated": ("claims of captions: hallucinated", statistics.complement, "share"),
    "recall": ("claims of captions: recall", statistics.ratio, "share"),
    "tokens": ("tokens per caption", statistics.mean, "tokens"),
    "centre": ("3-D boxes of reconstructions: L1 of the centre", statistics.ratio, "length"),
    "scale": ("3-D boxes of reconstructions: L1 of the scale", statistics.ratio, "length"),
}
"""Label, statistic and unit of what can be measured of a variant."""

CAPTION_MEASURES = ("f1", "hallucinated", "recall", "tokens")
"""What is measured of captions."""

BOXES = ("centre", "scale")
"""What is measured of 3-D boxes (paper, Table 6), against those of the originals; less is better."""

ORIGINALS = "originals"
"""Stands beside the variants where boxes are measured: the originals' boxes against the truth, the error of the inspector."""


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared.

    Attributes:
        name: In keys and folders.
        stage1: Changes of the settings of stage 1, where ``{parts}`` is the folder of the parts; None leaves it out.
        stage2: Of stage 2; None leaves it out.
        share: Of the steps of stage 1.
        choices: Further changes of the last training, among which validation chooses.
        last: The plan's preset of a training that goes on from its finished model, instead of the two stages: "stage3", or
            "captions", which learns as many steps from true captions. None trains the two stages.
        stage3: Changes of that preset. None trains nothing at all: the finished model as it is.
        teacher: Whose captions the finished model learns first: "good" ones are true, those of a "bad" teacher are the plan's.
            None leaves it as it is.
    """

    name: str
    stage1: tuple[str, ...] | None = ()
    stage2: tuple[str, ...] | None = None
    share: float = 1.0
    choices: tuple[tuple[str, ...], ...] = ()
    last: Literal["stage3", "captions"] | None = None
    stage3: tuple[str, ...] | None = ()
    teacher: Literal["good", "bad"] | None = None


@dataclass(frozen=True)
class Ablation:
    """What is compared.

    Attributes:
        title: For the reader.
        variants: What is trained.
        better: Pairs of variants of which the paper says that the first is the better one.
        measures: What is measured of them, from `MEASURES`; by the first of them rates are tuned.
        margin: A difference of shares or ratios below it counts for nothing.
        undone: Variants of which it is said how much they take back of the way from the first of these two to the second.
    """

    title: str
    variants: tuple[Variant, ...]
    better: tuple[tuple[str, str], ...]
    measures: tuple[str, ...]
    margin: float = 0.01
    undone: tuple[tuple[str, str], tuple[str, ...]] | None = None

    @property
    def captions(self) -> bool:
        """Whether a variant has a stage 2."""
        return any(variant.stage2 is not None for variant in self.variants)

    @property
    def goes_on(self) -> bool:
        """Whether all variants go on from a finished model."""
        return all(variant.last is not None for variant in self.variants)


_FRESH = (
    "model.encoder=null",
    "model.florence={parts}/florence",
    "model.prompt=List what is shown in the image.",
    "stage2.frozen_encoder_steps=0",
    "optim.lr_scale={encoder: 0.6}",  # the rate of stage 1
)
_NO_ENCODER = ("stage2.frozen_encoder_steps=0", "optim.lr_scale={}")

_BEFORE = Variant("before", last="stage3", stage3=None)
_CAPTIONS = Variant("captions", last="captions")

ABLATIONS: dict[str, Ablation] = {
    "queries": Ablation(
        "number of queries (Table 4, left)",
        (
            Variant("16", ("model.num_queries=16",)),
            Variant("32", ("model.num_queries=32",)),
            Variant("all", ("model.num_queries=null",)),
        ),
        (("32", "16"), ("all", "32")),
        ("claims", "way"),
    ),
    "unfreezing": Ablation(
        "what trains in stage 2 (Table 4, right)",
        (
            Variant("mlp", stage2=("stage2.trainable=mlp", *_NO_ENCODER)),
            Variant("mlp+llm", stage2=("stage2.trainable=mlp+llm", *_NO_ENCODER)),
            Variant(
                "mlp+llm+encoder",
                stage2=(),
                choices=tuple((f"optim.lr_scale={{encoder: {x}}}",) for x in (0.03, 0.1, 0.3)),
            ),
        ),
        (("mlp+llm", "mlp"), ("mlp+llm+encoder", "mlp+llm")),
        ("f1",),
    ),
    "data": Ablation(
        "images seen by stage 1, 8 : 18 : 34 : 40 (Table 5, left, and Table 6)",
        (*(Variant(str(n), share=n / 40) for n in (8, 18, 34)), Variant("40")),
        (("18", "8"), ("34", "18"), ("40", "34")),
        ("claims", "way", *BOXES),
    ),
    "decoder": Ablation(
        "size of the caption decoder (Table 5, right)",
        (
            Variant("small", stage2=("model.llm={parts}/llm-small",)),
            Variant("medium", stage2=()),
            Variant("large", stage2=("model.llm={parts}/llm-large",)),
        ),
        (("medium", "small"), ("large", "medium")),
        ("f1",),
    ),
    "control": Ablation(
        "with and without stage 1 (Table 7)",
        (Variant("without", stage1=None, stage2=_FRESH), Variant("with", stage2=())),
        (("with", "without"),),
        ("f1", "way"),
    ),
    "bottleneck": Ablation(
        "continuous and discrete caption embeddings (section 1)",
        (
            Variant("continuous"),
            Variant("nearest", ("model.bottleneck=nearest",)),
            Variant("gumbel", ("model.bottleneck=gumbel",)),
        ),
        (("continuous", "nearest"), ("continuous", "gumbel")),
        ("claims", "way"),
    ),
    "warm": Ablation(
        "stage 1 from images alone, and led by tags at first (ours)",
        (
            Variant("images alone"),
            Variant("warm", ("stage1.warm_start_steps=750", "stage1.warm_start_fade_steps=50")),
        ),
        (("images alone", "warm"),),
        ("claims", "way"),
    ),
    "drift": Ablation(
        "z after stage 2, with and without the denoising loss (ours)",
        (
            Variant("before"),
            Variant("captions alone", stage2=("stage2.denoising_weight=0",)),
            Variant(
                "denoising too", stage2=("stage2.denoising_weight=0.5", "stage2.timesteps=text")
            ),
        ),
        (
            ("captions alone", "before"),
            ("denoising too", "before"),
            ("denoising too", "captions alone"),
        ),
        ("claims", "way", "f1"),
    ),
    "rewards": Ablation(
        "what judges captions in stage 3 (ours)",
        (
            _BEFORE,
            *(
                Variant(name, last="stage3", stage3=(f"stage3.reward={name}",))
                for name in ("denoising", "drawing", "redrawing", "context", "log_prob")
            ),
            _CAPTIONS,
        ),
        (
            ("denoising", "before"),
            *(("denoising", name) for name in ("drawing", "redrawing", "context", "log_prob")),
            ("captions", "before"),
        ),
        CAPTION_MEASURES,
    ),
    "methods": Ablation(
        "how stage 3 learns from rewards (ours)",
        (
            _BEFORE,
            Variant("rejection", last="stage3", stage3=("stage3.method=rejection",)),
            Variant("dpo", last="stage3", stage3=("stage3.method=dpo",)),
            Variant("rloo", last="stage3", stage3=("stage3.method=rloo",)),
            _CAPTIONS,
        ),
        (
            *((name, "before") for name in ("rejection", "dpo", "rloo", "captions")),
            ("rloo", "rejection"),
            ("rloo", "dpo"),
        ),
        CAPTION_MEASURES,
    ),
    "teacher": Ablation(
        "what stage 3 takes back of a bad teacher's errors (ours)",
        (
            Variant("good", last="stage3", stage3=None, teacher="good"),
            Variant("bad", last="stage3", stage3=None, teacher="bad"),
            Variant("stage3", last="stage3", teacher="bad"),
            Variant("captions", last="captions", teacher="bad"),
        ),
        (("good", "bad"), ("stage3", "bad"), ("captions", "bad"), ("stage3", "captions")),
        CAPTION_MEASURES,
        undone=(("good", "bad"), ("stage3", "captions")),
    ),
}
"""All that there are. "without" trains its fresh encoder from the first step of stage 2, at the rate of stage 1."""
