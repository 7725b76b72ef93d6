"""What a caption of `vlv caption` depends on, and the columns of its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from vlv.errors import ConfigError
from vlv.jobs.wording import Wording
from vlv.models.arguments import whole_number
from vlv.models.decoding import MOST_WORDS
from vlv.models.json_writing import checked_schema
from vlv.models.words import check_agreement, checked_words, missing_words
from vlv.storage import Json

if TYPE_CHECKING:
    from vlv.models.verification import Verification

COLUMNS: dict[str, type] = {
    "id": str,
    "file_name": str,
    "caption": str,
    "n_tokens": int,
    "finish_reason": str,  # "stop": the model ended the caption; "length": it was cut off
    "model": str,
    "seed": int,
    "width": int,
    "height": int,
    "sha256": str,
    "file_size": int,
    "mtime_ns": int,
    "error": str,
}
CHECK_COLUMNS: dict[str, type] = {"score": float, "margin": float, "n_candidates": int}
"""Of verified captions; see `Check`."""
INCLUDE_COLUMNS: dict[str, type] = {"missing_words": str, "include_bias": float}
"""Of captions with included words: those that one of them lacks, and what was added to their logits."""


@dataclass(frozen=True)
class CaptionSettings:
    """Everything that a caption depends on, besides the image.

    Attributes:
        model: Name or folder of the model.
        revision: Its revision on the hub.
        max_new_tokens: Longest caption, in tokens of the language model; None is 300, or as many as it has positions for.
        num_beams: Beams of the search; 1 is greedy.
        temperature: Sample the tokens at this temperature; None takes the likeliest.
        top_p: Sample from the likeliest tokens that hold this share of the probability.
        seed: Seed of the sampling.
        early_stopping: End the search as soon as enough beams have ended.
        tidy: Drop repeated and unfinished sentences; None does where the model was not taught to end.
        dtype: Of the weights, such as bfloat16.
        llm_bits: Bits of the language model's weights; None is those of `dtype`.
        verify: Candidates of each image among which the frozen decoder chooses; None writes one caption.
        enough: Share of what z explains at which an image needs no further candidate; None always writes all.
        engine: Who writes, where it is not this process. Only samples depend on it: a greedy caption is the same.
        styles: Styles of the captions, each of one embedding of the image; empty writes the plain caption.
        prompt: What is asked instead of a style, in the user's words.
        words: Length that is asked for, in words.
        context_column: Field of the records that tells what is known about an image.
        schema: JSON schema that captions follow.
        include: Words that captions should have.
        exclude: Words that captions must not have.
        wording: What is done to the text.
    """

    model: str
    revision: str | None = None
    max_new_tokens: int | None = None
    num_beams: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    early_stopping: bool = False
    tidy: bool | None = None
    dtype: str = "float32"
    llm_bits: int | None = None
    verify: int | None = None
    enough: float | None = None
    engine: str | None = None
    styles: tuple[str, ...] = ()
    prompt: str | None = None
    words: int | None = None
    context_column: str | None = None
    schema: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    wording: Wording = field(default_factory=Wording)

    def __post_init__(self) -> None:
        self._check_instructions()
        self._check_words()
        self._check_schema()
        if self.verify is None and self.enough is not None:
            raise ConfigError("enough has no effect without verify; name the number of candidates")
        if self.early_stopping and self.num_beams == 1:
            raise ConfigError("early_stopping has no effect on one beam; raise num_beams")
        if self.engine is not None and (self.num_beams > 1 or self.llm_bits is not None):
            raise ConfigError(
                f"--engine {self.engine} writes greedily or samples, with plain weights; leave --num-beams and --llm-bits out"
            )
        if self.engine is not None and (self.include or self.exclude):
            raise ConfigError(
                f"--engine {self.engine} includes and excludes no words; leave --include and --exclude out, or --engine"
            )
        for name in ("max_new_tokens", "num_beams"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")
        if self.temperature is not None and self.temperature <= 0:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0 (leave it out for the likeliest caption)"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must lie in (0, 1]")

    def _check_instructions(self) -> None:
        if self.styles and self.prompt is not None:
            raise ConfigError("--style and --prompt both say what is wanted; leave one out")
        if len(set(self.styles)) < len(self.styles):
            raise ConfigError("a style is named twice; name each once")
        asked = (self.prompt, self.words, self.context_column) != (None, None, None)
        if (self.styles or asked) and self.verify is not None:
            raise ConfigError(
                "plain captions are verified; leave --style, --prompt, --words and --context-column out, or --verify"
            )
        if self.words is not None:
            whole_number("--words", self.words, 1, MOST_WORDS)
        for name, text in (*(("style", style) for style in self.styles), ("prompt", self.prompt)):
            if text is not None and not text.strip():
                raise ConfigError(f"--{name} is empty; give a text, or leave it out")

    def _check_words(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, checked_words(f"--{name}", getattr(self, name)))
        check_agreement(self.include, self.exclude)
        for name in ("prefix", "suffix", "trigger"):
            text = getattr(self.wording, name) or ""
            if found := missing_words(self.exclude, text, there=True):
                raise ConfigError(
                    f"--{name} holds {found[0]!r}, which --exclude keeps out; leave one out"
                )

    def _check_schema(self) -> None:
        if self.schema is None:
            return
        object.__setattr__(self, "schema", checked_schema(self.schema))
        others = (self.include, self.exclude, self.verify, self.engine, self.tidy)
        if any(others) or self.wording != Wording():
            raise ConfigError(
                "a caption by a schema is JSON; leave --include, --exclude, --verify, --engine, --tidy, --prefix, --suffix, "
                "--trigger and --max-words out, or --json-schema"
            )

    @property
    def samples(self) -> bool:
        """Whether chance has a part in the caption that is written first."""
        return self.temperature is not None or self.top_p is not None

    @property
    def columns(self) -> dict[str, type]:
        """Of the table."""
        styles = dict.fromkeys(self.style_columns.values(), str)
        checks = {} if self.verify is None else CHECK_COLUMNS
        return COLUMNS | styles | checks | (INCLUDE_COLUMNS if self.include else {})

    @property
    def style_columns(self) -> dict[str, str]:
        """By style, the column of its captions; one style alone is the caption."""
        return {} if len(self.styles) < 2 else {name: f"caption_{name}" for name in self.styles}

    def lasting(self) -> Json:
        """What the rows of a table depend on: one that is greedy may go on with another writer."""
        has_chance = self.samples or self.verify is not None
        return asdict(self) | {"engine": self.engine if has_chance else None}

    def verification(self) -> Verification | None:
        """How captions are verified, if they are.

        Raises:
            ConfigError: A number is out of its range.
        """
        from vlv.models.verification import Verification

        return None if self.verify is None else Verification(self.verify, enough=self.enough)
