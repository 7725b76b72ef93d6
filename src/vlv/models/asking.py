"""Questions about images, answered from the context.

Shapes: B questions, Q queries, D text width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vlv.errors import ConfigError
from vlv.models.decoding import Generation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vlv.models.captioner import CaptionDecoder

_OPPOSITES = {"yes": "no", "no": "yes"}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question about an image."""

    text: str
    yes: float | None = None
    """Probability of yes against no, where the answer is one of the two."""
    finished: bool = True
    """Whether the model ended it, rather than being stopped at ``max_new_tokens``."""


def check_answers(captioner: CaptionDecoder) -> None:
    """Refuse a model that was taught no questions.

    Raises:
        ConfigError: It was not, or an engine writes for it.
    """
    if not captioner.config.answers_questions:
        raise ConfigError(
            "this model describes images and was not taught to answer questions; train one on questions, or take another"
        )
    if captioner.writer is not None:
        raise ConfigError(
            "an engine writes captions and gives no probabilities of answers; ask without it"
        )


@torch.no_grad()
def answer(
    captioner: CaptionDecoder,
    c: Tensor,
    questions: Sequence[str],
    *,
    max_new_tokens: int | None = None,
) -> list[Answer]:
    """Answer one question about each context, with the likeliest words.

    Args:
        captioner: A model that was taught to.
        c: Contexts, (B, Q, D).
        questions: B questions.
        max_new_tokens: Longest answer.
    """
    how = Generation(max_new_tokens=max_new_tokens, prompt=list(questions), tidy=False)
    found = [Answer(x.text, finished=x.finished) for x in captioner.write(c, how)]
    rows = [row for row, x in enumerate(found) if _word(x.text) in _OPPOSITES]
    if rows:
        texts = [found[row].text for row in rows]
        asked = [questions[row] for row in rows]
        for row, share in zip(rows, _probabilities(captioner, c[rows], asked, texts), strict=True):
            is_yes = _word(found[row].text) == "yes"
            found[row] = replace(found[row], yes=share if is_yes else 1 - share)
    return found


def _probabilities(
    captioner: CaptionDecoder, c: Tensor, questions: Sequence[str], texts: Sequence[str]
) -> list[float]:
    """Probability of each answer against its opposite in the same letters."""
    pairs = [captioner.token_rows([text, _opposite(text)]) for text in texts]
    before = captioner.instruction_rows(questions)
    found = captioner.log_probs_of_tokens(  # (B, 2)
        c, pairs, instructions=before, batching="bucketed"
    )
    shares: list[float] = found.softmax(1)[:, 0].tolist()
    return shares


def _word(text: str) -> str:
    return text.strip().rstrip(".!").lower()


def _opposite(text: str) -> str:
    """The other answer, with the same capitals and the same full stop.

    >>> _opposite("Yes."), _opposite("no")
    ('No.', 'yes')
    """
    word = _OPPOSITES[_word(text)]
    word = word.capitalize() if text[:1].isupper() else word
    return word + text.strip()[len(_word(text)) :]
