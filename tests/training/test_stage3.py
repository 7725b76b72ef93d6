from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from tests import tiny
from tests.training.support import loop_config, optim_config
from tests.training.test_stages import BATCH_SIZE, OneBatch, make_batch, trained_parts
from vlv.config import Stage3Config
from vlv.errors import ConfigError, DataError
from vlv.models.decoding import Caption, Generation
from vlv.models.draws import RowGenerator, mixed_seed
from vlv.models.hashing import weights_hash
from vlv.models.scoring import Scoring, score_captions
from vlv.training.caption_meter import CaptionMeter, repetition
from vlv.training.interrupt import Interrupted
from vlv.training.loop import fit
from vlv.training.rewards import REWARDS, Judges, Rollout
from vlv.training.stage3 import METHODS, Stage3

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CANDIDATES = 3


def stage3(**settings: Any) -> Stage3:
    parts = tiny.make_encoder(), tiny.make_decoder(), tiny.make_caption_decoder()
    parts[2].config.answers_questions = "questions" in settings
    values = {"candidates": CANDIDATES, "max_caption_tokens": 6, "score_timesteps": 2} | settings
    return Stage3(*parts, Stage3Config(**values))


def draws(step: int = 0, rows: range = range(BATCH_SIZE)) -> RowGenerator:
    return RowGenerator(0, step, rows)


def prepared(objective: Stage3, **more: Any) -> dict[str, Any]:
    return objective.prepare(make_batch(**more), draws()) | {"step": 0}


