"""Arguments of public methods: a wrong one is refused in one sentence that names the right one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vlv.errors import ConfigError, MissingPartError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

MAX_SEED = 2**63 - 1
"""Larger numbers do not fit into a generator."""

Embeddings = Tensor | ArrayLike
"""Caption embeddings (Q, D) or (B, Q, D): a tensor, an array or nested lists."""


def named(*options: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Refuse an unknown keyword of a method, and show its options under their names.

    Args:
        *options: The dataclasses whose fields a method takes as ``**options: Unpack[...]``; `help` and notebooks
            list them with their defaults.
    """

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(method)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = [field for kind in options for field in dataclasses.fields(kind)]
        named = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for field in fields
        ]
        signature = signature.replace(parameters=[*kept, *named])

        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in signature.parameters:
                    known = [name for name in signature.parameters if name not in ("self", "cls")]
                    raise ConfigError(f"{method.__name__} has no {name}; {nearest(name, known)}")
            return method(*args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def nearest(name: str, known: Sequence[str]) -> str:
    """What may have been meant.

    >>> nearest("torch_dtype", ["device", "dtype"])
    'did you mean dtype?'
    """
    if close := difflib.get_close_matches(name, known, 1, 0.5):
        return f"did you mean {close[0]}?"
    return f"choose from {', '.join(known)}"


def present(part: T | None, name: str) -> T:
    """A component that may be absent.

    Raises:
        MissingPartError: It is.
    """
    if part is None:
        raise missing(name)
    return part


def missing(name: str) -> MissingPartError:
    """The error that says which component is absent."""
    return MissingPartError(
        f"this model was loaded without its {name}, which this step needs; load it too"
    )


def whole_number(name: str, value: object, low: float, high: float = math.inf) -> int:
    """An integer within bounds.

    Raises:
        ConfigError: It is another.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ConfigError(f"{name} is {value!r}; give a whole number")
    if not low <= value <= high:
        wanted = f"{low} or more" if high == math.inf else f"between {low} and {high}"
        raise ConfigError(f"{name} is {value}; choose {wanted}")
    return int(value)


def finite(name: str, value: object) -> float:
    """A real number, neither NaN nor infinite.

    Raises:
        ConfigError: It is another thing.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise ConfigError(f"{name} is {value!r}; give a number")
    if not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; give a finite number")
    return float(value)


def as_embeddings(z: Embeddings) -> Tensor:
    """Caption embeddings of any kind as a float tensor (Q, D) or (B, Q, D).

    Raises:
        ConfigError: They are of another shape, empty, complex or not finite.
    """
    try:
        if not isinstance(z, Tensor):
            rows = z if isinstance(z, list | tuple) else ()
            tensors = [row for row in rows if isinstance(row, Tensor)]
            z = torch.stack(tensors) if len(tensors) == len(rows) > 0 else torch.tensor(np.array(z))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"z is a caption embedding (Q, D) or several (B, Q, D), not a {type(z).__name__} of this kind ({reason})"
        ) from error
    if z.ndim not in (2, 3) or z.numel() == 0 or z.is_complex():
        kind = str(z.dtype).removeprefix("torch.")
        raise ConfigError(
            f"z is a caption embedding (Q, D) or several (B, Q, D), got the shape {tuple(z.shape)} of {kind}"
        )
    z = z if z.is_floating_point() else z.float()
    z = z.float() if z.dtype == torch.float64 else z
    if not z.isfinite().all():
        raise ConfigError("z holds NaN or infinity; take it from embed or mix")
    return z
