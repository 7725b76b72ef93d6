"""What stage 3 does to captions of held-out images, and when it has to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlv.errors import DataError
from vlv.models.decoding import Caption, Generation
from vlv.training.objective import Batch
from vlv.training.stage3 import Stage3

_NGRAM = 4


@dataclass(frozen=True)
class CaptionFigures:
    """Figures of greedy captions of held-out images."""

    reward: float
    """What the run's own reward says of them."""
    tokens: float
    """Length on average."""
    repetition: float
    """Share of runs of four words that a caption has had before: rewards are known to breed them."""
    distinct_share: float
    """Different captions among all."""
    unfinished_share: float
    """Captions that did not end by themselves."""
    loss: float | None
    """Cross-entropy of the true captions, where there are some."""

    def metrics(self) -> dict[str, float]:
        """By name, with the prefix `held_out_`."""
        return {
            f"held_out_{name}": value for name, value in vars(self).items() if value is not None
        }


class CaptionMeter:
    """Measures greedy captions at every evaluation, and stops a run that games its reward.

    Args:
        objective: With the weights that the run starts from, against which it is compared.
        batches: Held-out batches.

    Raises:
        DataError: When called: the reward has risen, but the loss of the true captions by more than `stage3.max_loss_rise`
            too.
    """

    def __init__(self, objective: Stage3, batches: Sequence[Batch]) -> None:
        self.objective, self.batches = objective, list(batches)
        self.start = self.measure()

    def __call__(self, step: int) -> dict[str, float]:
        """The figures of the present weights."""
        now, limit = self.measure(), self.objective.config.max_loss_rise
        if limit is not None and now.loss is not None and self.start.loss is not None:
            rise = now.loss - self.start.loss
            if now.reward > self.start.reward and rise > limit:
                raise DataError(
                    f"step {step}: the reward has risen from {self.start.reward:.3f} to {now.reward:.3f}, but the loss of "
                    f"true captions too, by {rise:.2f} to {now.loss:.2f}: the captions please the judge and leave the "
                    "language; lower optim.lr, raise stage3.kl, or stage3.max_loss_rise if this is wanted"
                )
        return now.metrics()

    def measure(self) -> CaptionFigures:
        """Figures of the weights as they are."""
        objective = self.objective
        captions: list[Caption] = []
        rewards: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        greedy = Generation(max_new_tokens=objective.config.max_caption_tokens, tidy=False)
        with objective.at_rest():
            for batch in self.batches:
                seen = objective.look(batch)
                written = objective.caption_decoder.write(seen.c.sequence, greedy)
                rewards.append(objective.judge(seen, [[caption] for caption in written], 0))
                captions += written
                if all(batch["captions"]):
                    c = seen.c.sequence
                    losses.append(objective.caption_decoder.loss(c, batch["captions"]))
        texts, number = [caption.text for caption in captions], len(captions)
        return CaptionFigures(
            reward=float(torch.cat(rewards).mean()),
            tokens=sum(caption.num_tokens for caption in captions) / number,
            repetition=sum(map(repetition, texts)) / number,
            distinct_share=len(set(texts)) / number,
            unfinished_share=sum(not caption.finished for caption in captions) / number,
            loss=float(torch.stack(losses).mean()) if len(losses) == len(self.batches) else None,
        )


def repetition(text: str) -> float:
    """Share of the runs of four words that were there before.

    >>> repetition("a cube on a floor"), repetition("a b c d a b c d a b c d")
    (0.0, 0.5555555555555556)
    """
    words = text.lower().split()
    runs = [tuple(words[start : start + _NGRAM]) for start in range(len(words) - _NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