def ends_after(captions: Sequence[str]) -> list[Caption]:
    return [Caption(text, len(text.split()), finished=True) for text in captions]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that needs no judge: the share of tokens below 200, whether the caption ends or not."""

    def judge(_: Stage3, __: Any, captions: Any, seed: int) -> torch.Tensor:
        del seed
        return torch.tensor(
            [[sum(i < 200 for i in x.ids) / max(1, len(x.ids)) for x in row] for row in captions]
        )

    monkeypatch.setattr(Stage3, "judge", judge)


# --- candidates


def test_candidates_belong_to_their_row() -> None:
    objective = stage3()
    both = prepared(objective)["rollouts"]
    second = {k: v[1:] if k != "step" else v for k, v in make_batch().items()}
    alone = objective.prepare(second, draws(rows=range(1, 2)))["rollouts"]
    assert alone == both[1:]
    assert len({tuple(row) for row in both[0]}) == CANDIDATES  # each has draws of its own
    assert objective.prepare(make_batch(), draws(step=1))["rollouts"] != both


def test_prepared_batches_are_left_alone() -> None:
    objective = stage3()
    batch = prepared(objective)
    assert objective.prepare(batch, draws(step=5)) is batch


def test_captions_and_pixels_are_needed_no_more() -> None:
    batch = prepared(stage3())
    assert "captions" not in batch
    assert batch["c"].shape == (BATCH_SIZE, tiny.NUM_QUERIES, tiny.TEXT_WIDTH)
    assert "pixels" in prepared(stage3(trainable="mlp+llm+encoder"))


def test_the_reward_is_the_loss_in_units_of_z_under_the_noise_of_the_step() -> None:
    objective, texts = stage3(), ["a red cube", "a grey floor"]
    with objective.at_rest():
        seen = objective.look(make_batch())
        found = objective.judge(seen, [ends_after(texts)] * BATCH_SIZE, seed=7)
    how = Scoring(timesteps=2, seed=7)
    latents = objective.decoder.encode(make_batch()["pixels"])
    with torch.no_grad():
        c = objective.decoder.context(objective.encoder(make_batch()["pixels"]))
    expected = score_captions(objective.decoder, latents, [texts] * BATCH_SIZE, how, c=c)
    for earned, scores in zip(found, expected, strict=True):
        assert scores.z is not None
        null, of_z = scores.null.mean(), scores.z.mean()
        shares = (null - scores.losses.mean(1)) / (null - of_z).abs()
        torch.testing.assert_close(earned, shares.clamp(-1, 2))


def test_a_caption_without_text_or_end_is_worth_no_more_than_the_worst() -> None:
    objective = stage3()
    good, endless = Caption("a cube", 2, finished=True), Caption("a cube a", 3, finished=False)
    with objective.at_rest():
        seen = objective.look(make_batch())
        rows = [[good, endless, Caption(" ", 1, finished=True)]] * BATCH_SIZE
        rewards = objective.judge(seen, rows, seed=0)
        none_good = objective.judge(seen, [[endless, endless]] * BATCH_SIZE, seed=0)
    for row in rewards:
        assert row[1] == row[2] == min(0.0, float(row[0]))
    assert none_good.tolist() == [[0.0, 0.0]] * BATCH_SIZE


def test_cached_latents_and_features_give_the_same_rewards() -> None:
    objective = stage3()
    direct = prepared(objective)
    mean, std = objective.decoder.posterior(make_batch()["pixels"])
    features = objective.encoder.image_features(make_batch()["pixels"]).detach()
    cached = make_batch(latents_mean=mean.half(), latents_std=std.half(), features=features)
    del cached["pixels"]
    found = objective.prepare(cached, draws())
    assert found["rollouts"] == direct["rollouts"]
    torch.testing.assert_close(found["rewards"], direct["rewards"], atol=2e-2, rtol=0)


# --- rewards


def rollout(objective: Stage3, texts: Sequence[str]) -> tuple[Judges, Rollout]:
    seen = objective.look(make_batch())
    judges = Judges(
        objective.encoder, objective.decoder, objective.caption_decoder, objective.config
    )
    return judges, Rollout(seen, [list(texts)] * BATCH_SIZE, seed=3)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_are_one_number_for_each_caption_and_know_its_image(name: str) -> None:
    asked = {"questions": ["red?", "how many?"]} if name == "answers" else {}
    objective = stage3(reward=name, drawing_steps=2, **asked)
    with objective.at_rest():
        found = REWARDS[name](*rollout(objective, ["a red cube", "a red cube", "a blue sphere"]))
    rows = found.view(BATCH_SIZE, 3)
    assert rows.isfinite().all()
    torch.testing.assert_close(rows[:, 0], rows[:, 1])  # all captions of an image meet one noise
    assert (rows[:, 0] - rows[:, 2]).abs().min() > 0
    assert (rows[0] - rows[1]).abs().max() > 0


def test_drawn_images_are_compared_with_the_original() -> None:
    objective = stage3(drawing_steps=2)
    with objective.at_rest():
        judges, given = rollout(objective, ["a red cube"])
        drawn = objective.decoder.sample(
            objective.decoder.encode_text(["a red cube"]).c,
            seeds=[mixed_seed(3, "drawing", 0)],
            steps=2,
            height=tiny.IMAGE_SIZE,
            width=tiny.IMAGE_SIZE,
        )
        itself = objective.look({"ids": ["a"], "pixels": drawn})
        own = REWARDS["drawing"](judges, Rollout(itself, [["a red cube"]], seed=3))
        again = REWARDS["redrawing"](judges, Rollout(itself, [["a red cube"]], seed=3))
        other = REWARDS["drawing"](judges, given)
    torch.testing.assert_close(own, torch.ones(1))
    torch.testing.assert_close(again, torch.zeros(1))
    assert other.max() < 0.9999


def test_log_prob_is_that_of_the_caption_with_its_end() -> None:
    objective = stage3()
    with objective.at_rest():
        judges, given = rollout(objective, [tiny.CAPTIONS[2]])
        found = REWARDS["log_prob"](judges, given)
        c = given.images.c.sequence
        expected = [
            -objective.caption_decoder.loss(c[i : i + 1], [tiny.CAPTIONS[2]]) for i in (0, 1)
        ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_caption_earns_by_the_answers_that_it_shares_with_its_image() -> None:
    objective = stage3(reward="answers", questions=["red?", "how many?"])
    captioner = objective.caption_decoder
    with objective.at_rest():
        judges, given = rollout(objective, ["a red cube"])
        found = REWARDS["answers"](judges, given)
        told = objective.decoder.encode_text(["a red cube"]).c.sequence
        expected = []
        for question in ("red?", "how many?"):
            how = Generation(prompt=[question] * BATCH_SIZE, tidy=False)
            of_image = captioner.write(given.images.c.sequence, how)
            losses = [captioner.loss(told, [x.text], instructions=[question]) for x in of_image]
            expected.append(-torch.stack(losses))
    torch.testing.assert_close(found, torch.stack(expected).mean(0))


def test_a_model_that_answers_nothing_can_not_be_asked() -> None:
    parts = tiny.make_encoder(), tiny.make_decoder(), tiny.make_caption_decoder()
    with pytest.raises(ConfigError, match="was not taught to answer questions"):
        Stage3(*parts, Stage3Config(reward="answers", questions=["red?"]))


# --- methods


def numbers(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows, requires_grad=True)


def test_rloo_is_the_policy_gradient_with_the_other_rewards_as_baseline() -> None:
    config = Stage3Config(max_caption_tokens=10)
    log_probs, rewards = numbers([-1.0, -2.0, -3.0]), torch.tensor([[0.9, 0.3, 0.0]])
    loss = METHODS["rloo"].loss(log_probs, torch.zeros(1, 3), rewards, config)
    loss.sum().backward()
    advantages = torch.tensor([[0.9 - 0.15, 0.3 - 0.45, 0.0 - 0.6]])
    torch.testing.assert_close(log_probs.grad, -advantages / 3 / 10)


def test_kl_takes_from_captions_that_became_likelier() -> None:
    config = Stage3Config(max_caption_tokens=1, kl=0.5)
    log_probs, equal = numbers([-1.0, -3.0]), torch.zeros(1, 2)
    METHODS["rloo"].loss(log_probs, torch.tensor([[-2.0, -2.0]]), equal, config).sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[0.5, -0.5]]  # the first falls again, the second rises


def test_rejection_learns_the_best() -> None:
    rewards = torch.tensor([[0.1, 0.7, 0.2]])
    assert METHODS["rejection"].choose(rewards).tolist() == [[1]]
    log_probs = numbers([-2.0])
    config = Stage3Config(method="rejection", max_caption_tokens=4)
    loss = METHODS["rejection"].loss(log_probs, torch.zeros(1, 1), torch.ones(1, 1), config)
    assert loss.tolist() == [0.5]


def test_dpo_prefers_the_best_to_the_worst() -> None:
    assert METHODS["dpo"].choose(torch.tensor([[0.1, 0.7, -0.2]])).tolist() == [[1, 2]]
    config = Stage3Config(method="dpo", beta=0.5)
    log_probs, reference = numbers([-1.0, -4.0]), torch.tensor([[-2.0, -3.0]])
    loss = METHODS["dpo"].loss(log_probs, reference, torch.zeros(1, 2), config)
    torch.testing.assert_close(loss, -F.logsigmoid(torch.tensor([0.5 * (1.0 - -1.0)])))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_only_clear_winners_teach(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.0, 0.0]])
    monkeypatch.setattr(Stage3, "judge", lambda *_, **__: rewards)
    objective = stage3(method=method)
    batch = prepared(objective)
    assert batch["weights"].tolist() == [0.0, 1.0]
    losses = objective.loss(batch, torch.Generator())
    assert losses.parts["clear_share"] == 0.5
    losses.total.backward()
    only_second = {k: v[1:] if k != "step" else v for k, v in batch.items()}
    again = stage3(method=method)
    (again.loss(only_second, torch.Generator()).total / 2).backward()
    for mine, other in zip(
        objective.caption_decoder.mlp.parameters(),
        again.caption_decoder.mlp.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(mine.grad, other.grad)


def test_min_margin_leaves_out_what_is_not_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = torch.tensor([[0.6, 0.5, 0.5], [0.9, 0.0, 0.0]])
    monkeypatch.setattr(Stage3, "judge", lambda *_, **__: rewards)
    assert prepared(stage3(method="rejection", min_margin=0.1))["weights"].tolist() == [0.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_earns_more_becomes_likelier(method: str, counted: None, tmp_path: Path) -> None:
    objective = stage3(method=method, max_caption_tokens=8, candidates=6)
    before = float(prepared(objective)["reward"].mean())
    train(objective, tmp_path, steps=20, lr=6e-3)
    assert float(prepared(objective)["reward"].mean()) > before + 0.1


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        ("mlp", {"caption_decoder.mlp"}),
        ("mlp+llm", {"caption_decoder.mlp", "caption_decoder.llm"}),
        (
            "mlp+llm+encoder",
            {"caption_decoder.mlp", "caption_decoder.llm"}
            | {"encoder.queries", "encoder.projector", "encoder.backbone"},
        ),
    ],
)
def test_what_trains(trainable: str, trained: set[str]) -> None:
    objective = stage3(trainable=trainable, method="dpo")
    assert trained_parts(objective.module) == trained


def test_the_judge_and_the_model_of_stage_2_stay(counted: None, tmp_path: Path) -> None:
    objective = stage3(kl=0.01)
    assert objective.reference is not None
    parts = (objective.reference, objective.decoder, objective.encoder)
    before = [weights_hash(part) for part in parts]
    train(objective, tmp_path, steps=2)
    assert [weights_hash(part) for part in parts] == before
    assert weights_hash(objective.caption_decoder) != before[0]


# --- in the loop


def train(objective: Stage3, run_dir: Path, steps: int, **kwargs: Any) -> Any:
    max_seconds, micro = kwargs.pop("max_seconds", None), kwargs.pop("accumulate", 1)
    loop = loop_config(
        steps=steps, batch_size=BATCH_SIZE, save_every=None, log_every=1, accumulate=micro
    )
    optim = optim_config(**{"lr_scale": {}, "warmup_steps": 1, **kwargs})
    return fit(objective, OneBatch(), loop, optim, run_dir, max_seconds=max_seconds)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, halved = stage3(kl=0.1), stage3(kl=0.1)
    train(whole, tmp_path / "whole", steps=3)
    with pytest.raises(Interrupted):
        train(halved, tmp_path / "halved", steps=3, max_seconds=0)
    train(stage3(kl=0.1), tmp_path / "halved", steps=3)
    again = stage3(kl=0.1)
    train(again, tmp_path / "halved", steps=3)
    assert weights_hash(again.caption_decoder) == weights_hash(whole.caption_decoder)


def test_memory_is_predicted_without_captions() -> None:
    objective = stage3(method="dpo")
    batch = objective.stand_in(make_batch())
    assert [len(row) for rows in batch["rollouts"] for row in rows] == [6] * 4
    assert objective.loss(batch, torch.Generator()).total.isfinite()


# --- the meter


def meter(objective: Stage3, **more: Any) -> CaptionMeter:
    return CaptionMeter(objective, [make_batch(**more)])


def test_the_meter_tells_what_rewards_do_to_captions() -> None:
    objective = stage3()
    figures = meter(objective)(0)
    c = objective.decoder.context(objective.encoder(make_batch()["pixels"])).sequence
    expected = objective.caption_decoder.loss(c, make_batch()["captions"])
    assert figures["held_out_loss"] == pytest.approx(expected.item())
    assert figures["held_out_tokens"] == 6
    assert figures["held_out_unfinished_share"] == 1.0
    assert {"held_out_reward", "held_out_repetition", "held_out_distinct_share"} <= figures.keys()
    without = meter(objective, captions=[None, None])(0)
    assert "held_out_loss" not in without


def test_a_run_that_games_its_reward_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = stage3(max_loss_rise=0.2)
    watching = meter(objective)
    with torch.no_grad():
        objective.caption_decoder.llm.get_input_embeddings().weight.mul_(3)
    with monkeypatch.context() as patch:
        patch.setattr(Stage3, "judge", lambda *_, **__: torch.ones(BATCH_SIZE, 1))
        with pytest.raises(DataError, match=r"the reward has risen from .* leave the language"):
            watching(4)
    monkeypatch.setattr(Stage3, "judge", lambda *_, **__: -torch.ones(BATCH_SIZE, 1))
    assert watching(4)["held_out_reward"] == -1  # what has not risen is no gaming


def test_repetition_counts_runs_of_four_words() -> None:
    assert repetition("one two three") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
