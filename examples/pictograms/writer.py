"""A small language model that has read all names, and seen no picture: `python -m examples.pictograms.writer PACKAGES OUT`.

It stands where SmolLM2 would (`model.llm` takes its GGUF file): on one processor core that is too slow to train.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from examples.pictograms.concepts import Concept, read_concepts

from vlv.errors import VLVError
from vlv.progress import say
from vlv.toyworld import components
from vlv.toyworld.objectives import LlmObjective
from vlv.toyworld.pretrain import Recipe, save_parts
from vlv.toyworld.table import TableLoader, token_column
from vlv.training.interrupt import Interrupted
from vlv.training.loop import fit

RECIPE = Recipe(steps=300, batch_size=64, lr=2e-3, ema=0.98)
VOCABULARY = 2000
VARIANTS = 4
_MOST_TOKENS = 24


def texts_of(concepts: Sequence[Concept], seed: int) -> list[str]:
    """Several texts of every concept: its name alone, and once its name among its tags."""
    texts = []
    for number, concept in enumerate(concepts):
        rng = np.random.default_rng([seed, number])
        tags = [concept.tags[i] for i in rng.permutation(len(concept.tags))[:3]]
        texts += [concept.label] * (VARIANTS - 1) + [", ".join([concept.label, *tags])]
    return texts


def train(source: Path, out: Path, run: Path, recipe: Recipe, seed: int) -> None:
    """Train it and save it in `out`; the same call goes on after an interruption."""
    texts = texts_of(read_concepts(source), seed)
    tokenizer = components.make_llm_tokenizer(texts, VOCABULARY)
    llm = components.make_llm(tokenizer, seed, "small")
    end = str(tokenizer.eos_token)
    ids = token_column(tokenizer, texts, VARIANTS, max_length=_MOST_TOKENS, end=end)
    loop, optim = recipe.settings(seed)
    device = torch.device("cpu")
    columns = {"texts": ids}
    loader = TableLoader(columns, loop.batch_size, seed=seed, device=device, texts=["texts"])
    fit(LlmObjective(llm), loader, loop, optim, run, settings={"part": "llm"})
    save_parts(out, llm, tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=RECIPE.steps)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    recipe = Recipe(given.steps, RECIPE.batch_size, RECIPE.lr, RECIPE.ema)
    try:
        train(given.packages, given.out, given.run_dir, recipe, given.seed)
    except (VLVError, Interrupted) as error:
        say(f"writer: {error}")
        return 1
    say(f"llm: {given.steps} steps done; the weights are in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
