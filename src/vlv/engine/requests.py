"""What an engine is asked for one caption, and what it answers: OpenAI's completions with prompt embeddings."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vlv.storage import Json

if TYPE_CHECKING:
    from torch import Tensor

    from vlv.models.writers import Writing


def encoded(prefix: Tensor) -> str:
    """One prefix (Q, E) as engines take it: a tensor file in base64."""
    buffer = io.BytesIO()
    torch.save(
        prefix.detach().cpu().clone(), buffer
    )  # of a view, all of its storage would be saved
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class CaptionRequest:
    """A caption that is wanted."""

    prefix: str
    """As of `encoded`."""
    writing: Writing
    seed: int
    vocabulary: int
    """Tokens that there are."""

    def payload(self, model: str) -> bytes:
        """The body of the request."""
        writing, how = self.writing, self.writing.how
        body: Json = {
            "model": model,
            "prompt_embeds": self.prefix,
            "max_tokens": writing.max_new_tokens,
            "temperature": how.temperature if how.do_sample else 0.0,
            "top_p": how.top_p,
            "top_k": 0,
            "ignore_eos": True,  # of the model; ours may be another token
            "stop_token_ids": [writing.end],
            "return_token_ids": True,
        }
        if how.do_sample:
            body["seed"] = self.seed
        return json.dumps(body).encode()

    def read(self, raw: bytes) -> list[int]:
        """The tokens of an answer, with the end token if it ended there.

        Raises:
            ValueError: It is not the answer to this request; the message says why.
        """
        choice = _only_choice(raw)
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ValueError("the engine's answer has no token_ids; vLLM 0.11 or newer is needed")
        if not all(0 <= i < self.vocabulary for i in ids):
            raise ValueError("the engine's answer has tokens that the language model does not know")
        end, longest = self.writing.end, self.writing.max_new_tokens
        if reason == "stop":
            ids = ids if end in ids else [*ids, end]
        if reason not in {"stop", "length"} or len(ids) > longest or end in ids[:-1]:
            raise ValueError(f"the engine stopped a caption at {len(ids)} tokens for {reason!r}")
        if reason == "length" and (len(ids) != longest or end in ids):
            raise ValueError(f"the engine wrote {len(ids)} tokens, and {longest} were asked for")
        return ids


def _only_choice(raw: bytes) -> Json:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("the engine's answer is no JSON") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise ValueError(f"the engine's answer has {count} choices, and one was asked for")
    choice: Json = choices[0]
    return choice


@dataclass(frozen=True)
class Served:
    """What an engine has."""

    names: tuple[str, ...]
    """Of its models."""
    max_length: int | None
    """Positions of prefix and caption together, as far as it tells."""


def read_models(raw: bytes) -> Served:
    """Read the list of an engine's models.

    Raises:
        ValueError: It is none.
    """
    try:
        models = json.loads(raw)["data"]
        names = tuple(str(model["id"]) for model in models)
        lengths = [model.get("max_model_len") for model in models]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("the engine does not list its models; is it an engine?") from None
    known = [length for length in lengths if type(length) is int]
    return Served(names, min(known, default=None))
