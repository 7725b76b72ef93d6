"""From evidence to probabilities: the logistic models of doubt, kept as `doubts.json` in the model folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlv.data.foreign import decode_text, parse_object, read_file
from vlv.errors import ConfigError, DataError, ModelFolderError
from vlv.models.arguments import finite
from vlv.storage import Json

CALIBRATION_NAME = "doubts.json"


@dataclass(frozen=True)
class Logistic:
    """A logistic regression on changes of the loss, each compressed by asinh(change / scale)."""

    weights: tuple[float, ...]
    bias: float

    def probability(self, changes: Sequence[float], scale: float) -> float:
        """Of a stretch with these changes being wrong."""
        terms = zip(self.weights, changes, strict=True)
        logit = self.bias + sum(weight * math.asinh(x / scale) for weight, x in terms)
        return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0


@dataclass(frozen=True)
class Calibration:
    """What the decoder's evidence is worth, fit on captions whose truth is known; see `vlv eval doubts`."""

    scale: float
    """Change of the loss at which the features turn from linear to logarithmic."""
    threshold: float
    """Probability from which a stretch is doubtful."""
    claim: Logistic
    """Of a claim, by its best exchange."""
    sentence: Logistic
    """Of a sentence with claims, by their best exchange and its omission."""
    plain: Logistic
    """Of a sentence without known claims, by the omission of its most misleading word and its own."""
    claims: str | None = None
    """Whose grammar reads claims out of captions; None where no grammar is known."""
    about: Json = field(default_factory=dict)
    """What it was fit on, and the figures there."""

    @classmethod
    def from_dict(cls, values: Mapping[str, object], where: object) -> Calibration:
        """Read back what `to_dict` wrote.

        Raises:
            ModelFolderError: A field is missing or holds something else.
        """
        try:
            models = {
                name: _logistic(values[name], num)
                for name, num in (("claim", 1), ("sentence", 2), ("plain", 2))
            }
            scale, threshold = (finite(x, values[x]) for x in ("scale", "threshold"))
            claims, about = values.get("claims"), values.get("about", {})
            if scale <= 0 or not isinstance(claims, str | None) or not isinstance(about, dict):
                raise ValueError("scale must be above 0, claims a name, and about an object")
            return cls(scale, threshold, **models, claims=claims, about=about)
        except (KeyError, TypeError, ValueError, ConfigError) as error:
            raise ModelFolderError(
                f"{where} holds no calibration ({error}); write it with vlv eval doubts --fit"
            ) from error

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a file.

        Raises:
            ModelFolderError: It cannot be read, or holds something else.
        """
        try:
            values = parse_object(decode_text(read_file(path), path), path)
        except DataError as error:
            raise ModelFolderError(str(error)) from error
        return cls.from_dict(values, path)

    def to_dict(self) -> Json:
        """As JSON values."""
        return asdict(self)


def _logistic(values: object, num: int) -> Logistic:
    if not isinstance(values, dict) or len(values["weights"]) != num:
        raise ValueError(f"a model with {num} weights is wanted")
    return Logistic(
        tuple(finite("weight", x) for x in values["weights"]), finite("bias", values["bias"])
    )


def read_calibration(folder: Path) -> Calibration | None:
    """That of a model folder; None where it has none.

    Raises:
        ModelFolderError: It is damaged.
    """
    path = folder / CALIBRATION_NAME
    return Calibration.load(path) if path.is_file() else None
