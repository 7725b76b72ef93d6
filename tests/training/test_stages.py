from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests import tiny
from tests.training.support import loop_config, optim_config
from vlv.config import Stage1Config, Stage2Config
from vlv.errors import DataError
from vlv.models.context import Context
from vlv.models.draws import randn_like
from vlv.models.hashing import weights_hash
from vlv.models.text_tower import token_embeddings
from vlv.training.loop import fit
from vlv.training.stages import Stage1, Stage2, warm_start_share
from vlv.training.weights import load_trained

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BATCH_SIZE = 2


def make_batch(**more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH_SIZE, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    return {
        "ids": ["a", "b"],
        "pixels": torch.randint(0, 256, shape, generator=generator).to(torch.uint8),
        "captions": list(tiny.CAPTIONS[:BATCH_SIZE]),
        "step": 0,
        **more,
    }


class OneBatch:
    """The same batch for ever."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield make_batch()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def stage1(**settings: Any) -> Stage1:
    return Stage1(tiny.make_encoder(), tiny.make_decoder(), Stage1Config(**settings))


def stage2(**settings: Any) -> Stage2:
    parts = tiny.make_encoder(), tiny.make_decoder(), tiny.make_caption_decoder()
    return Stage2(*parts, Stage2Config(**settings))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trained_parts(module: nn.Module) -> set[str]:
    """First two levels of the names of the parameters that require a gradient."""
    return {
        ".".join(name.split(".")[:2]) for name, p in module.named_parameters() if p.requires_grad
    }


def vision(objective: Any) -> nn.ModuleList:
    model = objective.encoder.backbone.model
    return nn.ModuleList([model.vision_tower, model.multi_modal_projector])


def train(objective: Any, run_dir: Path, steps: int, **kwargs: Any) -> Any:
    evaluate, max_seconds = kwargs.pop("evaluate", None), kwargs.pop("max_seconds", None)
    names = ("precision", "eval_every", "train_mode")
    changes = {name: kwargs.pop(name) for name in names if name in kwargs}
    loop = loop_config(
        steps=steps, batch_size=BATCH_SIZE, save_every=None, log_every=steps, **changes
    )
    optim = optim_config(**{"lr_scale": {}, "warmup_steps": 1, **kwargs})
    return fit(
        objective, OneBatch(), loop, optim, run_dir, evaluate=evaluate, max_seconds=max_seconds
    )


# --- stage 1


def test_stage1_is_equation_1() -> None:
    objective, batch = stage1(), make_batch()
    losses = objective.loss(batch, generator(5))
    draws, decoder = generator(5), objective.decoder
    latents = decoder.encode(batch["pixels"], draws)
    t = decoder.draw_timesteps(BATCH_SIZE, draws)
    noise = randn_like(latents, draws)
    alpha = decoder.scheduler.alphas_cumprod[t][:, None, None, None]
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    c = decoder.context(objective.encoder(batch["pixels"])).sequence
    expected = (decoder.unet(noisy, t, encoder_hidden_states=c).sample - noise).square().mean()
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.parts["denoising"], expected)


def test_the_stages_freeze_the_decoder() -> None:
    for make in (Stage1, Stage2):
        decoder = tiny.make_decoder()
        decoder.requires_grad_(True)
        for part in (decoder.unet, decoder.vae, decoder.text_encoder):
            part.train()
        if make is Stage1:
            make(tiny.make_encoder(), decoder, Stage1Config())
        else:
            make(tiny.make_encoder(), decoder, tiny.make_caption_decoder(), Stage2Config())
        assert not any(p.requires_grad for p in decoder.parameters())
        assert not any(module.training for module in decoder.modules())


def test_stage1_gradient_passes_through_the_frozen_decoder() -> None:
    objective = stage1()
    objective.loss(make_batch(), generator()).total.backward()
    for name, parameter in objective.module.named_parameters():
        if parameter.requires_grad:
            assert name.startswith("encoder.")
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(("trainable", "frozen_vision"), [("language", True), ("all", False)])
def test_stage1_freezes_what_it_says(tmp_path: Path, trainable: str, frozen_vision: bool) -> None:
    objective = stage1(trainable=trainable)
    before = [
        weights_hash(part) for part in (objective.decoder, vision(objective), objective.encoder)
    ]
    train(objective, tmp_path, steps=2)
    after = [
        weights_hash(part) for part in (objective.decoder, vision(objective), objective.encoder)
    ]
    assert after[0] == before[0]
    assert (after[1] == before[1]) is frozen_vision
    assert after[2] != before[2]


@pytest.mark.slow
def test_stage1_learns_one_batch(tmp_path: Path) -> None:
    objective = stage1()
    before = objective.loss(make_batch(), generator(9)).total.detach()
    train(objective, tmp_path, steps=20)
    assert objective.loss(make_batch(), generator(9)).total.detach() < before


def test_draws_per_image_share_image_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, seen = stage1(draws_per_image=3, timesteps="text"), {}

    def denoising_loss(latents: torch.Tensor, c: Context, _: Any, **kwargs: Any) -> torch.Tensor:
        seen.update(latents=latents, c=c.sequence, **kwargs)
        return c.sequence.mean()

    monkeypatch.setattr(objective.decoder, "denoising_loss", denoising_loss)
    objective.loss(make_batch(), generator())
    assert seen["sampling"] == "text"
    for name in ("latents", "c"):
        rows = seen[name].unflatten(0, (BATCH_SIZE, 3))
        assert torch.equal(rows[:, 0], rows[:, 2])
        assert not torch.equal(rows[0, 0], rows[1, 0])


def test_cached_latents_give_the_same_loss() -> None:
    objective, batch = stage1(), make_batch()
    mean, std = objective.decoder.posterior(batch["pixels"])
    cached = batch | {"latents_mean": mean.half(), "latents_std": std.half()}
    direct = objective.loss(batch, generator(1)).total
    torch.testing.assert_close(
        objective.loss(cached, generator(1)).total, direct, atol=1e-3, rtol=1e-3
    )


def test_warm_start_hands_over_in_a_straight_line() -> None:
    config = Stage1Config(warm_start_steps=2, warm_start_fade_steps=3)
    assert [warm_start_share(step, config) for step in range(7)] == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert warm_start_share(0, Stage1Config()) == 0
    assert warm_start_share(2, Stage1Config(warm_start_steps=2)) == 0


def test_warm_start_moves_z_to_the_text_embeddings() -> None:
    objective = stage1(warm_start_steps=1, warm_start_fade_steps=1)
    batch = make_batch(own_ids=torch.tensor([[3, 9, 4], [7, 7, 5]]))
    losses = objective.loss(batch, generator())
    target = token_embeddings(objective.decoder.text_encoder, batch["own_ids"])
    z = objective.encoder(batch["pixels"])[:, :3]
    expected = (z - target).square().mean() / target.square().mean()
    torch.testing.assert_close(losses.total, expected)
    assert set(losses.parts) == {"warm_start"}
    later = objective.loss(batch | {"step": 1}, generator())
    torch.testing.assert_close(later.total, 0.5 * later.parts["denoising"] + 0.5 * expected)


def test_warm_start_without_captions_is_an_error() -> None:
    with pytest.raises(DataError, match=r'own captions as batch\["own_ids"\]'):
        stage1(warm_start_steps=5).loss(make_batch(), generator())


# --- stage 2


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        ("mlp", {"caption_decoder.mlp"}),
        ("mlp+llm", {"caption_decoder.mlp", "caption_decoder.llm"}),
        (
            "mlp+llm+encoder",
            {
                *("caption_decoder.mlp", "caption_decoder.llm"),
                *("encoder.queries", "encoder.projector", "encoder.backbone"),
            },
        ),
    ],
)
def test_stage2_freezes_what_it_says(tmp_path: Path, trainable: str, trained: set[str]) -> None:
    objective = stage2(trainable=trainable)
    assert trained_parts(objective.module) == trained
    before = {name: p.detach().clone() for name, p in objective.module.named_parameters()}
    frozen = weights_hash(objective.decoder), weights_hash(vision(objective))
    train(objective, tmp_path, steps=2)
    assert (weights_hash(objective.decoder), weights_hash(vision(objective))) == frozen
    for name, parameter in objective.module.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name


def test_stage2_is_equation_2() -> None:
    objective, batch = stage2(trainable="mlp", max_caption_tokens=6), make_batch()
    losses = objective.loss(batch, generator())
    c = objective.decoder.context(objective.encoder(batch["pixels"])).sequence
    expected = objective.caption_decoder.loss(c, batch["captions"], max_tokens=6)
    torch.testing.assert_close(losses.total, expected)
    assert set(losses.parts) == {"caption", "truncated_share", "padding_share"}


def test_stage2_tells_what_it_cuts_and_pads() -> None:
    batch = make_batch(captions=["a cube", "a cube " * 9])
    lengths = stage2().caption_decoder.tokenize(batch["captions"]).lengths.tolist()
    padded = stage2(max_caption_tokens=None, batching="padded").loss(batch, generator()).parts
    positions = [tiny.NUM_QUERIES + length - 1 for length in lengths]
    assert float(padded["padding_share"]) == pytest.approx(
        1 - sum(positions) / (2 * max(positions))
    )
    assert float(padded["truncated_share"]) == 0
    packed = stage2(max_caption_tokens=max(lengths) - 1).loss(batch, generator()).parts
    assert float(packed["padding_share"]) == 0
    assert float(packed["truncated_share"]) == 0.5


def test_phases_of_stage2() -> None:
    objective = stage2(frozen_llm_steps=1, frozen_encoder_steps=2)
    phases = [objective.phase(step) for step in range(3)]
    assert phases == ["frozen: language model, encoder", "frozen: encoder", "frozen: "]


def test_stage2_keeps_the_denoising_loss() -> None:
    settings = {"denoising_weight": 0.5, "draws_per_image": 2, "timesteps": "text"}
    second, batch = stage2(**settings), make_batch()
    losses = second.loss(batch, generator(2))
    expected = losses.parts["caption"] + 0.5 * losses.parts["denoising"]
    torch.testing.assert_close(losses.total, expected)
    first = stage1(draws_per_image=2, timesteps="text")
    torch.testing.assert_close(losses.parts["denoising"], first.loss(batch, generator(2)).total)


def test_stage2_lets_the_encoder_join_in_later() -> None:
    late = stage2(frozen_encoder_steps=3, denoising_weight=0.5)
    for step, joined in ((2, False), (3, True)):
        losses = late.loss(make_batch(step=step), generator())
        losses.total.backward()
        grads = {
            name.split(".")[0] for name, p in late.module.named_parameters() if p.grad is not None
        }
        assert grads == {"caption_decoder", *(["encoder"] if joined else [])}
        assert ("denoising" in losses.parts) == joined


def test_stage2_lets_psi_then_the_language_model_then_the_encoder_in(tmp_path: Path) -> None:
    """The paper's order (Table 4); what has not joined in stays as it was, to the bit, and psi gets its gradient."""
    objective = stage2(frozen_llm_steps=2, frozen_encoder_steps=4)
    parts = {
        "psi": objective.caption_decoder.mlp,
        "llm": objective.caption_decoder.llm,
        "encoder": objective.encoder,
    }
    start = {name: weights_hash(part) for name, part in parts.items()}
    moved: dict[int, set[str]] = {}

    def look(step: int) -> dict[str, float]:
        moved[step] = {name for name, part in parts.items() if weights_hash(part) != start[name]}
        return {}

    train(objective, tmp_path, steps=5, eval_every=1, evaluate=look)
    assert [moved[step] for step in range(1, 6)] == [
        *({"psi"}, {"psi"}),
        *({"psi", "llm"}, {"psi", "llm"}),
        {"psi", "llm", "encoder"},
    ]


def test_psi_learns_the_same_through_a_frozen_language_model() -> None:
    late, at_once = stage2(frozen_llm_steps=1), stage2()
    gradients = []
    for objective in (late, at_once):
        objective.loss(make_batch(), generator()).total.backward()
        gradients.append(objective.caption_decoder.mlp[0].weight.grad)
    torch.testing.assert_close(*gradients)
    assert all(p.grad is None for p in late.caption_decoder.llm.parameters())
    late.loss(make_batch(step=1), generator()).total.backward()
    assert all(p.grad is not None for p in late.caption_decoder.llm.parameters())


def test_stage2_may_leave_queries_and_projector() -> None:
    objective = stage2(frozen_queries=True)
    assert trained_parts(objective.module) == {
        *("caption_decoder.mlp", "caption_decoder.llm", "encoder.backbone")
    }


def test_stage2_may_leave_out_the_end_token() -> None:
    """As in the authors' code: the loss is that of the words alone, and the model says that it never stops."""
    objective, batch = stage2(supervise_end=False, max_caption_tokens=None), make_batch()
    reader = objective.caption_decoder
    c = objective.decoder.context(objective.encoder(batch["pixels"])).sequence
    tokens = reader.tokenize(batch["captions"])
    shorter = reader.tokenize(batch["captions"], with_end=False)
    assert shorter.lengths.tolist() == (tokens.lengths - 1).tolist()
    words = [row[: length - 1] for row, length in zip(tokens.ids, tokens.lengths, strict=True)]
    losses = []
    for row, ids in enumerate(words):
        embedded = reader.llm.get_input_embeddings()(ids[None, :-1])
        inputs = torch.cat([reader.prefix(c[row : row + 1]), embedded], dim=1)
        logits = reader.llm(inputs_embeds=inputs).logits[0, -len(ids) :]
        losses.append(nn.functional.cross_entropy(logits, ids, reduction="none"))
    torch.testing.assert_close(objective.loss(batch, generator()).total, torch.cat(losses).mean())
    assert not reader.config.ends_by_itself
    assert stage2().caption_decoder.config.ends_by_itself


@pytest.mark.parametrize(("mode", "noisy"), [("trained", False), ("all", True)])
def test_the_frozen_vision_tower_may_drop_paths(tmp_path: Path, mode: str, noisy: bool) -> None:
    """As in the authors' code, whose model.train() reaches the frozen vision tower."""
    objective = stage1()
    seen: list[bool] = []

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(module.training)

    vision(objective)[0].register_forward_hook(watch)
    train(objective, tmp_path, steps=2, train_mode=mode, evaluate=lambda step: {}, eval_every=1)
    assert seen == [noisy, noisy]
    assert not vision(objective)[0].training


def test_stage2_needs_only_the_text_tower_without_denoising() -> None:
    objective = stage2(trainable="mlp")
    objective.decoder.unet = objective.decoder.vae = objective.decoder.scheduler = None
    assert objective.loss(make_batch(), generator()).total.isfinite()


@pytest.mark.slow
def test_stage2_overfits_one_batch_and_loads_by_part(tmp_path: Path) -> None:
    objective, batch = stage2(), make_batch()
    first = float(objective.loss(batch, generator()).total.detach())
    train(objective, tmp_path, steps=25)
    last = objective.loss(batch, generator()).total.detach()
    assert float(last) < 0.5 * first
    again = stage2()
    load_trained(again.encoder, tmp_path, part="encoder")
    load_trained(again.caption_decoder, tmp_path, part="caption_decoder")
    again.module.eval()
    torch.testing.assert_close(again.loss(batch, generator()).total.detach(), last)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [None, ""])
def test_stage2_names_a_record_without_caption(missing: str | None) -> None:
    with pytest.raises(DataError, match="b has no caption"):
        stage2().loss(make_batch(captions=["something", missing]), generator())
