from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import tiny
from vlv.errors import ConfigError, MissingPartError
from vlv.models.bottleneck import BottleneckKind, BottleneckSettings, DiscreteBottleneck, Draw
from vlv.models.draws import RowGenerator, gumbel_like, randn_like
from vlv.models.encoder import VLVEncoder
from vlv.models.pipeline import VLVPipeline

if TYPE_CHECKING:
    from pathlib import Path

KINDS: tuple[BottleneckKind, ...] = ("nearest", "gumbel")


def discrete_encoder(kind: BottleneckKind = "nearest", steps: int = 10) -> VLVEncoder:
    encoder, table = tiny.make_encoder(), tiny.make_decoder().token_table()
    encoder.discretize(table, BottleneckSettings(kind, len(table), temperature_steps=steps))
    return encoder


def table_of(encoder: VLVEncoder) -> torch.Tensor:
    assert encoder.bottleneck is not None
    return encoder.bottleneck.codebook


def small(kind: BottleneckKind, table: torch.Tensor) -> DiscreteBottleneck:
    bottleneck = DiscreteBottleneck(
        BottleneckSettings(kind, len(table), (2.0, 0.02), temperature_steps=4), table.shape[1]
    )
    bottleneck.codebook = table
    return bottleneck


def draw(rows: range = range(1), step: int = 0) -> Draw:
    return Draw(RowGenerator(3, step, rows), step)


def test_the_table_is_that_of_the_text_tower() -> None:
    decoder = tiny.make_decoder()
    table = decoder.token_table()
    assert torch.equal(table, decoder.text_encoder.get_input_embeddings().weight)
    encoder = discrete_encoder()
    assert torch.equal(table_of(encoder), table)
    assert not any("bottleneck" in name for name, _ in encoder.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient_every_token_is_a_row(
    kind: BottleneckKind, pixels: torch.Tensor
) -> None:
    encoder = discrete_encoder(kind)
    with torch.no_grad():
        z = encoder(pixels, draw(range(3)))
    ids = encoder.token_ids(z)
    assert z.shape == (3, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    assert torch.equal(z, table_of(encoder)[ids])
    assert torch.equal(z, encoder.encode_features(encoder.image_features(pixels)))
    continuous = tiny.make_encoder()(pixels)
    cosines = torch.cosine_similarity(continuous[..., None, :], table_of(encoder), dim=-1)
    assert torch.equal(ids, cosines.argmax(-1))


def test_the_length_of_z_chooses_nothing() -> None:
    bottleneck = small("nearest", torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    z = torch.tensor([[[0.01, 0.001], [1.0, 9.0], [100.0, 1.0]]])
    assert bottleneck.ids(z).tolist() == [[0, 1, 0]]


def test_the_gradient_goes_straight_through_the_nearest_row() -> None:
    bottleneck = small("nearest", torch.randn(5, 3))
    z = torch.randn(2, 4, 3, requires_grad=True)
    out = bottleneck(z, draw(range(2)))
    assert torch.equal(out, bottleneck.codebook[bottleneck.ids(z)])
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    assert torch.equal(z.grad, weights)


def test_the_gumbel_softmax_is_its_formula() -> None:
    table = torch.randn(5, 3)
    bottleneck, z = small("gumbel", table), torch.randn(1, 4, 3, requires_grad=True)
    out = bottleneck(z, draw(step=2))
    noise = gumbel_like(torch.empty(1, 4, 5), draw(step=2).generator)
    scores = 3**0.5 * z @ (table / table.norm(dim=1, keepdim=True)).T
    expected = ((scores + noise) / 0.2).softmax(-1) @ table
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert (z.grad.abs().sum(-1) > 0).all()


def test_the_temperature_falls_with_the_step_and_stays() -> None:
    bottleneck = small("gumbel", torch.randn(5, 3))
    temperatures = [bottleneck.temperature(step) for step in (0, 2, 4, 9)]
    assert temperatures == pytest.approx([2.0, 0.2, 0.02, 0.02])
    bottleneck.is_annealed = True
    assert bottleneck.temperature(0) == pytest.approx(0.02)


def test_a_cold_softmax_takes_nearly_one_row() -> None:
    bottleneck, z = small("gumbel", torch.randn(5, 3)), torch.randn(1, 40, 3, requires_grad=True)
    near = torch.cdist(bottleneck(z, draw(step=4))[0], bottleneck.codebook).amin(-1)
    far = torch.cdist(bottleneck(z, draw(step=0))[0], bottleneck.codebook).amin(-1)
    assert near.median() < 1e-3 < far.median()


def test_gumbel_draws_belong_to_rows_and_have_the_distribution() -> None:
    whole = gumbel_like(torch.empty(4, 7, 3), RowGenerator(0, 5, range(4)))
    parts = [
        gumbel_like(torch.empty(len(rows), 7, 3), RowGenerator(0, 5, rows))
        for rows in (range(1), range(1, 4))
    ]
    assert torch.equal(whole, torch.cat(parts))
    many = gumbel_like(torch.empty(100_000), torch.Generator().manual_seed(0))
    assert many.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert many.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.03)
    normal = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(normal, randn_like(normal, torch.Generator().manual_seed(1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_is_the_same(
    kind: BottleneckKind, pixels: torch.Tensor, tmp_path: Path
) -> None:
    pipe = tiny.make_pipeline()
    pipe.encoder = discrete_encoder(kind)
    pipe.save_pretrained(tmp_path / "whole")
    loaded = VLVPipeline.from_pretrained(tmp_path / "whole")
    assert torch.equal(table_of(loaded.encoder), table_of(pipe.encoder))
    assert loaded.encoder.bottleneck.settings == pipe.encoder.bottleneck.settings
    images = list(pixels)
    z = loaded.embed(images)
    assert torch.equal(z, pipe.embed(images))
    texts = loaded.read_tokens(images)
    assert texts == loaded.read_tokens(z=z) == pipe.read_tokens(images)
    assert len(texts) == 3
    assert loaded.caption(images, max_new_tokens=3) == pipe.caption(images, max_new_tokens=3)
    mixed = loaded.mix(images[:2])
    assert torch.equal(mixed, table_of(loaded.encoder)[loaded.encoder.token_ids(mixed)])

    pipe.save_pretrained(tmp_path / "half", dtype=torch.float16)
    half = VLVPipeline.from_pretrained(tmp_path / "half", dtype=torch.float16)
    assert table_of(half.encoder).dtype == torch.float16
    z = half.embed(images)
    assert torch.equal(
        z, half.text_encoder.get_input_embeddings().weight[half.encoder.token_ids(z)]
    )


def test_tokens_are_read_as_text() -> None:
    pipe = tiny.make_pipeline()
    pipe.encoder = discrete_encoder()
    ids = pipe.tokenizer("a red cube").input_ids
    z = table_of(pipe.encoder)[torch.tensor(ids)]
    assert pipe.encoder.token_ids(z).tolist() == ids
    assert pipe.read_tokens(z=z) == ["a red cube"]


def test_a_continuous_encoder_has_no_tokens(pixels: torch.Tensor) -> None:
    pipe = tiny.make_pipeline()
    with pytest.raises(ConfigError, match="z is continuous and has no token ids"):
        pipe.read_tokens(pixels[0])
    pipe.tokenizer = None
    with pytest.raises(MissingPartError, match="tokenizer"):
        pipe.read_tokens(pixels[0])
