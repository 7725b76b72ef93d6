"""Texts that stage 2 draws: the loss is that of each alone, and a row's draw depends on nothing else."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from tests import tiny
from tests.training.test_stages import generator, make_batch, stage2
from vlv.config import Stage2Config
from vlv.errors import DataError
from vlv.models.draws import RowGenerator
from vlv.training.microbatches import rows_of
from vlv.training.texts import draw_texts, text_mix

MIXED: dict[str, Any] = {
    "style_weights": {"short": 1.0, "tags": 1.0},
    "style_instructions": {"short": "Short:"},
    "question_weight": 2.0,
    "texts_per_image": 3,
}
META = [
    {"captions": {"short": "A cube.", "tags": "cube"}, "question": "red?", "answer": "yes"},
    {"questions": [{"question": "how many?", "answer": "two"}]},
]


def seeds(rows: range, step: int = 0) -> list[int]:
    return RowGenerator(0, step, rows).row_seeds


def test_the_model_is_told_what_it_learns() -> None:
    objective = stage2(**MIXED)
    assert objective.caption_decoder.styles == {"short": "Short:", "tags": "Style: tags."}
    assert objective.caption_decoder.config.answers_questions
    assert not objective.caption_decoder.config.obeys_lengths
    long = stage2(length_share=0.5)
    assert long.caption_decoder.config.obeys_lengths
    assert long.caption_decoder.config.takes_instructions
    plain = stage2()
    assert plain.caption_decoder.styles == {}
    assert not plain.caption_decoder.config.takes_instructions


def test_draws_belong_to_rows() -> None:
    batch, mix = make_batch(meta=META), text_mix(Stage2Config(**MIXED))
    drawn = draw_texts(batch, mix, 3, seeds(range(2)))
    assert drawn == draw_texts(batch, mix, 3, seeds(range(2)))
    for row in range(2):
        one = rows_of(batch, slice(row, row + 1))
        assert draw_texts(one, mix, 3, seeds(range(row, row + 1))) == [drawn[row]]
    several = [draw_texts(batch, mix, 1, seeds(range(2), step))[0][0] for step in range(40)]
    assert len(set(several)) == 4, "caption, two styles and a question"


def test_a_length_that_is_stated_is_true() -> None:
    batch, row_seeds = make_batch(meta=META), seeds(range(2))
    plain = draw_texts(batch, text_mix(Stage2Config(**MIXED)), 4, row_seeds)
    every = draw_texts(batch, text_mix(Stage2Config(**MIXED, length_share=1)), 4, row_seeds)
    for before, after in zip(chain(*plain), chain(*every), strict=True):
        assert before.answer == after.answer, "the draws stay"
        length = f"{len(after.answer.split())} words."
        wanted = " ".join(filter(None, (before.instruction, length)))
        assert after.instruction == (wanted if before.is_caption else before.instruction)
    some = text_mix(Stage2Config(length_share=0.3))
    drawn = [draw_texts(batch, some, 4, seeds(range(2), step)) for step in range(50)]
    stated = [text.instruction for rows in drawn for row in rows for text in row]
    assert 0.2 < sum(text is not None for text in stated) / len(stated) < 0.4
    one = rows_of(batch, slice(1, 2))
    assert draw_texts(one, some, 4, seeds(range(1, 2), 7)) == [drawn[7][1]]


def test_captions_are_told_what_is_known() -> None:
    meta = [{**META[0], "tags": ["red", "cube"]}, META[1]]
    batch, row_seeds = make_batch(meta=meta), seeds(range(2))
    plain = draw_texts(batch, text_mix(Stage2Config(**MIXED)), 4, row_seeds)
    told = text_mix(Stage2Config(**MIXED, length_share=1, context_column="tags", context_share=1))
    first, second = draw_texts(batch, told, 4, row_seeds)
    for before, after in zip(plain[0], first, strict=True):
        start = "Known: red, cube. " if before.is_caption else ""
        length = f"{len(after.answer.split())} words." if before.is_caption else None
        wanted = start + " ".join(filter(None, (before.instruction, length)))
        assert (after.answer, after.instruction) == (before.answer, wanted)
    assert not any("Known" in str(text.instruction) for text in second), "nothing is known of it"
    assert stage2(context_column="tags").caption_decoder.config.uses_known
    broken = make_batch(meta=[{"tags": {"a": 1}}, None])
    with pytest.raises(DataError, match="neither a text nor a list"):
        draw_texts(broken, told, 1, row_seeds)


def test_the_loss_is_that_of_each_text_alone() -> None:
    objective, batch = stage2(**MIXED), make_batch(meta=META)
    prepared = objective.prepare(batch, RowGenerator(0, 0, range(2)))
    losses = objective.loss(prepared, generator())
    decoder = objective.caption_decoder
    c = objective.decoder.context(objective.encoder(batch["pixels"])).sequence
    total, count = torch.zeros(()), 0
    for row, texts in enumerate(prepared["texts"]):
        for text in texts:
            own = decoder.loss_of_tokens(
                c[row : row + 1], [text.answer], instructions=[text.instruction]
            )
            total, count = total + own * len(text.answer), count + len(text.answer)
    torch.testing.assert_close(losses.total, total / count)
    assert sum(objective.num_targets(prepared)) == count


def test_a_mean_over_texts_lets_an_answer_count_as_much_as_a_caption() -> None:
    objective, batch = stage2(**MIXED, loss_mean="texts"), make_batch(meta=META)
    prepared = objective.prepare(batch, RowGenerator(0, 0, range(2)))
    decoder = objective.caption_decoder
    c = objective.decoder.context(objective.encoder(batch["pixels"])).sequence
    own = [
        decoder.loss_of_tokens(c[row : row + 1], [text.answer], instructions=[text.instruction])
        for row, texts in enumerate(prepared["texts"])
        for text in texts
    ]
    lengths = {len(text.answer) for texts in prepared["texts"] for text in texts}
    assert len(lengths) > 1
    found = objective.loss(prepared, generator()).total
    torch.testing.assert_close(found, torch.stack(own).mean())
    assert objective.num_targets(prepared) == [3, 3]


def test_a_plain_mix_is_the_caption_as_ever() -> None:
    objective, batch = stage2(), make_batch(meta=META)
    prepared = objective.prepare(batch, RowGenerator(0, 0, range(2)))
    assert [[text.instruction for text in row] for row in prepared["texts"]] == [[[]], [[]]]
    loss = objective.loss(batch, generator()).total
    torch.testing.assert_close(objective.loss(prepared, generator()).total, loss, rtol=0, atol=0)
    c = objective.decoder.context(objective.encoder(batch["pixels"])).sequence
    plain = objective.caption_decoder.loss(c, list(tiny.CAPTIONS[:2]), max_tokens=300)
    torch.testing.assert_close(loss, plain, rtol=0, atol=0)


def test_a_record_without_the_texts_is_named() -> None:
    batch = make_batch(meta=[None, None])
    mix = text_mix(Stage2Config(caption_weight=0, question_weight=1))
    with pytest.raises(DataError, match="a has no question with its answer"):
        draw_texts(batch, mix, 1, seeds(range(2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_weight": 0}, "are all 0"),
        ({"texts_per_image": 2}, "texts_per_image has no effect"),
        ({"style_weights": {"a b": 1}}, "give it a name"),
        ({"style_weights": {"short": 0}}, "greater than 0"),
        ({"style_instructions": {"short": "x"}}, "has no effect without style_weights.short"),
        ({**MIXED, "supervise_end": False}, "need supervise_end"),
        ({"length_share": 0.5, "supervise_end": False}, "need supervise_end"),
        ({"context_share": 0.2}, "context_share has no effect without context_column"),
        ({"context_column": "x", "supervise_end": False}, "need supervise_end"),
        ({"length_share": 1.5}, "less than or equal to 1"),
        (
            {"length_share": 0.5, "caption_weight": 0, "question_weight": 1},
            "length_share has no effect without captions",
        ),
        (
            {"style_weights": {"a": 1, "b": 1}, "style_instructions": {"a": "x", "b": "x"}},
            "in the same words",
        ),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage2Config(**settings)
