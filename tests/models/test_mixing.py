from __future__ import annotations

from typing import Any

import pytest
import torch

from vlv.errors import ConfigError
from vlv.models.mixing import mix_embeddings, slerp


@pytest.fixture
def zs(generator: torch.Generator) -> list[torch.Tensor]:
    return [torch.randn(8, 4, generator=generator) for _ in range(3)]


def test_concat_keeps_the_leading_tokens_in_order(zs: list[torch.Tensor]) -> None:
    mixed = mix_embeddings(zs[:2], keep=[3, 5])
    assert torch.equal(mixed, torch.cat([zs[0][:3], zs[1][:5]]))


def test_concat_shares_the_tokens_evenly_by_default(zs: list[torch.Tensor]) -> None:
    assert torch.equal(mix_embeddings(zs), torch.cat([zs[0][:3], zs[1][:3], zs[2][:2]]))


def test_concat_may_be_shorter(zs: list[torch.Tensor]) -> None:
    assert torch.equal(mix_embeddings(zs[:2], keep=[0, 2]), zs[1][:2])


def test_average_is_the_weighted_mean(zs: list[torch.Tensor]) -> None:
    mixed = mix_embeddings(zs, weights=[2, 1, 1], mode="average")
    assert torch.allclose(mixed, (2 * zs[0] + zs[1] + zs[2]) / 4)
    plain = mix_embeddings(zs, mode="average")
    assert torch.allclose(plain, torch.stack(zs).mean(0), atol=1e-6)


def test_slerp_walks_the_arc() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    third = slerp(a, b, 1 / 3)
    assert torch.allclose(third, torch.tensor([[3**0.5 / 2, 0.5]]))
    assert torch.allclose(slerp(a, b, 0.0), a)
    assert torch.allclose(slerp(a, b, 1.0), b)
    assert torch.allclose(mix_embeddings([a, b], weights=[2, 1], mode="slerp"), third)


def test_slerp_of_parallel_tokens_is_linear() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[3.0, 0.0], [-1.0, 0.0]])
    assert torch.allclose(slerp(a, b, 0.5), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))


def test_slerp_joins_several(zs: list[torch.Tensor]) -> None:
    mixed = mix_embeddings(zs, weights=[1, 1, 2], mode="slerp")
    assert torch.allclose(mixed, slerp(slerp(zs[0], zs[1], 0.5), zs[2], 0.5))
    assert torch.allclose(mix_embeddings(zs, weights=[0, 0, 1], mode="slerp"), zs[2])


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (1, {}, "two or more embeddings, got 1"),
        (2, {"keep": [3]}, "keep has 1 numbers for 2 embeddings"),
        (2, {"keep": [9, 0]}, "9 tokens of an embedding that has 8"),
        (2, {"keep": [-1, 2]}, "give 0 to 8"),
        (2, {"keep": [5, 5]}, r"adds up to 10 tokens \(5 \+ 5\)"),
        (2, {"keep": [0, 0]}, "adds up to 0 tokens"),
        (2, {"keep": [1, 1], "mode": "average"}, "keep has no effect on the mode average"),
        (2, {"weights": [1, 1]}, "weights has no effect on the mode concat"),
        (2, {"weights": [1], "mode": "slerp"}, "1 weights for 2 embeddings"),
        (2, {"weights": [1, -1], "mode": "average"}, "non-negative and not all zero"),
        (2, {"weights": [0, 0], "mode": "average"}, "non-negative and not all zero"),
        (2, {"mode": "sum"}, '"sum"; choose concat, average or slerp'),
    ],
)
def test_contradictions_are_refused(
    zs: list[torch.Tensor], count: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        mix_embeddings(zs[:count], **settings)


def test_embeddings_that_do_not_fit_each_other_are_refused(zs: list[torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"shape \(Q, D\)"):
        mix_embeddings([zs[0], zs[1][None]])
    with pytest.raises(ConfigError, match=r"shape \(Q, D\)"):
        mix_embeddings([zs[0], zs[1][:, :2]])
    with pytest.raises(ConfigError, match="8, 5 tokens; use concat"):
        mix_embeddings([zs[0], zs[1][:5]], mode="average")
