"""Mixing caption embeddings of several images into one (paper, section 4.4.2).

Shapes: Q queries, D text width. A mix is again a caption embedding: it goes through the text tower
with fresh positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from vlv.errors import ConfigError
from vlv.models.arguments import finite, whole_number

MixMode = Literal["concat", "average", "slerp"]


def mix_embeddings(
    zs: Sequence[Tensor],
    *,
    keep: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    mode: MixMode = "concat",
) -> Tensor:
    """Mix caption embeddings.

    "concat" is the paper's: the trailing tokens of each embedding are cut off and the leading ones
    joined, in the given order. The paper does not say how many tokens each image keeps; without
    `keep` they share Q evenly. Fewer than Q tokens in all make a shorter context. "average" is the
    weighted mean. "slerp" turns each token on the arc between two embeddings; more than two are
    joined one after the other, each with its share of the weight so far.

    Args:
        zs: Two or more caption embeddings, each (Q, D).
        keep: "concat" only: leading tokens kept of each, at most Q together.
        weights: "average" and "slerp" only: one non-negative weight for each; equal by default.
        mode: How to mix.

    Returns:
        (Q, D), or with `keep` (sum of keep, D).

    Raises:
        ConfigError: The arguments contradict each other or the embeddings.
    """
    _check_embeddings(zs)
    match mode:
        case "concat":
            _refuse("weights", weights, mode)
            return _concatenate(zs, keep)
        case "average":
            _refuse("keep", keep, mode)
            shares = _shares(zs, weights)
            return torch.stack([share * z for share, z in zip(shares, zs, strict=True)]).sum(0)
        case "slerp":
            _refuse("keep", keep, mode)
            return _slerp_all(zs, _shares(zs, weights))
    raise ConfigError(f'the mixing mode is "{mode}"; choose concat, average or slerp')


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation of each token: `share` 0 gives a, 1 gives b.

    Where two tokens are (anti)parallel the arc is not defined and they are interpolated linearly.

    Args:
        a: (Q, D).
        b: (Q, D).
        share: Position on the arc, in [0, 1].

    Returns:
        (Q, D).
    """
    cosine = torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)  # (Q,)
    angle = cosine.clamp(-1, 1).acos()[:, None]  # (Q, 1)
    sine = angle.sin()
    straight = sine < 1e-4
    sine = sine.where(~straight, torch.ones_like(sine))
    left = (((1 - share) * angle).sin() / sine).masked_fill(straight, 1 - share)
    right = ((share * angle).sin() / sine).masked_fill(straight, share)
    return (left * a + right * b).to(a.dtype)


def _concatenate(zs: Sequence[Tensor], keep: Sequence[int] | None) -> Tensor:
    limit = max(len(z) for z in zs)
    if keep is None:
        share, rest = divmod(limit, len(zs))
        keep = [share + (i < rest) for i in range(len(zs))]
    keep = _listed("keep", keep)
    if len(keep) != len(zs):
        raise ConfigError(
            f"keep has {len(keep)} numbers for {len(zs)} embeddings; give one for each"
        )
    keep = [whole_number("keep", count, -math.inf) for count in keep]
    for count, z in zip(keep, zs, strict=True):
        if not 0 <= count <= len(z):
            raise ConfigError(
                f"keep asks for {count} tokens of an embedding that has {len(z)}; "
                f"give 0 to {len(z)}"
            )
    if not 1 <= sum(keep) <= limit:
        raise ConfigError(
            f"keep adds up to {sum(keep)} tokens ({' + '.join(map(str, keep))}), but a caption "
            f"embedding has 1 to {limit}; change it"
        )
    return torch.cat([z[:count] for count, z in zip(keep, zs, strict=True)])


def _slerp_all(zs: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    def join(left: tuple[Tensor, float], right: tuple[Tensor, float]) -> tuple[Tensor, float]:
        total = left[1] + right[1]
        return slerp(left[0], right[0], right[1] / total if total else 0.0), total

    return reduce(join, zip(zs, shares, strict=True))[0]


def _shares(zs: Sequence[Tensor], weights: Sequence[float] | None) -> list[float]:
    """Weights that add up to one."""
    if len({len(z) for z in zs}) > 1:
        lengths = ", ".join(str(len(z)) for z in zs)
        raise ConfigError(
            f"only embeddings of one length can be averaged, got {lengths} tokens; use concat"
        )
    weights = [1.0] * len(zs) if weights is None else _listed("weights", weights)
    if len(weights) != len(zs):
        raise ConfigError(
            f"there are {len(weights)} weights for {len(zs)} embeddings; give one for each"
        )
    weights = [finite("a weight", weight) for weight in weights]
    if min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ConfigError(f"weights are non-negative and not all zero, got {weights}")
    return [weight / sum(weights) for weight in weights]


def _listed(name: str, values: object) -> list[Any]:
    if not isinstance(values, Iterable):
        raise ConfigError(f"{name} is {values!r:.60}; give one number for each embedding")
    return list(values)


def _check_embeddings(zs: Sequence[Tensor]) -> None:
    if len(zs) < 2:
        raise ConfigError(f"a mix needs two or more embeddings, got {len(zs)}")
    shapes = [tuple(z.shape) for z in zs]
    if any(len(shape) != 2 for shape in shapes) or len({shape[-1] for shape in shapes}) > 1:
        raise ConfigError(f"embeddings to mix have the shape (Q, D) with one D, got {shapes}")


def _refuse(name: str, value: object, mode: str) -> None:
    if value is not None:
        raise ConfigError(f"{name} has no effect on the mode {mode}; leave it out")
